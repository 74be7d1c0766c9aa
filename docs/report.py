"""The modes `diagram` and `report` of caps.py: networks drawn, and the study's claims judged by finished runs.

    python caps.py diagram --model rescaps    diagram-rescaps.svg and .png
    python caps.py report [RUN_DIR ...]       report/report.md with its pictures, for the reference runs in docs/report/
"""

import csv
import functools
import itertools
import json
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

from caps import (CLASSES, COLUMNS, EVALUATION_BATCH, MODELS, RECIPE, ResidualBlock, UserError, World, autocast,
                  build_parser, class_scores, layer_table, lengths, load_data, load_embedded, load_model, measure, move,
                  new_figure, plot_confusion, plot_curves, plot_roc, progress, read_checkpoint, start_world, to_float,
                  totals, write_atomically)

# -------------------------------------------------------------------------------------------------------------- diagram

KINDS = {"Conv2d": ("Conv", "#a5c5e5"), "MaxPool2d": ("Max pool", "#dd8a8a"), "BatchNorm2d": ("BN", "#86bf86"),
         "ReLU": ("ReLU", "#f2a65a"), "PrimaryCapsules": ("Primary capsules", "#7fa8d1"),
         "CapsuleLayer": ("Digit capsules", "#a78bca")}
BESIDE_BLOCK = 0.36  # inches, for the sum
sample_digit = functools.cache(lambda: load_embedded("").test_images[500].numpy())


def diagram_stages(model):
    """What a diagram draws, in order: a convolution or a new shape begins a stage, which other layers then join."""
    blocks = [f"{name}." for name, module in model.named_modules() if isinstance(module, ResidualBlock)]
    stages = []
    for name, kind, shape, count, _ in [("", "Image", (1, 28, 28), 0, 0), *layer_table(model)]:
        layer = model.get_submodule(name)
        title, color = KINDS["Conv2d"] if isinstance(layer, nn.Conv2d) else KINDS.get(kind, (kind, "#d0d0d0"))
        if not stages or shape != stages[-1].shape or title == "Conv":
            label = [title, getattr(layer, "mode", "")]
            if hasattr(layer, "kernel_size"):
                kernel, stride = ("×".join(map(str, np.broadcast_to(n, 2))) for n in (layer.kernel_size, layer.stride))
                label = [f"{title} {kernel}", "" if stride == "1×1" else f"stride {stride[0]}"]
            elif kind == "PrimaryCapsules":
                label[1] = "{} types on {}×{} pixels, squash".format(layer.types, *stages[-1].shape[1:])
            block = next(filter(name.startswith, blocks), None)
            stages.append(SimpleNamespace(layer=layer, shape=shape, label=label, block=block, layers=[]))
        stages[-1].layers.append((title, color, count))
    for stage in stages:
        titles, stage.colors, counts = zip(*stage.layers)
        stage.label = list(filter(None, [*stage.label, ", ".join(titles[1:])]))
        stage.table = ["×".join(map(str, stage.shape)), " + ".join(f"{n:,}" for n in counts if n) or "0"]
    return stages


def draw_text(axis, x, y, lines, **style):
    for i, line in enumerate(lines):
        axis.text(x, y - 0.13 * i, line, ha="center", **{"fontsize": 7} | style)


def draw_arrow(axis, *points, codes=None):
    from matplotlib import patches, path
    line = path.Path(points, codes)
    axis.add_patch(patches.FancyArrowPatch(path=line, arrowstyle="-|>", mutation_scale=6, lw=0.8, color="#333"))


