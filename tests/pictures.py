"""Pictures of digits as people make them, out of images as MNIST has them; and pictures that hold no digit.

A kind is a function (digit float [28, 28] in [0, 1], random generator) -> PIL image. KINDS holds them by name.
"""
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

PAPER, INK = 0.95, 0.12  # reflectance
KINDS, NOTHING = {}, {}


def kind(function):
    KINDS[function.__name__.replace("_", " ")] = function
    return function


def nothing(function):
    """A kind without a digit: a function (random generator) -> PIL image."""
    NOTHING[function.__name__.replace("_", " ")] = function
    return function


def grey(image):
    return Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))


def colour(ink, paper, pen):
    """Ink in [0, 1] [H, W] drawn in the colour `pen` on the colour `paper`, both (r, g, b) in [0, 1] or [H, W, 3]."""
    ink = ink[..., None]
    return grey(ink * np.asarray(pen) + (1 - ink) * np.asarray(paper))


def place(digit, generator, size=(480, 640), height=None):
    """The digit's 28×28 square, enlarged, somewhere on an empty sheet [H, W] of ink in [0, 1]."""
    side = height or int(generator.uniform(0.4, 0.95) * min(size))
    big = Image.fromarray(np.asarray(digit, np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    sheet = np.zeros(size, np.float32)
    y, x = (int(generator.integers(0, max(1, whole - side + 1))) for whole in size)
    sheet[y:y + side, x:x + side] = np.asarray(big).clip(0, 1)
    return sheet


def paper_with(ink, paper=PAPER, pen=INK):
    return paper * (1 - ink) + pen * ink


def noise(shape, generator, deviation):
    return generator.normal(0, deviation, shape).astype(np.float32)


def ramp(shape, generator, low, high):
    """Light that falls from one side, [H, W] from low to high."""
    y, x = np.mgrid[-1:1:shape[0] * 1j, -1:1:shape[1] * 1j]
    angle = generator.uniform(0, 2 * np.pi)
    t = np.cos(angle) * x + np.sin(angle) * y
    return low + (high - low) * (t - t.min()) / (t.max() - t.min())


def clouds(shape, generator, scale, low, high):
    """Smooth random light or texture, [H, W] from low to high."""
    coarse = noise((max(2, int(shape[0] / scale)), max(2, int(shape[1] / scale))), generator, 1)
    t = np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))
    return low + (high - low) * (t - t.min()) / np.ptp(t)


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert(image.mode)


@kind
def scan(digit, generator):
    return grey(paper_with(place(digit, generator), 1, 0))


@kind
def cmyk_scan(digit, generator):
    return scan(digit, generator).convert("CMYK")


@kind
def one_bit_scan(digit, generator):
    return scan(digit, generator).convert("1", dither=Image.Dither.NONE)


@kind
def palette_scan(digit, generator):
    return scan(digit, generator).quantize(16)


@kind
def inverted_mnist(digit, generator):
    return grey(1 - digit)


@kind
def small_and_inverted(digit, generator):
    side = int(generator.integers(30, 70))
    return grey(1 - place(digit, generator, (side, side), int(generator.integers(26, side + 1))))


@kind
def black_on_transparent(digit, generator):
    ink = place(digit, generator)
    return grey(np.dstack([0 * ink, 0 * ink, 0 * ink, ink]))


@kind
def white_on_transparent(digit, generator):
    ink = place(digit, generator)
    return grey(np.dstack([1 + 0 * ink, 1 + 0 * ink, 1 + 0 * ink, ink]))


@kind
def blue_pen_on_yellowish_paper(digit, generator):
    return colour(place(digit, generator), (0.96, 0.93, 0.78), (0.15, 0.2, 0.6))


@kind
def red_on_green_of_equal_grey(digit, generator):
    return colour(place(digit, generator), (0.25, 0.62, 0.3), (0.85, 0.3, 0.3))


