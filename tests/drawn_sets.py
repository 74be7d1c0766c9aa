"""Data sets to try `--dataset` on where nothing can be downloaded.

    python tests/drawn_sets.py FOLDER      FOLDER/glyphs62, FOLDER/colour10 (folders of PNG), FOLDER/digits8.npz
"""
import pathlib
import string
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import caps

FONTS = sorted(str(path) for path in pathlib.Path("/usr/share/fonts/truetype").rglob("*.ttf"))


def glyph(character, generator):
    """A character of a font, 18 to 26 pixels high, turned by up to 15°, with noise: float [32, 32] in [0, 1]."""
    font = ImageFont.truetype(FONTS[generator.integers(len(FONTS))], int(generator.integers(18, 27)))
    image = Image.new("L", (32, 32))
    ImageDraw.Draw(image).text((16, 16), character, fill=255, font=font, anchor="mm")
    image = np.asarray(image.rotate(generator.uniform(-15, 15))) / 255
    return (image + generator.normal(0, 0.08, image.shape)).clip(0, 1)


def coloured(digit, generator):
    """A digit uint8 [28, 28] in a light colour on a dark textured ground: float [28, 28, 3] in [0, 1]."""
    ink, ground = generator.uniform(0.5, 1, 3), generator.uniform(0, 0.5, 3)
    texture = Image.fromarray(generator.integers(150, 256, (7, 7, 3), dtype=np.uint8)).resize((28, 28))
    opacity = digit[..., None] / 255
    return opacity * ink + (1 - opacity) * ground * np.asarray(texture) / 255


def write(folder, images):
    """Float images in [0, 1] as folder/NUMBER.png."""
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray((255 * image).round().astype(np.uint8)).save(folder / f"{number}.png")


def main(root):
    from sklearn.datasets import load_digits
    generator, data = np.random.default_rng(0), caps.load_data("mnist5k")
    for split, each in (("train", 100), ("test", 20)):
        for character in string.digits + string.ascii_letters:
            name = character + "_small" * character.islower()  # other folders where case does not tell them apart
            write(root / "glyphs62" / split / name, (glyph(character, generator) for _ in range(each)))
        images, labels = (getattr(data, f"{split}_{part}").numpy() for part in ("images", "labels"))
        for digit in range(10):
            write(root / "colour10" / split / str(digit), (coloured(image, generator) for image in images[labels == digit, 0]))
    digits = load_digits()
    images = digits.images / 16
    np.savez(root / "digits8.npz", x_train=images[:1400], y_train=digits.target[:1400], x_test=images[1400:],
             y_test=digits.target[1400:])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
