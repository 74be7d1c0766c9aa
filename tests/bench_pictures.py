"""The measurements of bench.py `pictures`: accuracy on pictures as people make them, and what is taken for a digit."""
import functools
import io
import itertools
import multiprocessing
import os

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pictures import KINDS, NOTHING, grey

import caps
from caps.extras import datasets, predict, reading


@functools.cache
def network(checkpoint):
    """The network of a checkpoint and the limits of its doubts, and the images that it was not trained on: those held out, or
    the test set."""
    content = caps.read_checkpoint(checkpoint)
    config = content["config"]
    data = caps.load_data(config["dataset"], os.environ.get("CAPS_DATA"), config["holdout"], config["seed"])
    model = caps.load_model(content, torch.device("cpu")).eval()
    return model, predict.limits_of(content), data.test_images[:, 0].numpy() / np.float32(255), data.test_labels


def saved(image):
    file = io.BytesIO()
    image.save(file, "PNG" if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "TIFF")
    return file


def judged(model, file, limits):
    picture = reading.read_picture(file)
    found = list(predict.classify(model, [figure.image for figure in picture.figures]))
    return predict.judge(picture, found, datasets.earlier_traits("mnist"), limits)


MEASURES = "length", "margin", "distance"


def ends(digit):
    """(the longest capsule, by how much it is longer than the second, minus the distance of what is decoded, or 0)."""
    second, first = sorted(digit["lengths"])[-2:]
    return first, first - second, -digit.get("distance", 0)


def areas(digits, others):
    """The area under the ROC of each measure, digits against others: 1 tells them apart, 0.5 is chance."""
    from sklearn import metrics
    known = np.repeat([True, False], [len(digits), len(others)])
    scores = np.array([*digits, *others]).T
    return {what: round(float(metrics.roc_auc_score(known, score)), 3) for what, score in zip(MEASURES, scores) if np.ptp(score)}


def best_limits(digits, others, measures):
    """(share of others accepted, share of digits accepted, limits) by some of MEASURES: the fewest others where at least
    97 % of the digits are accepted, with limits at every quarter of a percent of the digits."""
    columns = [MEASURES.index(what) for what in measures]
    digits, others = np.array(digits)[:, columns], np.array(others)[:, columns]
    grid = np.quantile(digits, np.arange(0, 0.0301, 0.0025), axis=0).T
    tried = [((others >= limits).all(1).mean(), (digits >= limits).all(1).mean(), limits) for limits in itertools.product(*grid)]
    return min((row for row in tried if row[1] >= 0.97), key=lambda row: row[0])


def letters(generator, alphabet="ABCDEFGHJKLMNPQRTUVWXYabcdefhkmnprtuwxy"):
    """A letter that is no digit's double, in a font that comes with matplotlib."""
    from matplotlib import font_manager
    image = Image.new("L", (300, 300), 255)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), int(generator.integers(90, 220)))
    ImageDraw.Draw(image).text((150, 150), str(generator.choice(list(alphabet))), 0, font, anchor="mm")
    return image


def a_kind(name, checkpoint, count, seed=0):
    """Of `count` digits, others for each kind, how many are right as MNIST has them ("plain"), right as pictures of a kind,
    wrong without a doubt, and doubted; and the `ends` of the right ones."""
    torch.set_num_threads(1)
    model, limits, images, labels = network(checkpoint)
    generator = np.random.default_rng([seed, list(KINDS).index(name)])
    chosen = generator.permutation(len(images))[:count]
    plain = torch.stack([lengths for lengths, _ in predict.classify(model, list(images[chosen]))]).argmax(1)
    results = [judged(model, saved(KINDS[name](images[i], generator)), limits) for i in chosen]
    truth = labels[chosen]
    right = [result["text"] == str(label) for result, label in zip(results, truth.tolist())]
    doubted = [result["uncertain"] is not None or result["result"] != "digit" for result in results]
    pairs = [ends(result["digits"][0]) for result, r in zip(results, right) if r]
    return {"kind": name, "ends": pairs, "plain": int((plain == truth).sum()), "right": sum(right),
            "wrong": sum(not r and not d for r, d in zip(right, doubted)), "doubted": sum(doubted), "of": count}


