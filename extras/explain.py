"""Pictures of predictions: what was seen in a picture, and how the routing of a digit came to its class."""
import os

import numpy as np
import torch
from PIL import Image, ImageOps

from caps import CLASSES, _routing, lengths, write_atomically
from caps.extras.figures import new_figure

SHOWN = 12  # figures of a picture


def images_of(picture, digits):
    """What the network saw of each digit of a result, [28, 28]."""
    images = {figure.box: figure.image for figure in picture.figures}
    return [images[tuple(digit["box"])] for digit in digits]


def plot_seen(path, picture, result, drawing):
    """The picture with the boxes of its digits, and beside it each as the network saw it, with its lengths."""
    digits = result["digits"][:SHOWN]
    figure, axes = new_figure(9.5, max(3.2, 1.6 * len(digits)), columns=3, rows=max(1, len(digits)))
    grid = axes[0].get_gridspec()
    grid.set_width_ratios((3, 1, 1.6))
    for axis in axes[::3]:
        axis.remove()
    whole = figure.add_subplot(grid[:, 0])
    with Image.open(path) as file:
        file.draft(None, (800, 800))
        shown = ImageOps.exif_transpose(file)
        if shown.mode[0] in "IF":
            shown = Image.fromarray(np.asarray(shown, np.float32))
        shown.thumbnail((800, 800))
    grey = len(shown.getbands()) == 1
    if shown.mode not in ("F", "L", "RGB", "RGBA"):
        shown = shown.convert("RGBA" if shown.has_transparency_data else "RGB")
    whole.imshow(shown, cmap="gray" if grey else None, extent=(0, picture.size[0], picture.size[1], 0))
    heading = result["text"] or result["result"]
    name = os.fsencode(path.name).decode(errors="replace")
    whole.set_title(f"{name}: {heading}" + "\nuncertain" * bool(result["uncertain"]), parse_math=False)
    whole.set_xlabel("pixels")
    whole.grid(False)
    for row, (digit, image) in enumerate(zip(digits, images_of(picture, digits))):
        left, top, right, bottom = digit["box"]
        colour = "tab:orange" if digit["uncertain"] else "tab:green"
        whole.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=colour)
        whole.annotate(digit["digit"], (left, top), color=colour, fontsize=12, ha="right", va="bottom")
        seen, bars = axes[3 * row + 1:3 * row + 3]
        seen.imshow(image, cmap="gray", vmin=0, vmax=1)
        seen.set(title="as the network sees it" * (row == 0), xticks=[], yticks=[])
        seen.grid(False)
        colours = [colour if c == digit["digit"] else "lightgrey" for c in range(CLASSES)]
        bars.bar(range(CLASSES), digit["lengths"], color=colours)
        bars.set(ylim=(0, 1), xticks=range(CLASSES), ylabel="length", title=(digit["uncertain"] or "").split(",")[0])
    for axis in axes[1:3] if not digits else ():
        axis.remove()
    write_atomically(drawing.with_name(f"{drawing.name}-seen.png"), figure.savefig)


def plot_routing(model, picture, result, drawing):
    """`plot_explanation` of each digit in a result; of several, their numbers are in the files' names."""
    device = next(model.parameters()).device
    images = images_of(picture, result["digits"])
    for number, image in enumerate(images, 1):
        which = f"{number}-" if len(images) > 1 else ""
        plot_explanation(model, torch.from_numpy(image)[None, None].to(device), drawing.with_name(f"{drawing.name}-{which}routing.png"))


@torch.no_grad()
def plot_explanation(model, image, path):
    """How the routing of one image [1, 1, 28, 28] goes: a map of the primary capsules' coupling per iteration, summed
    over their types, to the longest and to the second digit capsule, and all lengths after each iteration."""
    maps, trace = model.backbone(image), []
    votes = torch.einsum("njdk,bnk->bnjd", model.digits.weight, model.primary(maps))
    _routing(votes, model.digits.iterations, trace)
    after = torch.stack([lengths(v)[0] for _, v in trace]).cpu()               # [T, J]
    classes = after[-1].topk(2).indices.tolist()
    coupling = torch.stack([c[0].unflatten(0, (model.primary.types, *maps.shape[2:])).sum(0) for c, _ in trace]).cpu()
    figure, axes = new_figure(3.4 + 2.2 * len(trace), 4.8, columns=len(trace) + 1, rows=2)
    (digit, *above), (curves, *below) = axes[:len(trace) + 1], axes[len(trace) + 1:]
    digit.imshow(image[0, 0].cpu(), cmap="gray")
    digit.set(title=f"classified as {classes[0]}", xlabel="pixels")
    digit.grid(False)
    iterations = range(1, len(trace) + 1)
    for j in range(CLASSES):
        chosen = {"label": f"class {j}"} if j in classes else {"color": "lightgrey", "zorder": 1}
        curves.plot(iterations, after[:, j], marker=".", **chosen)
    curves.set(xlabel="iteration", ylabel="capsule length", ylim=(0, 1), xticks=iterations)
    curves.legend(fontsize=8)
    uniform = model.primary.types / CLASSES
    spread = max((coupling[..., classes] - uniform).abs().max().item(), 1e-6)
    for j, shown in zip(classes, (above, below)):
        for t, axis in enumerate(shown):
            drawn = axis.imshow(coupling[t, :, :, j], cmap="RdBu_r", vmin=uniform - spread, vmax=uniform + spread)
            axis.set(title=f"to class {j}, iteration {t + 1}", xticks=[], yticks=[], xlabel="primary grid")
            axis.grid(False)
        figure.colorbar(drawn, ax=shown, label=f"coupling, sum over types\n(uniform: {uniform:g})", shrink=0.8)
    write_atomically(path, figure.savefig)