def draw_maps(axis, x, y, stage, largest):
    """The image, or maps as a cuboid with a band for each layer, around (x, y); its left and right end."""
    from matplotlib.colors import to_rgb
    if stage.label[0] == "Image":
        axis.imshow(sample_digit(), cmap="gray", extent=(x - 0.25, x + 0.25, y - 0.25, y + 0.25))
        return x - 0.25, x + 0.25
    thickness, height = (stage.shape[:2] / largest) ** (0.5, 0.45) * (0.24, 0.8)
    widths = [0.04 + thickness] + [0.045] * (len(stage.colors) - 1)
    shift = np.array([0.16, 0.2]) * height
    begin = end = x - (sum(widths) + shift[0]) / 2
    for color, width in zip(stage.colors, widths):
        a, b, c, d = (end, y - (height + shift[1]) / 2) + np.array([(0, 0), (width, 0), (width, height), (0, height)])
        for shade, face in (1, (a, b, c, d)), (1.1, (d, c, c + shift, d + shift)), (0.8, (b, b + shift, c + shift, c)):
            shaded = np.clip(shade * np.array(to_rgb(color)), 0, 1)
            axis.fill(*np.transpose(face), fc=shaded, ec="#444", lw=0.5, joinstyle="round")
        end += width
    return begin, end + shift[0]


def draw_backbone(axis, y, stages, pitch, roof):
    """The stages before the capsules in a row at y, `pitch` apart, labels from `roof` down; the x of its end."""
    largest = np.max([stage.shape[:2] for stage in stages[1:]], axis=0)
    x, end = 0.1, None
    for block, members in itertools.groupby(stages, lambda stage: stage.block):
        entry = x + 0.06
        for stage in members:
            begin, stop = draw_maps(axis, x + pitch / 2, y, stage, largest)
            draw_text(axis, x + pitch / 2, roof, stage.label)
            draw_text(axis, x + pitch / 2, y - 0.7, stage.table)
            if end:
                draw_arrow(axis, (end, y), (begin, y))
            x, end = x + pitch, stop
        if block:
            plus = x + 0.1
            draw_arrow(axis, (end, y), (plus - 0.06, y))
            draw_arrow(axis, (entry, y), (entry, y + 1.1), (plus, y + 1.1), (plus, y + 0.06), codes=[1, 4, 4, 4])
            draw_text(axis, plus, y - 0.18, ["ReLU"])
            draw_text(axis, (entry + plus) / 2, roof + 0.17, ["Residual block"], color="#555")
            axis.plot(plus, y, marker="$\\oplus$", ms=9, color="#333", mew=0)
            axis.fill_between([entry - 0.03, plus + 0.15], y - 0.85, roof + 0.25, color="#f1f1f1", lw=6,
                              joinstyle="round", zorder=0)
            x, end = x + BESIDE_BLOCK, plus + 0.06
    return end


def draw_capsules(axis, x, y, stages):
    """Capsules around y, from x on, as pills with a dot for each dimension; the routing between them; the lengths."""
    sources = []
    for stage in stages:
        n, dim = stage.shape
        shown = [*range(n)] if n <= 10 else [*range(8), n - 1]
        rows = y + 0.15 * ((min(n, 10) - 1) / 2 - np.minimum(shown, 9))
        end = x + 0.1 * dim
        if len(sources):
            axis.plot([x - 1.7, x], [np.repeat(sources, len(rows)), np.tile(rows, len(sources))], "#999", lw=0.3)
            times = f"routing, {stage.layer.iterations} iteration{'s' * (stage.layer.iterations > 1)}"
            draw_text(axis, x - 0.85, y + 0.04, ["votes û = W u", times], bbox={"fc": "white", "ec": "none", "pad": 2})
            draw_text(axis, x - 0.85, y - 0.95, ["W: " + "×".join(map(str, stage.layer.weight.shape))])
        for lw, color in (8, "#444"), (7.2, stage.colors[0]):
            axis.plot([x + 0.05, end - 0.05], [rows, rows], color, lw=lw, solid_capstyle="round")
        axis.plot(x + 0.1 * np.arange(dim) + 0.05, np.tile(rows, (dim, 1)), "o", color="white", ms=4.3, mew=0)
        for height, lines in (rows[-1] + 0.12, ["⋮"] * (n > 10)), (y + 0.99, stage.label), (y - 0.95, stage.table):
            draw_text(axis, x + 0.05 * dim, height, lines)
        sources, x = rows, end + 1.7
    for index, row in zip(shown, rows):
        draw_arrow(axis, (end + 0.03, row), (end + 0.42, row))
        draw_text(axis, end + 0.5, row, [index], va="center_baseline")
    axis.plot(np.full(len(rows), end + 0.5), rows, "o", ms=10, mfc="white", mec="#444", mew=0.5)
    draw_text(axis, end + 0.5, y + 0.99, ["Lengths |v|", "longest: class"])
    draw_text(axis, end + 0.5, y - 0.95, [n])


