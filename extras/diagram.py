"""The mode `diagram`: a network drawn as data flows through it.

    python caps.py diagram --model rescaps    diagram-rescaps.svg and .png
"""

import functools
import itertools
import pathlib
from types import SimpleNamespace

import numpy as np
import torch.nn as nn
from matplotlib import patches, rc_context
from matplotlib.colors import to_rgb
from matplotlib.path import Path
from PIL import Image

from caps import ResidualBlock
from caps.extras import summary
from caps.extras.datasets import load_embedded
from caps.extras.figures import new_figure, pixels, shown
from caps.extras.runs import check_writable, write_atomically
from caps.extras.summary import described, layer_table, totals

KINDS = {"Conv2d": ("Conv", "#a5c5e5"), "MaxPool2d": ("Max pool", "#dd8a8a"), "BatchNorm2d": ("BN", "#86bf86"),
         "ReLU": ("ReLU", "#f2a65a"), "FusedReLU": ("ReLU", "#f2a65a"), "PrimaryCapsules": ("Primary capsules", "#7fa8d1"),
         "CapsuleLayer": ("Digit capsules", "#a78bca"), "Linear": ("Fully connected", "#c9b18f"),
         "Sigmoid": ("Sigmoid", "#d9c46c")}
BESIDE_BLOCK = 0.36  # inches, for the sum
DECODER = 1.68       # inches, for its row
sample_digit = functools.cache(lambda: pixels(load_embedded().test_images[500]))  # the first 5


def options(add):
    summary.options(add)
    add("--out", default=".", help="folder to write to")


def run(args):
    """diagram-MODEL.svg and diagram-MODEL.png."""
    check_writable(args.out)
    model, name, traits = described(args)
    for suffix in ("svg", "png"):
        path = pathlib.Path(args.out) / f"diagram-{name}.{suffix}"
        plot_diagram(model, path, traits)
        print(path)
    return 0


def diagram_stages(model):
    """What a diagram draws, in order: a layer with weights or a new shape begins a stage, which other layers then join."""
    blocks = [f"{name}." for name, module in model.named_modules() if isinstance(module, ResidualBlock)]
    stages = []
    for name, kind, shape, count, _ in [("", "Image", model.image, 0, 0), *layer_table(model)]:
        layer = model.get_submodule(name)
        title, color = KINDS["Conv2d"] if isinstance(layer, nn.Conv2d) else KINDS.get(kind, (kind, "#d0d0d0"))
        if not stages or shape != stages[-1].shape or isinstance(layer, (nn.Conv2d, nn.Linear)):
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


def plot_diagram(model, path, traits=None):
    """Draw data's flow through a model into an .svg or .png file; the figure, whose coordinates are inches. `traits` of
    its data set, or else a digit and numbers for classes."""
    maps, capsules, decoder = ([stage for stage in diagram_stages(model) if len(stage.shape) == n] for n in (3, 2, 1))
    beside = BESIDE_BLOCK * len({stage.block for stage in maps} - {None})
    longest = max(len(line) for stage in maps for line in stage.label + stage.table)
    pitch = max(0.057 * longest + 0.07, (7 - beside) / len(maps))
    lift = DECODER * bool(decoder)
    width, high, turn, low = 0.2 + pitch * len(maps) + beside, 3.65 + lift, 2.62 + lift, 1.38 + lift
    roof = high + (0.77 if beside else 0.45) + 0.13 * max(len(stage.label) for stage in maps)
    height = roof + (0.6 if beside else 0.45)
    figure, (axis,) = new_figure(width, height)
    sample = sample_digit() if not traits or traits["framing"] == "mnist" else np.full((1, 1), 190)  # a grey square
    end, edge = draw_backbone(axis, high, maps, pitch, roof, sample), width - 0.07
    x = (width + 1.1 - sum(0.1 * stage.shape[1] + 1.7 for stage in capsules)) / 2
    draw_arrow(axis, (end, high), (edge, high), (edge, turn), (x - 0.5, turn), (x - 0.5, low), (x - 0.03, low))
    names = traits["classes"] if traits else map(str, range(capsules[-1].shape[0]))
    middle = draw_capsules(axis, x, low, capsules, [shown(name, 12) for name in names])
    if decoder:
        draw_decoder(axis, width, middle, decoder, sample, model.image)
    title = "{}: {:,} parameters, {:,} multiply-adds an image".format(type(model).__name__, *totals(layer_table(model)))
    draw_text(axis, width / 2, height - 0.2, [title], fontsize=9, weight="bold")
    key = "Below each layer: its output (channels × height × width, or capsules × dimensions) and its parameters"
    draw_text(axis, width / 2, 0.08, [key], color="#555")
    axis.set(xlim=(0, width), ylim=(0, height), position=(0, 0, 1, 1))  # no layout moves it from there
    axis.set_axis_off()
    with rc_context({"svg.fonttype": "none"}):
        write_atomically(path, functools.partial(figure.savefig, dpi=220))
    if str(path).endswith(".png"):  # a palette takes a third of the bytes
        Image.open(path).convert("RGB").quantize().save(path, optimize=True)
    return figure


