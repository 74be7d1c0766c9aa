"""Sets that tests make up, as arrays and in folders, and whether two that were read are the same."""
import numpy as np
import torch
from PIL import Image

RNG = np.random.default_rng(0)


def pictures(count, shape=(28, 28), classes=3):
    """Images uint8 [n, *shape] of squares whose place tells their class, and labels [n]."""
    labels = np.arange(count) % classes
    drawn = RNG.integers(0, 60, (count, *shape), dtype=np.uint8)
    for image, label in zip(drawn, labels):
        left = 3 + label * (shape[1] - 10) // max(1, classes - 1)
        image[6:12, left - 3:left + 4] = 220
    return drawn, labels


def write_folder(root, images, labels, names=None, kind="png"):
    """root/CLASS/NUMBER.png, numbered anew in each class."""
    for image, label in zip(images, labels):
        folder = root / (names[label] if names else str(label))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{len(list(folder.iterdir()))}.{kind}", quality=95)
    return root


def same(a, b):
    return a.traits | {"classes": 0} == b.traits | {"classes": 0} and all(torch.equal(getattr(a, part), getattr(b, part)) for part in (
        "train_images", "train_labels", "test_images", "test_labels"))