def plot_diagram(model, path):
    """Draw data's flow through a model into an .svg or .png file; the figure, whose coordinates are inches."""
    from matplotlib import rc_context
    from PIL import Image
    maps, capsules = ([stage for stage in diagram_stages(model) if len(stage.shape) == n] for n in (3, 2))
    beside = BESIDE_BLOCK * len({stage.block for stage in maps} - {None})
    longest = max(len(line) for stage in maps for line in stage.label + stage.table)
    pitch = max(0.057 * longest + 0.07, (7 - beside) / len(maps))
    width, high, turn, low = 0.2 + pitch * len(maps) + beside, 3.65, 2.62, 1.38
    roof = high + (0.77 if beside else 0.45) + 0.13 * max(len(stage.label) for stage in maps)
    height = roof + (0.6 if beside else 0.45)
    figure, (axis,) = new_figure(width, height)
    end, edge = draw_backbone(axis, high, maps, pitch, roof), width - 0.07
    x = (width + 1.1 - sum(0.1 * stage.shape[1] + 1.7 for stage in capsules)) / 2
    draw_arrow(axis, (end, high), (edge, high), (edge, turn), (x - 0.5, turn), (x - 0.5, low), (x - 0.03, low))
    draw_capsules(axis, x, low, capsules)
    title = "{}: {:,} parameters, {:,} multiply-adds an image".format(type(model).__name__, *totals(layer_table(model)))
    draw_text(axis, width / 2, height - 0.2, [title], fontsize=9, weight="bold")
    key = "Below each layer: its output (channels × height × width, or capsules × dimensions) and its parameters"
    draw_text(axis, width / 2, 0.08, [key], color="#555")
    axis.set(xlim=(0, width), ylim=(0, height), position=(0, 0, 1, 1))  # no layout moves it from there
    axis.set_axis_off()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, dpi=220)
    if str(path).endswith(".png"):  # a palette takes a third of the bytes
        Image.open(path).convert("RGB").quantize().save(path, optimize=True)
    return figure


def diagram(args):
    """diagram-MODEL.svg and diagram-MODEL.png."""
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    model = MODELS[args.model](iterations=args.iterations)
    for suffix in ("svg", "png"):
        path = pathlib.Path(args.out) / f"diagram-{args.model}.{suffix}"
        plot_diagram(model, path)
        print(path)
    return 0


# --------------------------------------------------------------------------------------------------------------- report

FACTS = {"train_images": int, "epochs": int, "seconds_per_epoch": float, "parameters": int, "test_accuracy": float,
         "macro_auc": float, "device": str, "world_size": int, "peak_memory_bytes": int,
         "confusion": lambda counts: np.reshape(counts, (CLASSES, CLASSES)).tolist()}
DISTORTIONS = {"rotation (degrees)": range(0, 61, 10), "shift (pixels)": range(7),
               "noise (standard deviation)": (0, 0.1, 0.2, 0.3, 0.4, 0.5)}


def read_part(path):
    """What one file of a run's folder tells: some of `facts`, `rows` and `model`."""
    if path.suffix == ".pt":
        checkpoint = read_checkpoint(path)
        rows, recipe = checkpoint["history"], {k: checkpoint["config"][k] for k in RECIPE}
        reached = {"test_accuracy": row["test_accuracy"] for row in rows[-1:]}
        return {"facts": recipe | reached | {"epochs": len(rows)}, "rows": rows,
                "model": load_model(checkpoint, torch.device("cpu"))}
    if path.suffix == ".csv":
        kinds = dict.fromkeys(COLUMNS, float) | {"epoch": int, "dataset": str}
        with open(path, newline="") as file:
            return {"rows": [{k: kinds[k](row[k]) for k in COLUMNS} for row in csv.DictReader(file)]}
    facts = json.loads(path.read_text())
    if facts["model"] not in MODELS:
        raise ValueError(f"unknown model {facts['model']}")
    return {"facts": {k: facts[k] for k in RECIPE} | {k: kind(facts[k]) for k, kind in FACTS.items()}}


