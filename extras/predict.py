"""The mode `predict`: image files to digits, and, asked for, how the routing of each came to its class.

    python caps.py predict --checkpoint runs/alexcaps-mnist/last.pt digit.png photos/ --explain
"""

import glob
import pathlib
import sys

import numpy as np
import torch
from PIL import Image, ImageOps

from caps import (CLASSES, UserError, _routing, check_writable, extra, file_name, lengths, load_model,
                  read_checkpoint, write_atomically)
from caps.extras.machine import choose_device


def options(add):
    add("--checkpoint")
    add("--device")
    add("images", nargs="+", metavar="IMAGE", type=file_name, help="image files, folders or glob patterns")
    add("--invert", action="store_true", help="the digits are dark on white")
    add("--explain", nargs="?", const=".", metavar="DIR", type=file_name,
        help="also draw each image's routing, as NAME-routing.png in DIR (here)")


def run(args):
    """Class and best three capsule lengths of image files; status 1 if one could not be read."""
    device = choose_device(args.device)
    model = load_model(read_checkpoint(args.checkpoint), device).eval()
    files = image_files(args.images)
    if not files:
        raise UserError(f"{' '.join(args.images)}: no files there; name images, a folder or a glob")
    if args.explain:
        extra("figures")
        check_writable(args.explain, "--explain")
    status = 0
    for path in files:
        try:
            image = read_digit(path, args.invert)[None].to(device)
        except Exception as error:  # Pillow's decoders raise a dozen kinds
            print(f"{path}: cannot be read as an image ({error})", file=sys.stderr)
            status = 1
            continue
        with torch.no_grad():
            best = lengths(model(image))[0].topk(3)
        listing = ", ".join(f"{c} ({length:.3f})" for c, length in zip(best.indices.tolist(), best.values.tolist()))
        doubt = "" if best.values[0] > 0.5 else "  uncertain: no capsule is longer than 0.5 (dark on white? --invert)"
        print(f"{path}: {best.indices[0]}  lengths {listing}{doubt}")
        if args.explain:
            name = "_".join(part for part in path.parts if part not in ("/", ".."))
            plot_explanation(model, image, pathlib.Path(args.explain, f"{name}-routing.png"))
    return status


def image_files(patterns):
    """The files that names, folders and glob patterns stand for, in order."""
    files = []
    for pattern in patterns:
        path = pathlib.Path(pattern)
        if path.is_dir():
            files += sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
        elif path.exists():
            files.append(path)
        else:
            files += [pathlib.Path(f) for f in sorted(glob.glob(pattern, recursive=True))] or [path]
    return files


def read_digit(path, invert=False):
    """An image file of any size -> float32 [1, 28, 28] in [0, 1], white on black, framed as MNIST frames its digits.

    A 28×28 image is taken as it is. Another is cut to its ink, fitted into 20×20 pixels, and set with its centre of
    mass in the middle (LeCun et al., 1998). `invert` is for dark digits on white.
    """
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):  # 16-bit greys; convert("L") would clip them
            image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white" if invert else "black"), image).convert("L")
    if invert:
        image = ImageOps.invert(image)
    box = image.point(lambda grey: 255 * (grey > 64)).getbbox()
    if image.size != (28, 28) and box:
        ink = ImageOps.contain(image.crop(box), (20, 20), Image.Resampling.BOX)
        weights = np.asarray(ink, np.float64)
        corner = [round(13.5 - (weights.sum(axis) @ np.arange(size)) / weights.sum())
                  for axis, size in ((0, ink.width), (1, ink.height))]
        image = Image.new("L", (28, 28))
        image.paste(ink, corner)
    image = image.resize((28, 28))  # of another size only where there is no ink
    return torch.from_numpy(np.asarray(image, np.float32) / 255).unsqueeze(0)


@torch.no_grad()
def plot_explanation(model, image, path):
    """How the routing of one image [1, 1, 28, 28] goes: a map of the primary capsules' coupling per iteration, summed
    over their types, to the longest and to the second digit capsule, and all lengths after each iteration."""
    from caps.extras.figures import new_figure  # matplotlib, which plain predictions do without
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