def no_kind(name, checkpoint, count, fashion, seed=0):
    """How many of `count` pictures without a digit are taken for one, or for several, without a doubt; and how many
    have a figure whose longest capsule is above 0.5."""
    torch.set_num_threads(1)
    model, limits, images, _ = network(checkpoint)
    generator = np.random.default_rng(seed)
    clothes = caps.load_data("fashion", fashion).test_images[:, 0].numpy() / np.float32(255) if name == "clothes" else None
    make = {"letters": letters, "upside-down digits": lambda g: grey(np.rot90(images[g.integers(len(images))], 2)),
            "noise in place of a digit": lambda g: grey(np.pad(g.random((20, 20)), 4)),
            "clothes": lambda g: grey(clothes[g.integers(len(clothes))])} | NOTHING
    results = [judged(model, saved(make[name](generator)), limits) for _ in range(count)]
    longest = [max((max(digit["lengths"]) for digit in result["digits"]), default=0) for result in results]
    pairs = [ends(digit) for result in results for digit in result["digits"] if "blot" not in (digit["uncertain"] or "")]
    return {"kind": name, "ends": pairs, "above 0.5": sum(length > 0.5 for length in longest), "of": count,
            "accepted": sum(result["result"].startswith("digit") and result["uncertain"] is None for result in results)}


def pictures(options):
    """Prints and returns all rows, how well length, margin and distance tell digits from others, and the limits of length
    and margin that would do so best."""
    with multiprocessing.get_context("spawn").Pool(options.threads or 2) as pool:
        arguments = dict(checkpoint=options.checkpoint, count=options.count)
        kinds = pool.imap(functools.partial(a_kind, **arguments), KINDS)
        print(f"{'kind':34s}     right   plain    loss  doubted  wrong and not doubted, of {options.count}")
        result = []
        for row in kinds:
            share = 100 / row["of"]
            print(f"{row['kind']:34s} {share * row['right']:7.1f} % {share * row['plain']:5.1f} % "
                  f"{share * (row['plain'] - row['right']):5.1f}   {row['doubted']:5d}  {row['wrong']:5d}", flush=True)
            result.append(row)
        digits = [pair for row in result for pair in row["ends"]]
        names = ["letters", "upside-down digits", "noise in place of a digit", *["clothes"] * bool(options.fashion), *NOTHING]
        print(f"{'without a digit':34s} a capsule above 0.5, accepted, of {options.count}; area under the ROC")
        for row in pool.imap(functools.partial(no_kind, fashion=options.fashion, **arguments), names):
            row["areas"] = areas(digits, row["ends"]) if row["ends"] else {}
            print(f"{row['kind']:34s} {row['above 0.5']:5d} {row['accepted']:5d} ",
                  *(f"{what} {area:.3f}" for what, area in row["areas"].items()), flush=True)
            result.append(row)
    others = [pair for row in result if "right" not in row for pair in row["ends"]]
    for row in result:
        del row["ends"]
    print("all of these figures:", *(f"{what} {area:.3f}" for what, area in areas(digits, others).items()))
    print(f"the fewest of {len(others)} other figures, where at least 97 % of {len(digits)} right digits are accepted:")
    for measures in MEASURES[:2], MEASURES[2:], MEASURES:
        passed, kept, limits = best_limits(digits, others, measures)
        print(f"{100 * passed:5.1f} % by", ", ".join(f"{what} {abs(limit):.3g}" for what, limit in zip(measures, limits)),
              f"({100 * kept:.1f} % of digits)")
    return {"command": "pictures", "checkpoint": str(options.checkpoint), "results": result}