def read_run(folder):
    """What a run's folder tells: `facts` of summary.json, or the recipe in last.pt; `rows` of metrics.csv or last.pt;
    `model`; and `missing`, in words what is not there or damaged. Without facts there is nothing to report."""
    run = SimpleNamespace(folder=pathlib.Path(folder), facts={}, rows=[], model=None, missing=[])
    for name in ("last.pt", "metrics.csv", "summary.json"):
        try:
            vars(run).update({k: told for k, told in read_part(run.folder / name).items() if told})
        except Exception as error:  # a damaged file leads to a dozen kinds
            damage = f"is damaged: {error}".splitlines()[0]
            run.missing.append(f"{name} {damage if (run.folder / name).exists() else 'is not there'}")
    if run.facts:
        model, count, dataset = (run.facts.get(k) for k in ("model", "world_size", "dataset"))
        processes = f"{count} process{'es' if count > 1 else ''}" if count else "unfinished"
        run.title = f"{MODELS[model].__name__}, {processes}{'' if dataset == 'mnist' else f', {dataset}'}"
        run.full = bool(run.rows) and (dataset, run.facts.get("train_images")) == ("mnist", 60_000)
        study = vars(build_parser().parse_args(["train", "--dataset", "mnist"]))
        run.departures = [f"{k.replace('_', '-')} {run.facts[k]}" for k in RECIPE[1:] if run.facts[k] != study[k]]
        run.network = run.model or MODELS[model](iterations=run.facts["iterations"])
        run.size = totals(layer_table(run.network))
        if run.rows and len(run.rows) != run.facts["epochs"]:
            run.missing.append(f"summary.json is of {run.facts['epochs']} epochs, metrics.csv of {len(run.rows)}")
    return run


def nearness(run):
    """Sorts the runs of a model by their likeness to the study's; accuracy has no say."""
    return run.facts["model"], run.full, run.facts.get("world_size") == 1, min(len(run.rows), 20), -len(run.departures)


def reference(runs, model, several):
    """The run on full MNIST, with one or several processes, that claims are judged by; without one, that in words."""
    none = f"no finished run of {MODELS[model].__name__} with {'several processes' if several else '1 process'}"
    found = [r for r in runs if r.full and r.facts["model"] == model and (r.facts["world_size"] > 1) == several]
    return max(found, key=nearness, default=f"{none} on full MNIST")


# A judge returns whether a claim holds, None where that is not measured, and what was measured.
def judge_accuracy(run, epochs, value):
    rows = run.rows[:epochs]
    reached = rows[-1]["test_accuracy"]
    said = f"{100 * reached:.2f} % after {len(rows)} of {epochs} epochs ({run.title})"
    return reached >= value or (None if len(rows) < epochs else False), said


def judge_both(holds, say, runs):
    """A claim on both models: a run of each can refute it, only both can prove it."""
    found = {run.facts["model"]: run for run in runs}
    said = [f"{MODELS[m].__name__} {say(found[m])}" if m in found else f"no {MODELS[m].__name__}" for m in MODELS]
    return all(map(holds, found.values())) and (len(found) == len(MODELS) or None), ", ".join(said)


def judge_higher(alex, res):
    (a, m), (r, n) = ((run.rows[-1]["test_accuracy"], len(run.rows)) for run in (alex, res))
    unfair = n > m if r > a else n < m
    error = 100 * np.sqrt((a * (1 - a) + r * (1 - r)) / np.sum(alex.facts["confusion"]))
    close = 100 * abs(r - a) < 2 * error
    said = f"{100 * r:.2f} % after {n} epochs against {100 * a:.2f} % after {m}; one seed each, standard error of the "
    return None if unfair or close else r > a, said + f"difference {error:.2f} points"


def judge_earlier(*runs):
    first = [next((row["epoch"] for row in run.rows if row["test_accuracy"] >= 0.9), None) for run in runs]
    said = [f"epoch {e}" if e else f"not within {len(run.rows)} epochs" for e, run in zip(first, runs)]
    low = [e or len(run.rows) + 1 for e, run in zip(first, runs)]
    high = [e or float("inf") for e in first]
    return True if low[1] - high[0] >= 2 else False if high[1] - low[0] < 2 else None, " against ".join(said)


