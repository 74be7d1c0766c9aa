"""The mode `predict`: pictures to classes; what was seen in each, and how the routing came to its class.

    python caps.py predict --checkpoint runs/alexcaps-mnist/last.pt photo.jpg scans/ --show seen

Where a network was trained on digits or characters framed as MNIST or EMNIST has them, these are looked for in pictures
(reading.py). Any other network takes each picture whole, brought to the size and channels of its training images.
"""
import collections
import glob
import itertools
import json
import math
import pathlib
import sys

import numpy as np
import torch

from caps import UserError, extra, file_name, lengths, load_model, progress, read_checkpoint
from caps.extras.datasets import DIGITS
from caps.extras.decoding import distances
from caps.extras.images import read_image
from caps.extras.machine import choose_device
from caps.extras.reading import Figure, Picture, read_picture, resized
from caps.extras.runs import check_writable, tell_network

CHUNK = 256    # files read before the network sees them together
# A digit is doubted whose longest capsule has at most that length, or is by less than that margin longer than the second:
# limits that pass the fewest other things and 97 % of digits (tests/bench.py pictures, on held-out training images). Anything
# is doubted that is further than that distance from its reconstruction, which the checkpoint tells.
Limits = collections.namedtuple("Limits", "length margin distance", defaults=(math.inf,))
LIMITS = {"alexcaps": Limits(0.86, 0.65), "rescaps": Limits(0.7, 0.48)}
PRESENT = 0.5  # of other classes: between the lengths that the margin loss wants of an absent and of a present class
BLOT = 0.36    # the width of strokes over a figure's height: a thick felt pen has 0.27


def options(add):
    add("--checkpoint")
    add("--device")
    add("images", nargs="+", metavar="IMAGE", type=file_name, help="image files, folders or glob patterns")
    add("--digits", action="store_true", help="a line for each digit of a picture, with its box")
    add("--json", action="store_true", help="print a JSON list, an object for each file, with boxes and all lengths")
    add("--invert", action="store_true", help="the digits are darker than their ground; by default this is found out, but "
        "for networks that take pictures whole: there it inverts them")
    for option, what in (("--show", "what was seen in each picture, as NAME-seen.png"),
                         ("--explain", "each digit's routing, as NAME-routing.png, and of a network with a decoder what "
                          "it makes of the digit's capsule, as NAME-decoded.png")):
        add(option, nargs="?", const=".", metavar="DIR", type=file_name, help=f"also draw {what} in DIR (here)")


def run(args):
    """What each image file shows; status 1 if one could not be read."""
    device = choose_device(args.device)
    tell_network(args)
    checkpoint = read_checkpoint(args.checkpoint)
    model, traits = load_model(checkpoint, device).eval(), checkpoint["traits"]
    limits = limits_of(checkpoint)
    files = image_files(args.images)
    if not files:
        raise UserError(f"{' '.join(args.images)}: no files there; name images, a folder or a glob")
    draw = drawer(args, model, traits, files) if args.show or args.explain else lambda *seen: None
    results, seen = [], 0  # figures in all pictures
    with progress("predict", total=len(files)) as bar:
        for chunk in (files[start:start + CHUNK] for start in range(0, len(files), CHUNK)):
            pictures = [read(path, args.invert, traits, bar) for path in chunk]
            found = classify(model, [figure.image for picture in pictures if picture for figure in picture.figures])
            for path, picture in zip(chunk, pictures):
                if picture is None:
                    results.append(None)
                    continue
                result = judge(picture, list(itertools.islice(found, len(picture.figures))), traits, limits)
                seen += len(result["digits"])
                results.append({"file": str(path), **named(result, traits)})
                if not args.json:
                    bar.write("\n".join(lines(path, result, args.digits, traits)))
                draw(len(results) - 1, picture, result)
    for option, drawn in ("show", any(results)), ("explain", seen):
        if drawn and getattr(args, option):
            print(f"caps: --{option}: drawn in {pathlib.Path(getattr(args, option))}/", file=sys.stderr)
    if args.json:
        print(json.dumps([result for result in results if result], indent=1))
    return int(None in results)


