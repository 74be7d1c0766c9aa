"""The pictures of finished runs: accuracy and loss over epochs, confusion matrices, ROC curves, the worst errors."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from caps import CLASSES, write_atomically


def new_figure(width, height, columns=1, rows=1):
    """A figure in the one style of all plots, and its axes as a flat list."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    axes = list(np.ravel(figure.subplots(rows, columns)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def plot_curves(runs, path):
    """Accuracy and loss over epochs; `runs` maps a title to its rows of metrics.csv. Training dashed, test solid."""
    figure, axes = new_figure(10, 4, columns=2)
    for color, (title, rows) in enumerate(runs.items()):
        epochs = [row["epoch"] for row in rows]
        for axis, key, scale in ((axes[0], "accuracy", 100), (axes[1], "loss", 1)):
            for split, style in (("train", "--"), ("test", "-")):
                values = [scale * row[f"{split}_{key}"] for row in rows]
                axis.plot(epochs, values, style, color=f"C{color}", marker=".", label=f"{title}, {split}")
    for axis, label in zip(axes, ("accuracy (%)", "margin loss")):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=8)
    write_atomically(path, figure.savefig)


def plot_confusion(results, path):
    """Confusion matrices side by side; `results` maps a title to `measure`'s dictionary."""
    columns, rows = min(3, len(results)), -(-len(results) // 3)
    figure, axes = new_figure(5.2 * columns, 5.2 * rows, columns, rows)
    for axis in axes[len(results):]:
        axis.set_axis_off()
    for axis, (title, result) in zip(axes, results.items()):
        counts = np.array(result["confusion"])
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.grid(False)
        axis.imshow(share ** 0.3, cmap="Blues", vmin=0, vmax=1.2)  # the power shows single errors beside full diagonals
        for (row, column), n in np.ndenumerate(counts):
            if n:
                axis.text(column, row, n, ha="center", va="center", fontsize=8,
                          color="white" if share[row, column] > 0.5 else "black")
        axis.set(xlabel="predicted class", ylabel="true class", xticks=range(CLASSES), yticks=range(CLASSES),
                 title=f"{title}\n{100 * result['test_accuracy']:.2f} % of {counts.sum():,}")
    write_atomically(path, figure.savefig)


def plot_roc(results, path):
    """One-versus-rest ROC curves, whole and with the upper left corner enlarged; `results` maps a title to
    (scores [n, J], labels [n], `measure`'s dictionary)."""
    from sklearn.metrics import roc_curve  # a second to import, which the other pictures do not need
    figure, axes = new_figure(10, 4.6 * len(results), columns=2, rows=len(results))
    for row, (title, (scores, labels, result)) in enumerate(results.items()):
        whole, corner = axes[2 * row:2 * row + 2]
        for c in (c for c in range(CLASSES) if result["auc"][c] is not None):
            false_positive, true_positive, _ = roc_curve(labels.cpu() == c, scores[:, c].cpu())
            for axis in (whole, corner):
                axis.plot(false_positive, true_positive, color=f"C{c}", label=f"{c}: AUC {result['auc'][c]:.5f}")
        for axis in (whole, corner):
            axis.set(xlabel="false positive rate", ylabel="true positive rate")
        whole.set_title(f"{title}\neach class against the rest")
        corner.set(xlim=(-0.001, 0.05), ylim=(0.9, 1.003), title="the upper left corner")
        if whole.lines:
            whole.legend(fontsize=8, loc="lower right")
    write_atomically(path, figure.savefig)


def plot_misclassified(images, scores, labels, title, path, most=40):
    """The worst errors: those whose wrong capsule is longest compared with the right one."""
    predicted = scores.argmax(1)
    wrong = (predicted != labels).nonzero().flatten()
    right = scores.gather(1, labels[:, None]).flatten()
    worst = wrong[(scores.amax(1) - right)[wrong].argsort(descending=True)][:most].tolist()
    rows = max(1, -(-len(worst) // 8))
    figure, axes = new_figure(11, 1.2 + 1.55 * rows, columns=8, rows=rows)
    for axis in axes:
        axis.set_axis_off()
    for axis, i in zip(axes, worst):
        axis.imshow(images[i].cpu(), cmap="gray")
        axis.set_title(f"{labels[i]} as {predicted[i]}\n{right[i]:.2f} < {scores[i].max():.2f}", fontsize=8)
    figure.suptitle(f"{title}: {len(wrong)} of {len(labels)} wrong, the worst first", fontsize=10)
    write_atomically(path, figure.savefig)