def judge_time(slow, fast):
    ratio, work = slow.facts["seconds_per_epoch"] / fast.facts["seconds_per_epoch"], slow.size[1] / fast.size[1]
    same = all(slow.facts[key] == fast.facts[key] for key in ("device", "amp"))
    said = ["{seconds_per_epoch:.0f} s ({device}, amp {amp})".format(**run.facts) for run in (slow, fast)]
    said = f"{ratio:.2f} times: {' against '.join(said)}; {work:.3f} times the multiply-adds"
    return ratio >= 1.5 if same else None, said + ("" if same else "; not the same device and amp")


def judge_smooth(runs):
    losses = [np.array([row["train_loss"] for row in run.rows]) for run in runs]
    change = np.concatenate([100 * np.diff(loss) / loss[:-1] for loss in losses])
    fell, rise = (change < 0).sum(), change.max(initial=0)
    return (bool(fell >= 0.9 * len(change) and rise <= 10) if len(change) else None,
            f"fell in {fell} of {len(change)} epochs after the first, largest rise {rise:.1f} %; {len(runs)} run(s)")


def judge_stable(runs):
    finite = all(np.isfinite([row["train_loss"], row["test_loss"]]).all() for run in runs for row in run.rows)
    fall = max(-100 * np.diff([row["test_accuracy"] for row in run.rows]).min(initial=0) for run in runs)
    said = "all losses finite" if finite else "a loss that is not finite"
    return bool(finite and fall <= 2), f"{said}, largest fall {fall:.2f} points; {len(runs)} run(s)"


def claims(runs, fits):
    """Rows of the claims table; `fits` is {title of a run: {kind of features: fit_angles' result}}."""
    judges = {(model, several): reference(runs, model, several) for model in MODELS for several in (False, True)}
    alex, res = pair = [judges[model, False] for model in MODELS]
    several, faster = judges["alexcaps", True], "1.5 times or more, same device and amp"
    full, none = [run for run in runs if run.full], "no finished run on full MNIST"
    least = {"alexcaps": 10e6, "rescaps": 1e6}
    r2 = {title: [np.nanmean(r2) for r2, _ in fit.values()] for title, fit in fits.items()}
    table = [(f"{MODELS[model].__name__}: {100 * value:.2f} % with {how}, {epochs} epochs", "as high by then",
              judge_accuracy, judges[model, how != "1 process"], epochs, value)
             for model, how, epochs, value in (
                 ("alexcaps", "1 process", 10, 0.9806), ("alexcaps", "several processes", 20, 0.9628),
                 ("rescaps", "1 process", 20, 0.9870), ("rescaps", "several processes", 10, 0.9786))]
    table += [
        ("ResCapsNet ends higher", "by two standard errors, not after longer training", judge_higher, alex, res),
        ("AlexCapsNet reaches 90 % two to three epochs earlier", "by 2 epochs or more", judge_earlier, alex, res),
        ("ROC nearly perfect for both", "macro AUC of each at least 0.99", judge_both,
         lambda run: run.facts["macro_auc"] >= 0.99, lambda run: f"{run.facts['macro_auc']:.5f}",
         [run for run in pair if not isinstance(run, str)]),
        ("AlexCapsNet has tens of millions of parameters, ResCapsNet a few million",
         "10 to 100 and 1 to 10 million; the described networks have what is measured here", judge_both,
         lambda run: 1 <= run.facts["parameters"] / least[run.facts["model"]] < 10,
         lambda run: f"{run.facts['parameters'] / 1e6:.2f} million", [r for r in runs if "parameters" in r.facts]),
        ("An AlexCapsNet epoch takes twice a ResCapsNet epoch", faster, judge_time, alex, res),
        ("Several processes shorten AlexCapsNet's time significantly", faster, judge_time, alex, several),
        ("The loss falls smoothly", "training loss, in 9 of 10 epochs, no rise above 10 %", judge_smooth, full or none),
        ("No instability with 3 iterations", "losses finite, no epoch loses more than 2 points of test accuracy",
         judge_stable, [run for run in full if run.facts["iterations"] == 3] or none),
        ("Capsules preserve digit orientation", "R² of the angle at least 0.5 and above the length's, both", judge_both,
         lambda run: 0.5 <= r2[run.title][0] > r2[run.title][1],
         lambda run: "{:.2f}, from the length {:.2f}".format(*r2[run.title]), [run for run in full if run.title in r2])]
    words, rows = {True: "holds", False: "**does not hold**", None: "not measured"}, []
    for says, criterion, judge, *needs in table:
        lacking = [need for need in needs if isinstance(need, str)]
        holds, said = (None, "; ".join(lacking)) if lacking else judge(*needs)
        rows.append({"the study": says, "criterion here": criterion, "measured here": said, "verdict": words[holds]})
    return rows