def limits_of(checkpoint):
    """The Limits of a network: its model's, and the distance that 99 % of the training images kept from what is decoded
    of them, at the end of the last epoch that is over; infinite without a decoder or such an epoch."""
    distance = next((row.get("usual_distance", math.inf) for row in checkpoint["history"][-1:]), math.inf)
    return LIMITS[checkpoint["config"]["model"]]._replace(distance=distance)


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


def drawer(args, model, traits, files):
    """draw(i, picture, result) for --show and --explain of the i-th file. What is drawn has the file's path with _ for /
    as its name, numbered where two come to the same."""
    explain = extra("explain")
    for option in ("show", "explain"):
        if getattr(args, option):
            check_writable(getattr(args, option), f"--{option}")
    names, times = [], collections.Counter()
    for path in files:
        name = "_".join(part for part in path.parts if part not in ("/", ".."))
        times[name] += 1
        names.append(name if times[name] == 1 else f"{name}-{times[name]}")

    def draw(i, picture, result):
        if args.show:
            explain.plot_seen(files[i], picture, result, traits, pathlib.Path(args.show, names[i]))
        if args.explain:
            explain.plot_digits(model, picture, result, traits, pathlib.Path(args.explain, names[i]))
    return draw


def read(path, invert, traits, bar):
    """The picture of a file, or None with a line on stderr."""
    bar.update()
    try:
        picture = (characters if traits["framing"] else whole)(path, invert, traits)
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        bar.write(f"{path}: cannot be read as an image ({getattr(error, 'strerror', None) or error})", file=sys.stderr)
        return None
    if picture.pages > 1:
        bar.write(f"{path}: the first of its {picture.pages} pages is read", file=sys.stderr)
    return picture


def characters(path, invert, traits):
    """A picture with the digits or characters in it, of the size of the training images."""
    picture = read_picture(path, invert, traits["framing"])
    for figure in picture.figures:
        if figure.image.shape != tuple(traits["image"][1:]):
            figure.image = resized(figure.image, traits["image"][1:]).copy()  # writable, as torch wants it
    return picture


def whole(path, invert, traits):
    """A picture as one figure, of the size and channels of the training images."""
    channels, *size = traits["image"]
    image, (height, width), pages = read_image(path, size, channels)
    image = np.float32(255 - image if invert else image) / 255
    if not 0.6 < width / height * size[0] / size[1] < 1.7:
        print(f"{path}: {width}×{height} pixels, squeezed to {size[1]}×{size[0]}, the shape of the training images",
              file=sys.stderr)
    return Picture((width, height), [Figure((0, 0, width, height), image)], pages=pages)


@torch.no_grad()
def classify(model, images):
    """(capsule lengths [J], distance of what is decoded, 0 without a decoder) of each image [H, W] or [H, W, C], one by
    one out of batches."""
    device = next(model.parameters()).device
    for start in range(0, len(images), CHUNK):
        batch = torch.from_numpy(np.stack(images[start:start + CHUNK])).reshape(-1, *images[0].shape[:2], model.image[0])
        batch = batch.permute(0, 3, 1, 2).contiguous().to(device)
        capsules = model(batch)
        far = distances(model.decoder(capsules), batch) if model.decoder else batch.new_zeros(len(batch))
        yield from zip(lengths(capsules).cpu(), far.tolist())


def kind(traits):
    """What a network tells apart: "digit", "character" or "class"."""
    return "class" if not traits["framing"] else "digit" if traits["classes"] == DIGITS else "character"


def doubts(lengths, distance, traits, limits):
    """Why the class of these capsule lengths [J], of an image at this `distance` from what was decoded of it, may be wrong,
    or None."""
    what, names = kind(traits), traits["classes"]
    ordered = lengths.argsort(descending=True).tolist()
    longest, second = [*lengths[ordered].tolist(), 0.0][:2]
    limit = limits.length if what == "digit" else PRESENT
    other = "none of the classes" if what == "class" else f"no {what}"
    if longest <= limit:
        return f"perhaps {other}, no capsule is longer than {limit}"
    if longest - second < limits.margin if what == "digit" else second > PRESENT:
        return f"{names[ordered[0]]} or {names[ordered[1]]}"
    if distance > limits.distance:
        return (f"perhaps {other}, its reconstruction differs by {distance:.1f}, those of training images by "
                f"{limits.distance:.1f} at most")
    return None