def draw_backbone(axis, y, stages, pitch, roof, sample):
    """The stages before the capsules in a row at y, `pitch` apart, labels from `roof` down; the x of its end."""
    largest = np.max([stage.shape[:2] for stage in stages[1:]], axis=0)
    x, end = 0.1, None
    for block, members in itertools.groupby(stages, lambda stage: stage.block):
        entry = x + 0.06
        for stage in members:
            begin, stop = draw_maps(axis, x + pitch / 2, y, stage, largest, sample)
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


def draw_maps(axis, x, y, stage, largest, sample):
    """The sample image, or maps as a cuboid with a band for each layer, around (x, y); its left and right end."""
    if stage.label[0] == "Image":
        axis.imshow(sample, cmap="gray", vmin=0, vmax=255, extent=(x - 0.25, x + 0.25, y - 0.25, y + 0.25))
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


def draw_capsules(axis, x, y, stages, classes):
    """Capsules around y, from x on, as pills with a dot for each dimension; the routing between them; the lengths. The
    middle of the last capsules, below their table."""
    within = max(map(len, classes)) <= 2  # names that the circles of the lengths have room for
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
        axis.text(end + (0.5 if within else 0.6), row, classes[index], fontsize=7, va="center_baseline",
                  ha="center" if within else "left")
    axis.plot(np.full(len(rows), end + 0.5), rows, "o", ms=10, mfc="white", mec="#444", mew=0.5)
    draw_text(axis, end + 0.5, y + 0.99, ["Lengths |v|", "longest: class"])
    draw_text(axis, end + 0.5, y - 0.95, [n])
    return end - 0.05 * dim, y - 1.13


def draw_decoder(axis, width, source, stages, sample, image):
    """The decoder in a row below the capsules, from `source` on: the mask, a bar for each layer's units, the image."""
    y, places = 0.84, width * (np.arange(len(stages) + 2) + 0.5) / (len(stages) + 2)
    inputs = stages[0].layer.in_features
    bars = [(inputs, ["#a78bca"], ["Mask of", "all but the longest"], [inputs, "0"])]
    bars += [(stage.shape[0], stage.colors, stage.label, stage.table) for stage in stages]
    draw_arrow(axis, source, (source[0], DECODER + 0.02), (places[0] - 0.55, DECODER + 0.02), (places[0] - 0.55, y), (places[0] - 0.06, y))
    for x, following, (units, colors, label, table) in zip(places, places[1:], bars):
        height = 0.11 * np.log2(max(units, 2)) ** 0.6
        for i, color in enumerate(colors):
            axis.add_patch(patches.Rectangle((x - 0.05 + 0.06 * i, y - height / 2), 0.06, height, fc=color, ec="#444", lw=0.5))
        draw_text(axis, x, y + 0.55, label)
        draw_text(axis, x, y - 0.42, table)
        draw_arrow(axis, (x + 0.06 * len(colors) - 0.03, y), (following - (0.06 if following < places[-1] else 0.26), y))
    draw_maps(axis, places[-1], y, SimpleNamespace(label=["Image"]), None, 0.6 * sample)
    draw_text(axis, places[-1], y + 0.55, ["Decoded image"])
    draw_text(axis, places[-1], y - 0.42, ["×".join(map(str, image))])


def draw_text(axis, x, y, lines, **style):
    for i, line in enumerate(lines):
        axis.text(x, y - 0.13 * i, line, ha="center", **{"fontsize": 7} | style)


def draw_arrow(axis, *points, codes=None):
    line = Path(points, codes)
    axis.add_patch(patches.FancyArrowPatch(path=line, arrowstyle="-|>", mutation_scale=6, lw=0.8, color="#333"))