def distort(images, kind, level):
    """uint8 [n, 28, 28] -> the same, rotated or shifted sideways or made noisy by `level`, a number or one each."""
    if kind.startswith("noise"):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
        return (images + 255 * level * noise).clamp(0, 255).round().byte()
    column, unit = (0, np.pi / 180) if kind.startswith("rotation") else (1, 1 / 14)
    motion = torch.zeros(len(images), 3, device=images.device)
    motion[:, column] = level * unit
    return move(to_float(images), motion).mul(255).round().byte().squeeze(1)


def fit_angles(features, angles, labels):
    """R² and mean error in degrees [2, J] of a ridge regression for each class from features [n, F] to angles [n],
    fitted to every other image, its penalty chosen there by leave-one-out, and scored on the rest."""
    from sklearn import linear_model, metrics, pipeline, preprocessing
    found = np.full((2, CLASSES), np.nan)
    for c in np.flatnonzero(np.bincount(labels, minlength=CLASSES) >= 6):
        x, y = features[labels == c].astype(np.float64), angles[labels == c]
        ridge = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.RidgeCV(np.logspace(-3, 5, 17)))
        guess = ridge.fit(x[::2], y[::2]).predict(x[1::2]).clip(-30, 30)
        found[:, c] = metrics.r2_score(y[1::2], guess), metrics.mean_absolute_error(y[1::2], guess)
    return found


@torch.no_grad()
def orientation(model, images, labels, amp):
    """Rotate images [n, 28, 28] by angles in ±30° and fit these from what the model says of the images that it still
    recognises: (angles [m], winning capsules [m, 16], labels [m], {kind of features: fit_angles' result})."""
    angles = 60 * torch.rand(len(images), generator=torch.Generator().manual_seed(0)) - 30
    angles, parts = angles.to(images.device), []
    model.eval()
    for batch in progress("orientation", torch.arange(len(images)).split(EVALUATION_BATCH)):
        angle, label = angles[batch], labels[batch]
        with autocast(images.device, amp):
            primary = model.primary(model.backbone(to_float(distort(images[batch], "rotation", angle))))
            digits = model.digits(primary).float()
        right = lengths(digits).argmax(1) == label
        parts.append((angle[right], digits[right, label[right]], label[right], primary[right].flatten(1).float()))
    angles, capsules, labels, primary = (torch.cat(part).cpu().numpy() for part in zip(*parts))
    features = {"16 numbers of the winning capsule": capsules,
                "its length": np.linalg.norm(capsules, axis=1, keepdims=True),
                f"{primary.shape[1]:,} numbers of the primary capsules": primary}
    return angles, capsules, labels, {kind: fit_angles(x, angles, labels) for kind, x in features.items()}


def robustness(model, images, scores, labels, amp):
    """{kind: accuracies at its levels} of images turned or shifted to either side in turn, or with noise; `scores`
    [n, J] are those at level 0, of the images as they are."""
    side = 1 - 2 * (torch.arange(len(images), device=images.device) % 2)
    found = {kind: [scores] for kind in DISTORTIONS}
    for kind, level in progress("robustness", [(kind, n) for kind in DISTORTIONS for n in DISTORTIONS[kind][1:]]):
        distorted = distort(images, kind, level if kind.startswith("noise") else level * side)
        found[kind].append(class_scores(model, distorted, World(0, 1, images.device), amp))
    return {kind: [(s.argmax(1) == labels).double().mean().item() for s in found[kind]] for kind in found}