@kind
def grey_paper_with_noise(digit, generator):
    ink = place(digit, generator)
    return grey(paper_with(ink, 170 / 255, 0.2) + noise(ink.shape, generator, 0.03))


@kind
def noisy_28_pixels(digit, generator):
    return grey(paper_with(digit, 0.67, 0.2) + noise(digit.shape, generator, 0.03))


@kind
def lit_from_one_side(digit, generator):
    ink = place(digit, generator)
    light = ramp(ink.shape, generator, 120 / 255, 230 / 255)
    return grey(paper_with(ink, 1, 0.25) * light + noise(ink.shape, generator, 0.01))


@kind
def shadow_of_a_hand(digit, generator):
    ink = place(digit, generator)
    angle, offset = generator.uniform(0, 2 * np.pi), generator.uniform(-0.4, 0.4)
    y, x = np.mgrid[-1:1:480j, -1:1:640j]
    shade = (np.cos(angle) * x + np.sin(angle) * y + 0.15 * np.sin(5 * x + angle) > offset).astype(np.float32)
    shade = ndimage.gaussian_filter(shade, generator.uniform(2, 20))
    return grey(paper_with(ink, 0.9, 0.15) * (1 - 0.5 * shade) + noise(ink.shape, generator, 0.01))


@kind
def frame_around(digit, generator):
    ink = np.pad(place(digit, generator, (400, 560)), 40)
    inset, width = int(generator.integers(0, 20)), int(generator.integers(2, 14))
    frame = np.zeros_like(ink)
    frame[inset:480 - inset, inset:640 - inset] = 1
    frame[inset + width:480 - inset - width, inset + width:640 - inset - width] = 0
    return grey(paper_with(np.maximum(ink, frame)))


@kind
def chalk_on_a_blackboard(digit, generator):
    ink = place(digit, generator)
    board = clouds(ink.shape, generator, 60, 0.12, 0.3)
    chalk = ink * (0.75 + noise(ink.shape, generator, 0.12))
    board = np.dstack([board, board * 1.1, board]) + noise(ink.shape, generator, 0.02)[..., None]
    return colour(chalk.clip(0, 1), board, (0.9, 0.9, 0.88))


@kind
def pencil(digit, generator):
    ink = place(digit, generator)
    return grey(paper_with(ink, 0.97, generator.uniform(0.72, 0.85)) + noise(ink.shape, generator, 0.006))


@kind
def pencil_in_slanting_light(digit, generator):
    ink = place(digit, generator)
    return grey(paper_with(ink, 1, 0.7) * ramp(ink.shape, generator, 0.45, 0.95) + noise(ink.shape, generator, 0.008))


@kind
def lined_paper(digit, generator):
    ink = place(digit, generator)
    lines = np.zeros_like(ink)
    for y in range(int(generator.integers(0, 40)), 480, int(generator.integers(40, 90))):
        lines[y:y + 2] = 1
    paper = 0.95 - lines[..., None] * np.array([0.35, 0.25, 0.1])
    return colour(ink, paper, (0.1, 0.1, 0.35))


@kind
def squared_paper(digit, generator):
    ink, step = place(digit, generator), int(generator.integers(20, 60))
    lines = np.zeros_like(ink)
    lines[::step] = lines[1::step] = 1
    lines[:, ::step] = lines[:, 1::step] = 1
    return grey(paper_with(ink, 0.95 - 0.25 * lines) + noise(ink.shape, generator, 0.01))


@kind
def photographed_paper_on_a_table(digit, generator):
    h, w = 900, 1200
    ink = place(digit, generator, (420, 600))
    sheet = Image.fromarray((np.clip(paper_with(ink, 0.9, 0.15), 0, 1) * 255).astype(np.uint8)).convert("RGBA")
    sheet = sheet.rotate(generator.uniform(-6, 6), Image.Resampling.BICUBIC, expand=True)
    grain = clouds((h, w), generator, 25, 0, 1)[..., None] * 0.06 + np.array([0.45, 0.3, 0.18])
    table = grey(grain)
    table.paste(sheet, (int(generator.integers(100, 400)), int(generator.integers(80, 300))), sheet)
    lit = np.asarray(table) / 255 * ramp((h, w), generator, 0.7, 1)[..., None]
    return jpeg(grey(lit + noise((h, w, 3), generator, 0.015)), 80)


