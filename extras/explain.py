"""Pictures of predictions: what was seen in a picture, and how the routing of a digit came to its class."""
import os

import numpy as np
import torch
from PIL import Image, ImageOps

from caps import _routing, lengths
from caps.extras.decoding import decode
from caps.extras.figures import ALL, new_figure, pixels, shown
from caps.extras.predict import name_of
from caps.extras.reconstructions import draw_dimensions
from caps.extras.runs import write_atomically

SHOWN = 12  # figures of a picture
BARS = 8    # classes whose lengths are drawn, where there are more than ALL


def images_of(picture, digits):
    """What the network saw of each digit of a result, [H, W] or [H, W, C]."""
    images = {figure.box: figure.image for figure in picture.figures}
    return [images[tuple(digit["box"])] for digit in digits]


def plot_seen(path, picture, result, traits, drawing):
    """The picture with the boxes of its digits, and below it each as the network saw it, with its lengths."""
    digits = result["digits"][:SHOWN]
    across = min(max(1, len(digits)), 3)
    rows, width = -(-len(digits) // across), 2.5 + 2.5 * across
    height = min(5, max(0.6, width * picture.size[1] / picture.size[0]))
    figure, axes = new_figure(width, 1 + height + 1.5 * rows, columns=2 * across, rows=1 + rows)
    grid = axes[0].get_gridspec()
    grid.set_width_ratios((1, 1.4) * across)
    grid.set_height_ratios((height, *[1.5] * rows))
    for axis in (*axes[:2 * across], *axes[2 * (across + len(digits)):]):
        axis.remove()
    whole = figure.add_subplot(grid[0, :])
    with Image.open(path) as file:
        file.draft(None, (800, 800))
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":
            image = Image.fromarray(np.asarray(image, np.float32))
        image.thumbnail((800, 800))
    grey = len(image.getbands()) == 1
    if image.mode not in ("F", "L", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    whole.imshow(image, cmap="gray" if grey else None, extent=(0, picture.size[0], picture.size[1], 0))
    heading = result["text"] or result["result"]
    name = shown(os.fsencode(path.name).decode(errors="replace"), 20 * across + 20)
    whole.set_title(f"{name}: {heading}" + "\nuncertain" * bool(result["uncertain"]), parse_math=False)
    whole.set_xlabel("pixels")
    whole.grid(False)
    for digit in result["digits"] if traits["framing"] else ():
        (left, top, right, bottom), colour = digit["box"], colour_of(digit)
        whole.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=colour)
        whole.annotate(shown(name_of(digit)), (left, top), color=colour, fontsize=12, ha="right", va="bottom")
    for number, (digit, image) in enumerate(zip(digits, images_of(picture, digits)), across):
        seen, bars = axes[2 * number:2 * number + 2]
        seen.imshow(image, cmap="gray", vmin=0, vmax=1)
        seen.set(title="as seen" * (number == across), xticks=[], yticks=[])
        seen.grid(False)
        plot_lengths(bars, digit, traits["classes"])
        bars.set_ylabel("length" * (number % across == 0))
    write_atomically(drawing.with_name(f"{drawing.name}-seen.png"), figure.savefig)


def colour_of(digit):
    return "tab:orange" if digit["uncertain"] else "tab:green"


def plot_lengths(axis, digit, names):
    """The lengths of a digit's capsules, of many classes the longest, and why it is doubted."""
    values = np.array(digit["lengths"])
    listed = range(len(names)) if len(names) <= ALL else np.argsort(-values, kind="stable")[:BARS]
    axis.bar(range(len(listed)), values[listed], color=[
        colour_of(digit) if names[c] == name_of(digit) else "lightgrey" for c in listed])
    axis.set(ylim=(0, 1), yticks=(0, 0.5, 1))
    axis.set_title(shown((digit["uncertain"] or "").split(",")[0], 30), parse_math=False, fontsize=8)
    axis.set_xticks(range(len(listed)), [shown(names[c], 12) for c in listed], rotation=90 * (max(map(len, names)) > 2),
                    fontsize=8)


def plot_digits(model, picture, result, traits, drawing):
    """`plot_explanation` and `plot_decoded` of each digit in a result; of several, their numbers are in the files'
    names."""
    device = next(model.parameters()).device
    images = images_of(picture, result["digits"])
    for number, (digit, image) in enumerate(zip(result["digits"], images), 1):
        which = f"{number}-" if len(images) > 1 else ""
        image = torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)[None].to(device)
        plot_explanation(model, image, traits["classes"], drawing.with_name(f"{drawing.name}-{which}routing.png"))
        if model.decoder:
            plot_decoded(model, image, digit, traits["classes"], drawing.with_name(f"{drawing.name}-{which}decoded.png"))