def plot_orientation(results, path, digit=2, most=3):
    """The capsule dimensions of one class that vary most with the angle; `results` maps titles to orientation's."""
    figure, axes = new_figure(11, 3.2 * len(results), columns=most, rows=len(results))
    for row, (title, (angles, capsules, labels, _)) in enumerate(results.items()):
        x, values = angles[labels == digit], capsules[labels == digit]
        r = [np.corrcoef(x, dimension)[0, 1] for dimension in values.T]
        for axis, d in zip(axes[row * most:(row + 1) * most], np.argsort(-np.abs(r))):
            axis.scatter(x, values[:, d], s=9, color=f"C{row}")
            axis.set(xlabel="rotation (degrees)", ylabel=f"capsule dimension {d}")
            axis.set_title(f"{title}, digit {digit}: r = {r[d]:.2f}", fontsize=9)
    figure.savefig(path)


def plot_robustness(results, path):
    """Accuracy against each distortion; `results` maps titles to robustness's."""
    figure, axes = new_figure(12, 3.8, columns=len(DISTORTIONS))
    for axis, (kind, levels) in zip(axes, DISTORTIONS.items()):
        for title, found in results.items():
            axis.plot(levels, 100 * np.array(found[kind]), marker=".", label=title)
        axis.set(xlabel=kind, ylabel="accuracy (%)", ylim=(0, 102))
        axis.legend(fontsize=8, loc="lower left")
    figure.savefig(path)