@kind
def blurred_dark_jpeg(digit, generator):
    ink = place(digit, generator, height=int(generator.uniform(150, 400)))
    y, x = np.mgrid[-1:1:480j, -1:1:640j]
    image = grey(paper_with(ink, 0.7, 0.12) * (1 - 0.35 * (x * x + y * y)))
    return jpeg(image.filter(ImageFilter.GaussianBlur(generator.uniform(1, 5))), 40)


@kind
def specks_of_dirt(digit, generator):
    ink = place(digit, generator)
    for _ in range(int(generator.integers(1, 6))):
        y, x = generator.integers(2, 470), generator.integers(2, 630)
        ink[y:y + int(generator.integers(2, 7)), x:x + int(generator.integers(2, 7))] = 1
    return grey(paper_with(ink))


def skeleton(mask):
    """The middle lines of a shape, one pixel wide (Zhang and Suen, 1984)."""
    mask = np.pad(mask, 1)
    while True:
        before = mask.copy()
        for late in (False, True):
            n, e, s, w = (np.roll(mask, step, axis) for axis, step in ((0, 1), (1, -1), (0, -1), (1, 1)))
            ring = [n, np.roll(n, -1, 1), e, np.roll(s, -1, 1), s, np.roll(s, 1, 1), w, np.roll(n, 1, 1)]
            count = sum(r.astype(int) for r in ring)
            rises = sum((~r & after).astype(int) for r, after in zip(ring, ring[1:] + ring[:1]))
            opened = ~(n & e & w) & ~(n & s & w) if late else ~(n & e & s) & ~(e & s & w)
            mask = mask & ~((2 <= count) & (count <= 6) & (rises == 1) & opened)
        if (mask == before).all():
            return mask[1:-1, 1:-1]


@kind
def thin_pen(digit, generator):
    """A line of 1 % of the digit's height, in white on black or the reverse."""
    small = Image.fromarray(np.asarray(digit, np.float32)).resize((84, 84), Image.Resampling.BICUBIC)
    middle = skeleton(np.asarray(small) > 0.45)
    sheet = Image.new("L", (1000, 1000), 255)
    draw, points = ImageDraw.Draw(sheet), {tuple(p) for p in np.argwhere(middle)}
    for y, x in points:
        for near in ((y, x + 1), (y + 1, x - 1), (y + 1, x), (y + 1, x + 1)):
            if near in points:
                draw.line([(x * 11 + 40, y * 11 + 40), (near[1] * 11 + 40, near[0] * 11 + 40)], 0, 7)
    return sheet


@kind
def thick_brush(digit, generator):
    ink = place(digit, generator, (400, 400), 300)
    return grey(1 - (ndimage.distance_transform_edt(ink < 0.5) < generator.uniform(4, 11)))


@kind
def canvas_of_a_browser(digit, generator):
    ink = place(digit, generator, (280, 280), int(generator.integers(90, 260)))
    return grey(np.dstack([0 * ink, 0 * ink, 0 * ink, (ink * 3 - 1).clip(0, 1)]))


@kind
def twelve_bits(digit, generator):
    return Image.fromarray(((1 - place(digit, generator)) * 4095).astype(np.uint16))


@kind
def floats(digit, generator):
    return Image.fromarray(1 - place(digit, generator))


@kind
def integers(digit, generator):
    return Image.fromarray((place(digit, generator) * 200).astype(np.int32))


@kind
def crumpled_paper(digit, generator):
    ink = place(digit, generator)
    light = clouds(ink.shape, generator, 100, 0.6, 1) * clouds(ink.shape, generator, 12, 0.93, 1)
    return grey(paper_with(ink, 0.95, 0.15) * light + noise(ink.shape, generator, 0.01))