@torch.no_grad()
def plot_explanation(model, image, names, path):
    """How the routing of one image [1, C, H, W] to classes of such `names` goes: a map of the primary capsules' coupling per iteration, summed
    over their types, to the longest and to the second digit capsule, and all lengths after each iteration."""
    maps, trace = model.backbone(image), []
    votes = torch.einsum("njdk,bnk->bnjd", model.digits.weight, model.primary(maps))
    _routing(votes, model.digits.iterations, trace)
    after = torch.stack([lengths(v)[0] for _, v in trace]).cpu()               # [T, J]
    classes = after[-1].topk(min(2, len(names))).indices.tolist()
    coupling = torch.stack([c[0].unflatten(0, (model.primary.types, *maps.shape[2:])).sum(0) for c, _ in trace]).cpu()
    figure, axes = new_figure(3.4 + 2.2 * len(trace), 4.8, columns=len(trace) + 1, rows=2)
    (digit, *above), (curves, *below) = axes[:len(trace) + 1], axes[len(trace) + 1:]
    digit.imshow(pixels(image[0]), cmap="gray", vmin=0, vmax=1)
    digit.set(title=f"classified as {shown(names[classes[0]])}", xlabel="pixels")
    digit.grid(False)
    iterations = range(1, len(trace) + 1)
    for j, name in enumerate(names):
        chosen = {"label": f"class {shown(name)}"} if j in classes else {"color": "lightgrey", "zorder": 1}
        curves.plot(iterations, after[:, j], marker=".", **chosen)
    curves.set(xlabel="iteration", ylabel="capsule length", ylim=(0, 1), xticks=iterations)
    curves.legend(fontsize=8)
    uniform = model.primary.types / len(names)
    spread = max((coupling[..., classes] - uniform).abs().max().item(), 1e-6)
    for axis in below[len(trace) * (len(classes) - 1):]:  # there is no second class
        axis.set_axis_off()
    for j, row in zip(classes, (above, below)):
        for t, axis in enumerate(row):
            drawn = axis.imshow(coupling[t, :, :, j], cmap="RdBu_r", vmin=uniform - spread, vmax=uniform + spread)
            between = ", " if len(names[j]) < 3 else "\n"
            axis.set(title=f"to class {shown(names[j])}{between}iteration {t + 1}", xticks=[], yticks=[], xlabel="primary grid")
            axis.grid(False)
        figure.colorbar(drawn, ax=row, label=f"coupling, sum over types\n(uniform: {uniform:.4g})", shrink=0.8)
    write_atomically(path, figure.savefig)


def plot_decoded(model, image, digit, names, path):
    """An image [1, C, H, W], what its longest capsule is decoded to, and that with each of the capsule's dimensions moved;
    `digit` is what `judge` says of it."""
    figure, (given, made, moved) = new_figure(9.5, 5, columns=3, width_ratios=(1, 1, 2))
    title = "decoded"
    if "distance" in digit:
        title += f", distance {digit['distance']:.1f}\n(99 % of training images: {digit['usual_distance']:.1f} at most)"
    for axis, what, text in (given, image, "as the network sees it"), (made, decode(model, image)[1], title):
        axis.imshow(pixels(what[0]), cmap="gray", vmin=0, vmax=1)
        axis.set_title(text, fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
    draw_dimensions(moved, model, image[0], names)
    write_atomically(path, figure.savefig)