def markdown(rows):
    """A Markdown table of dictionaries with the same keys; None is a dash."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join("–" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def results_row(run):
    def fact(key, form, scale=1):
        return form.format(scale * run.facts[key]) if key in run.facts else None

    return {"run": run.title, "setting, but for the study's with 1 process": ", ".join(run.departures) or None,
            "test accuracy": fact("test_accuracy", "{:.2f} %", 100), "epochs": run.facts["epochs"],
            "parameters": f"{run.size[0]:,}", "multiply-adds an image": f"{run.size[1]:,}",
            "seconds an epoch": fact("seconds_per_epoch", "{:,.0f}"),
            "images/s": f"{np.mean([row['images_per_second'] for row in run.rows]):,.0f}" if run.rows else None,
            "peak memory a process": fact("peak_memory_bytes", "{:,.0f} MiB", 2**-20),
            "macro AUC": fact("macro_auc", "{:.5f}"), "processes": run.facts.get("world_size"),
            "device": run.facts.get("device"), "folder": f"`{run.folder}`"}


def write_page(out, records, tested, turned, distorted, images):
    """report.md and its pictures in the folder `out`; results are by title, `images` at most were distorted."""
    def section(title, name, plot, content, *text):
        path = out / f"{name}.png"
        path.unlink(missing_ok=True)
        if content:
            plot(content, path)
        shown = f"![{title.strip('# ')}]({path.name})" if content else "Not drawn: no run has what it takes."
        return "\n\n".join([title, shown, *text])

    runs = [run for run in records if run.facts]
    fits = {title: fits for title, (_, _, _, fits) in turned.items()}
    tables = [f"**{title}**\n\n" + markdown([
        {"angle fitted from": kind, "R²": f"**{np.nanmean(r2):.2f}**", "mean error": f"{np.nanmean(error):.1f}°"}
        | {f"R² of {c}": f"{r2[c]:.2f}" for c in range(CLASSES)} for kind, (r2, error) in fit.items()])
        for title, fit in fits.items()]
    networks = {run.facts["model"]: run.network for run in sorted(runs, key=nearness)}
    parts = [
        "# AlexCapsNet and ResCapsNet, claim by claim",
        "Written by `caps.py report` from the files of finished runs. Accuracies are those after the last epoch; "
        "no run and no epoch was chosen by its test accuracy. A run whose loss is no longer finite stops and is not "
        "among them.",
        "## Results", markdown([results_row(run) for run in runs]),
        "## What the study claims", markdown(claims(runs, fits)),
        "Judged by finished runs on full MNIST; of several, by that with the most epochs, then the one nearest to the "
        "study's recipe.",
        section("## Accuracy and loss", "curves", plot_curves, {run.title: run.rows for run in runs if run.rows}),
        section("## Confusion matrices", "confusion", plot_confusion,
                {run.title: run.facts for run in runs if "confusion" in run.facts}),
        section("## ROC, one class against the rest", "roc", plot_roc, {t: tested[t][1:] for t in tested}),
        "## Architectures", *(section(f"### {MODELS[model].__name__}", f"diagram-{model}", plot_diagram, network)
                              for model, network in networks.items()),
        section("## Do capsules preserve orientation?", "orientation", plot_orientation, turned,
                "Every test image is rotated by a random angle in ±30°. For each class a ridge regression is fitted to "
                "every other image of those that are still recognised, its penalty chosen there, and scored on the "
                "rest, its answers cut to ±30°. Guessing 0° has an R² of 0 and a mean error of 15°. Two of these "
                "rules, recognised images only and the cut, were added after a first fit on test images of AlexCapsNet "
                "without them, in which a few misread digits outweighed all others; the whole test set, in place of "
                "2,000 of its images, came later still; the criterion is older than all three. The picture shows "
                "the capsule dimensions that vary most with the angle.", *tables),
        section("## Robustness", "robustness", plot_robustness, distorted,
                f"{images:,} test images at most, evenly over the test set, rotated or shifted sideways, every other "
                "one to the other side, or with Gaussian noise and cut to [0, 1]."),
        "## What is missing",
        "\n".join(f"* `{record.folder}`: {what}" for record in records for what in record.missing) or "Nothing."]
    write_atomically(out / "report.md", lambda file: file.write_text("\n\n".join(parts) + "\n"))


def test_again(run, data_dir, device):
    """A run's model on its test set: (images, class scores [n, J], labels [n], `measure`'s dictionary)."""
    data = load_data(run.facts["dataset"], data_dir, run.facts["holdout"]).to(device)
    run.model.to(device)
    scores = torch.cat([class_scores(run.model, part, World(0, 1, device), run.facts["amp"])
                        for part in progress(run.title, data.test_images.split(5 * EVALUATION_BATCH))])
    result = measure(scores, data.test_labels)
    if abs(result["test_accuracy"] - run.facts.get("test_accuracy", result["test_accuracy"])) > 0.002:
        run.missing.append(f"last.pt has a test accuracy of {100 * result['test_accuracy']:.2f} %, not the run's")
    return data.test_images, scores, data.test_labels, result


def report(args):
    """report.md and its pictures from finished runs; what cannot be read is named there and on stderr."""
    device, out = start_world(args.device).device, pathlib.Path(args.out)
    files = (file for file in pathlib.Path("runs").glob("*/*") if file.name in ("last.pt", "summary.json"))
    records = [read_run(folder) for folder in dict.fromkeys(args.runs or sorted(file.parent for file in files))]
    runs = [run for run in records if run.facts]
    if not runs:
        raise UserError("; ".join(f"{run.folder}: {run.missing[0]}" for run in records) or "report: no run under runs/")
    titles = [run.title for run in runs]
    for run in (run for run in runs if titles.count(run.title) > 1):
        run.title += f" ({run.folder})"
    out.mkdir(parents=True, exist_ok=True)
    tested, turned, distorted = {}, {}, {}
    for run in (run for run in runs if run.model):
        try:
            tested[run.title] = test_again(run, args.data_dir, device)
        except UserError as error:
            run.missing.append(f"not tested, so without ROC, orientation and robustness: {error}")
    nearest = {run.facts["model"]: run for run in sorted(runs, key=nearness) if run.title in tested}
    for run in nearest.values():
        images, scores, labels, _ = tested[run.title]
        turned[run.title] = orientation(run.model, images, labels, run.facts["amp"])
        few = (each[::-(-len(images) // args.images)] for each in (images, scores, labels))
        distorted[run.title] = robustness(run.model, *few, run.facts["amp"])
    write_page(out, records, tested, turned, distorted, args.images)
    for record, what in ((record, what) for record in records for what in record.missing):
        print(f"caps: {record.folder}: {what}", file=sys.stderr)
    print(f"{len(runs)} run(s): {out / 'report.md'}")
    return 0