@kind
def dry_pen(digit, generator):
    ink = place(digit, generator)
    return grey(paper_with(ink * (clouds(ink.shape, generator, 4, 0, 1) > 0.35), 0.95, 0.2))


@kind
def whiteboard_with_glare(digit, generator):
    ink = place(digit, generator)
    y, x = np.mgrid[-1:1:480j, -1:1:640j]
    cy, cx = generator.uniform(-1, 1, 2)
    glare = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) * generator.uniform(5, 20))
    return colour(ink, (0.72 + 0.28 * glare)[..., None] * np.ones(3), (0.2, 0.45, 0.25))


@kind
def sticker(digit, generator):
    """Dark on an opaque white label, transparent around it."""
    ink = place(digit, generator, (300, 300))
    sheet = np.zeros((480, 640, 2), np.float32)
    sheet[90:390, 170:470, 0] = 1 - ink
    sheet[90:390, 170:470, 1] = 1
    return Image.fromarray((sheet * 255).astype(np.uint8), "LA")


@nothing
def white_page(generator):
    return Image.new("L", (640, 480), 255)


@nothing
def black_page(generator):
    return Image.new("L", (28, 28))


@nothing
def transparent_page(generator):
    return Image.new("RGBA", (300, 300))


@nothing
def grey_page_with_noise(generator):
    return grey(0.67 + noise((480, 640), generator, 0.03))


@nothing
def lit_page(generator):
    return jpeg(grey(ramp((480, 640), generator, 0.47, 0.9) + noise((480, 640), generator, 0.01)), 70)


@nothing
def shaded_page(generator):
    return shadow_of_a_hand(np.zeros((28, 28)), generator)


@nothing
def blank_sixteen_bits(generator):
    return Image.fromarray(generator.integers(60000, 60400, (300, 400)).astype(np.uint16))


@nothing
def uniform_noise(generator):
    return grey(generator.random((480, 640)))


@nothing
def noise_of_28_pixels(generator):
    return grey(generator.random((28, 28)))


@nothing
def coloured_noise(generator):
    return grey(generator.random((120, 160, 3)))


@nothing
def clouds_of_ink(generator):
    return grey(clouds((480, 640), generator, float(generator.uniform(10, 100)), 0, 1))


@nothing
def stripes(generator):
    y, x = np.mgrid[:480, :640]
    angle = generator.uniform(0, np.pi)
    return grey(0.5 + 0.5 * np.sin((np.cos(angle) * x + np.sin(angle) * y) / generator.uniform(3, 20)))


@nothing
def checkerboard(generator):
    side = int(generator.integers(8, 80))
    y, x = np.mgrid[:480, :640]
    return grey(((y // side + x // side) % 2).astype(np.float32))


@nothing
def scribble(generator):
    image = Image.new("L", (400, 400), 255)
    points = generator.uniform(40, 360, (40, 2))
    ImageDraw.Draw(image).line([tuple(p) for p in points], fill=0, width=int(generator.integers(3, 14)))
    return image


def sample_photograph():
    from matplotlib import cbook
    return Image.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB")


@nothing
def face(generator):
    """Pieces of the photograph of a person that comes with matplotlib."""
    image = sample_photograph()
    side = int(generator.uniform(0.4, 1) * min(image.size))
    x, y = (int(generator.integers(0, whole - side + 1)) for whole in image.size)
    return image.crop((x, y, x + side, y + side))


@nothing
def landscape(generator):
    import sklearn
    folder = Path(sklearn.__file__).parent / "datasets/images"
    image = Image.open(folder / str(generator.choice(["china.jpg", "flower.jpg"])))
    side = int(generator.uniform(0.4, 1) * min(image.size))
    x, y = (int(generator.integers(0, whole - side + 1)) for whole in image.size)
    return image.crop((x, y, x + side, y + side))