def judge(picture, found, traits, limits):
    """What a picture shows, by what `classify` found of its figures, as the object that --json prints but for `named`:
    `result` is "digit", "digits", "no digit" or "blank" ("character" for other characters, "class" for a picture taken
    whole), `text` the digits with / between rows, `uncertain` a reason or null."""
    what, names, digits = kind(traits), traits["classes"], []
    for figure, (score, distance) in zip(picture.figures, found):
        first = score.argmax().item()
        doubt = "a blot, no stroke" if figure.stroke > BLOT else doubts(score, distance, traits, limits)
        digits.append({"digit": first} if what == "digit" else {"class": names[first]})
        digits[-1] |= {"row": figure.row, "box": list(figure.box), "uncertain": doubt,
                       "lengths": [round(length, 4) for length in score.tolist()]}
        if limits.distance < math.inf:
            digits[-1] |= {"distance": round(distance, 2), "usual_distance": round(limits.distance, 2)}
    sure = [digit for digit in digits if not digit["uncertain"]]
    def height(digit):
        return digit["box"][3] - digit["box"][1]
    tallest = max(map(height, sure), default=0)
    small = [digit for digit in digits if height(digit) < tallest / 2]
    digits = [digit for digit in digits if digit not in small or not digit["uncertain"]]  # the others are dirt
    for digit in small:
        digit["uncertain"] = digit["uncertain"] or "small beside the others"  # a comma, a sign
    if not digits or len(digits) > 1 and 2 * len(sure) < len(digits):
        result = "blank" if picture.remark == "blank" else f"no {what}"
        doubt = {"blank": "nothing is drawn on it", "texture": "a texture", "small": "too few pixels"}.get(
            picture.remark, f"{len(digits)} marks, of which {len(sure)} look like {what}s")
    else:
        result = what if len(digits) == 1 else f"{what}s"
        doubt = next((digit["uncertain"] for digit in digits if digit["uncertain"]), None)
    rows = itertools.groupby(digits, key=lambda digit: digit["row"])
    between = "" if max(map(len, names)) == 1 else " "
    text = "/".join(between.join("?" if digit["uncertain"] and len(digits) > 1 else name_of(digit) for digit in row)
                    for _, row in rows)
    return {"size": list(picture.size), "result": result, "text": text if result in (what, f"{what}s") else "",
            "uncertain": doubt, "digits": digits}


def named(result, traits):
    """A result as --json prints it: of other classes than digits with lengths by name, of a picture taken whole without
    the list of one figure."""
    what = kind(traits)
    if what == "digit":
        return result
    figures = [figure | {"lengths": dict(zip(traits["classes"], figure["lengths"]))} for figure in result["digits"]]
    facts = {key: value for key, value in result.items() if key != "digits"}
    taken = {key: figures[0][key] for key in ("lengths", "distance", "usual_distance") if key in figures[0]}
    return facts | (taken if what == "class" else {"characters": figures})


def name_of(digit):
    return str(digit["digit"] if "digit" in digit else digit["class"])


def lines(path, result, each, traits):
    """The lines that a result is printed as: one, or one for `each` digit."""
    what = kind(traits)

    def line(digit, place=""):
        best = sorted(enumerate(digit["lengths"]), key=lambda item: -item[1])[:3]
        listing = ", ".join(f"{traits['classes'][c]} ({length:.3f})" for c, length in best)
        doubt = f"  uncertain: {digit['uncertain']}" if digit["uncertain"] else ""
        return f"{path}{place}: {name_of(digit)}  lengths {listing}{doubt}"

    if result["digits"] and each:
        return [line(digit, str(digit["box"]).replace(" ", "")) for digit in result["digits"]]
    if result["result"] == what:
        return [line(result["digits"][0])]
    if result["result"] == f"{what}s":
        doubt = f"  uncertain: ? may be no {what}" if result["uncertain"] else ""
        return [f"{path}: {result['text']}  several {what}s: {len(result['digits'])}{doubt}"]
    return [f"{path}: {result['result']}: {result['uncertain']}"]
