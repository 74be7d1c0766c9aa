"""The pictures of finished runs: accuracy and loss over epochs, confusion matrices, ROC curves, the worst errors."""

import textwrap
import warnings

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from caps.extras.runs import write_atomically

ALL = 12    # classes of which each has a ROC curve of its own
WORST = 6   # classes named where there are more
warnings.filterwarnings("ignore", "Glyph .* missing")  # in the names of classes: a box is drawn


def shown(name, most=16):
    """A class's name as it is drawn: on one line, its middle cut where it is long, a $ no formula and a _ not hidden."""
    name = " ".join(name.encode(errors="replace").decode().split())
    name = name if len(name) <= most else name[:most // 2] + "…" + name[-(most - most // 2 - 1):]
    return " " * name.startswith("_") + name.replace("$", r"\$")


def wrapped(title):
    """A run's title on lines that fit an axis of five inches, broken between its options."""
    return textwrap.fill(", ".join(part.replace(" ", "\N{no-break space}") for part in title.split(", ")), 48,
                         break_on_hyphens=False)


def pixels(image):
    """[C, H, W] -> [H, W] or [H, W, C], as imshow has it."""
    return image.cpu().permute(1, 2, 0).squeeze(2).numpy()


def new_figure(width, height, columns=1, rows=1, **grid):
    """A figure in the one style of all plots, and its axes as a flat list; `grid` as GridSpec's."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    axes = list(np.ravel(figure.subplots(rows, columns, gridspec_kw=grid)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def legend_below(figure, axis):
    """The legend of all axes, outside of them, so that long titles hide nothing."""
    handles, labels = axis.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) < 70 else 1  # of characters, in a figure of 10 inches
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


def plot_curves(runs, path):
    """Accuracy and loss over epochs; `runs` maps a title to its rows of metrics.csv. Training dashed, its points hollow, test
    solid. First epochs may lie below the picture: they would leave no room for the others."""
    figure, axes = new_figure(10, 3.2 + 0.4 * len(runs), columns=2)  # the legend has two lines a run, or one
    for color, (title, rows) in enumerate(runs.items()):
        epochs = [row["epoch"] for row in rows]
        for axis, key, scale in ((axes[0], "accuracy", 100), (axes[1], "loss", 1)):
            for split, style, fill in (("train", "o--", "white"), ("test", "o-", f"C{color}")):  # of one epoch just a point
                values = [scale * row[f"{split}_{key}"] for row in rows]
                axis.plot(epochs, values, style, color=f"C{color}", ms=3, mfc=fill, label=f"{title}, {split}")
    for axis, label in zip(axes, ("accuracy (%)", "margin loss")):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter("")
    if max(map(len, runs.values())) > 2:
        low = min(100 * row[f"{split}_accuracy"] for rows in runs.values() for row in rows[1:] or rows for split in ("train", "test"))
        high = axes[0].dataLim.y1
        axes[0].set_ylim(low - 0.05 * (high - low) - 0.1, high + 0.05 * (high - low) + 0.1)
    legend_below(figure, axes[0])
    write_atomically(path, figure.savefig)


def plot_confusion(results, path):
    """Confusion matrices side by side; `results` maps a title to `measure`'s dictionary with the names of `classes`."""
    columns = min(2 if len(results) == 4 else 3, len(results))
    rows = -(-len(results) // columns)
    counts = np.array([len(result["classes"]) for result in results.values()])
    cells = np.interp(counts, (12, 26, 100), (0.4, 0.32, 0.19))  # inches
    sides = np.zeros(columns * rows)
    sides[:len(counts)] = np.maximum(5.2, 1.2 + cells * counts)
    sides = sides.reshape(rows, columns)
    widths, heights = sides.max(0), sides.max(1)
    figure, axes = new_figure(widths.sum(), heights.sum(), columns, rows, width_ratios=widths, height_ratios=heights)
    for axis in axes[len(results):]:
        axis.set_axis_off()
    for axis, cell, (title, result) in zip(axes, cells, results.items()):
        counts, names = np.array(result["confusion"]), [shown(name) for name in result["classes"]]
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.grid(False)
        axis.imshow(share ** 0.3, cmap="Blues", vmin=0, vmax=1.2)  # the power shows single errors beside full diagonals
        for (row, column), n in np.ndenumerate(counts):
            if n:
                axis.text(column, row, n, ha="center", va="center", fontsize=min(8, 30 * cell),
                          color="white" if share[row, column] > 0.5 else "black")
        axis.set(xlabel="predicted class", ylabel="true class",
                 title=f"{wrapped(title)}\n{100 * result['test_accuracy']:.2f} % of {counts.sum():,}")
        small = {} if len(names) <= ALL else {"fontsize": min(8, 38 * cell)}
        axis.set_yticks(range(len(names)), names, **small)
        axis.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0, **small)
    write_atomically(path, figure.savefig)


def plot_roc(results, path):
    """One-versus-rest ROC curves, whole and with the upper left corner enlarged; `results` maps a title to
    (scores [n, J], labels [n], `measure`'s dictionary with the names of `classes`)."""
    figure, axes = new_figure(10, 4.6 * len(results), columns=2, rows=len(results))
    for row, (title, (scores, labels, result)) in enumerate(results.items()):
        whole, corner = axes[2 * row:2 * row + 2]
        low = 0.9  # of the enlarged corner, where every curve shall be seen
        for name, false_positive, true_positive, auc, style in roc_curves(scores.cpu(), labels.cpu(), result):
            low = min(low, np.interp(0.05, false_positive, true_positive))
            for axis in (whole, corner):
                axis.plot(false_positive, true_positive, label=f"{name}: AUC {auc:.5f}", **style)
        for axis in (whole, corner):
            axis.set(xlabel="false positive rate", ylabel="true positive rate")
        whole.set_title(f"{wrapped(title)}\neach class against the rest")
        corner.set(xlim=(-0.001, 0.05), ylim=(low, 1.003 + 0.03 * (0.9 - low)), title="the upper left corner")
        if whole.lines:
            whole.legend(fontsize=8, loc="lower right")
    write_atomically(path, figure.savefig)


def roc_curves(scores, labels, result):
    """(name, false positive rates, true positive rates, area, style) of each class with and without images; of more than
    ALL classes the mean over classes (macro), all decisions together (micro), and those with the least areas."""
    from sklearn import metrics  # a second to import, which the other pictures do not need
    known = [c for c in range(len(result["classes"])) if result["auc"][c] is not None]
    curves = {c: metrics.roc_curve(labels == c, scores[:, c])[:2] for c in known}
    few, chosen = len(known) <= ALL, known
    if not few:
        rates = np.concatenate([np.linspace(0, 0.05, 501), np.linspace(0.05, 1, 951)])
        mean = np.mean([np.interp(rates, *curves[c]) for c in known], 0)
        together = metrics.roc_curve(np.eye(scores.shape[1])[labels].ravel(), scores.ravel())[:2]
        yield f"macro, {len(known)} classes", rates, mean, result["macro_auc"], {"color": "black", "lw": 2}
        yield "micro", *together, metrics.auc(*together), {"color": "black", "ls": "--"}
        chosen = sorted(known, key=lambda c: result["auc"][c])[:WORST]
    for number, c in enumerate(chosen):
        yield shown(result["classes"][c]), *curves[c], result["auc"][c], {"color": f"C{c if few else number}"}


def plot_misclassified(images, scores, labels, classes, title, path, most=40):
    """The worst errors: those whose wrong capsule is longest compared with the right one; `classes` are names."""
    predicted = scores.argmax(1)
    wrong = (predicted != labels).nonzero().flatten()
    right = scores.gather(1, labels[:, None]).flatten()
    worst = wrong[(scores.amax(1) - right)[wrong].argsort(descending=True)][:most].tolist()
    rows = max(1, -(-len(worst) // 8))
    figure, axes = new_figure(11, 1.2 + 1.55 * rows, columns=8, rows=rows)
    for axis in axes:
        axis.set_axis_off()
    for axis, i in zip(axes, worst):
        axis.imshow(pixels(images[i]), cmap="gray", vmin=0, vmax=255)
        true, taken = (shown(classes[c], 10) for c in (labels[i], predicted[i]))
        axis.set_title(f"{true} as {taken}\n{right[i]:.2f} < {scores[i].max():.2f}", fontsize=8)
    figure.suptitle(f"{title}: {len(wrong)} of {len(labels)} wrong, the worst first", fontsize=10)
    write_atomically(path, figure.savefig)
