"""From a picture, as people photograph, scan and draw digits, to each digit as MNIST has it.

    pixels    any mode of Pillow -> one channel, the direction of colour in which ink and paper differ most
    ground    paper or board under its light: a median wider than strokes, which keeps the edges of shadows
    ink       what lies outside of the ground, darker or lighter, whichever makes the stronger marks
    marks     connected ink, without frames, ruled lines, borders and dirt; what belongs together is a figure
    framing   strokes of MNIST's width, 20×20 pixels, the centre of mass in the middle (LeCun et al., 1998); or 24×24
              pixels, the box in the middle, as EMNIST (Cohen et al., 2017)

Pixels are float32, mostly in [0, 1]; boxes are (left, top, right, bottom).
"""
import dataclasses
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps
from scipy import ndimage

LARGEST = 128e6        # pixels of a picture; of more, decoding alone takes many seconds and gigabytes
SMALLEST = 8           # pixels of the shorter side at least
WORKING = 1000         # pixels of the longer side at which ink is looked for: half a second for any photograph
ENLARGED = 112         # pixels of the shorter side at least: below, strokes are too few pixels wide for their edges
COARSE = 128           # pixels of the shorter side at which the ground is looked for
WINDOWS = 0.45, 0.9    # of the shorter side: the median's window, and that for strokes too thick for it
CONTRAST = 0.06        # of the full scale: fainter marks are none
MARKS = 500            # more are a texture
TEXTURE = 4, 0.08      # of the other sign's ink to ink's own, on a wide ground and on a close one: more is a texture
FAINT = 0.05           # of the strongest figure's ink, cubed: less is a shadow or the edge of a sheet
SIDE = 80              # pixels of a figure's longer side at which its strokes are made wider or narrower
STROKE = 2.6, 3.3      # pixels of MNIST that strokes are at least and at most made wide
FRAMES = {"mnist": 20, "emnist": 24}  # pixels of a figure's longer side among 28


@dataclasses.dataclass
class Figure:
    """What may be a digit: its box in pixels of the upright picture, float32 [28, 28] in [0, 1], white on black,
    the width of its strokes as a share of its longer side (0: taken as it is), and its row of the picture."""
    box: tuple
    image: np.ndarray
    stroke: float = 0.0
    row: int = 0


@dataclasses.dataclass
class Picture:
    """A picture that was read: its upright (width, height), its figures in the order of reading, why it has none
    ("blank", "texture" or "small"), and how many pages the file has, of which it is the first."""
    size: tuple
    figures: list
    remark: str = ""
    pages: int = 1


def read_picture(path, invert=False, framing="mnist"):
    """The figures in an image file, framed as in the set `framing` of FRAMES. `invert` says that they are darker than
    their ground; else that is found out.

    Raises what Pillow raises, and ValueError for more than LARGEST pixels. A 28×28 image whose border is black, or
    white, is taken as it is, or inverted.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # LARGEST is the limit; Pillow's error remains
        file = Image.open(path)
    with file:
        if file.width * file.height > LARGEST:
            raise ValueError(f"{file.width}×{file.height} pixels, more than {LARGEST / 1e6:.0f} million")
        turned = file.getexif().get(ExifTags.Base.Orientation, 1) > 4
        size = file.size[::-1] if turned else file.size
        pages = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # a phone's second picture is the same
        file.draft(None, (WORKING, WORKING))  # JPEG: decoded at a fraction of its size
        pixels = one_channel(opaque(ImageOps.exif_transpose(file)))
    if pixels.shape == (28, 28):
        level = np.median(border(pixels))
        if np.ptp(pixels) > 0.1 and (level < 0.1 and not invert or level > 0.9):
            return Picture(size, [Figure((0, 0, *size), 1 - pixels if level > 0.9 else pixels)], pages=pages)
    margin, framed = with_margin(pixels)
    figures, remark = find(framed, (-1,) if invert else (1, -1), framing)
    scale = max(size) / max(pixels.shape)
    for figure in figures:
        figure.box = tuple(min(max(round((side - margin) * scale), 0), end) for side, end in zip(figure.box, size * 2))
    return Picture(size, in_order(figures), remark, pages)


def in_order(figures):
    """Figures row by row, from left to right: who overlaps the last of a row by half its height continues it."""
    rows = []
    for figure in sorted(figures, key=lambda f: f.box[0]):
        _, top, _, bottom = figure.box
        for row in rows:
            _, above, _, below = row[-1].box
            if min(bottom, below) - max(top, above) > 0.5 * min(bottom - top, below - above):
                row.append(figure)
                break
        else:
            rows.append([figure])
    rows.sort(key=lambda row: np.mean([f.box[1] + f.box[3] for f in row]))
    for number, row in enumerate(rows):
        for figure in row:
            figure.row = number
    return [figure for row in rows for figure in row]


# --------------------------------------------------------------------------------------------------------------- pixels

def opaque(image):
    """A Pillow image of any mode -> float32 [H, W, C] in [0, 1], C = 1 or 3, of WORKING pixels at most."""
    if image.mode[0] in "IF":  # 16 and 32 bits, of which 8, 10, 12, 14 may be in use
        grey = np.asarray(image).astype(np.float32)
        grey = np.nan_to_num(grey, nan=0, posinf=0, neginf=0)
        grey -= min(grey.min(), 0)
        scales = [1] * (image.mode == "F") + [2 ** bits - 1 for bits in (8, 10, 12, 14, 16)]
        grey /= next((scale for scale in scales if grey.max() <= scale), grey.max())
        image = Image.fromarray(grey)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    else:
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    image.thumbnail((WORKING, WORKING), Image.Resampling.BOX)
    pixels = np.atleast_3d(np.asarray(image, np.float32)) / (1 if image.mode == "F" else 255)
    return on_ground(pixels[..., :3], pixels[..., 3]) if image.mode == "RGBA" else pixels


def on_ground(colours, opacity):
    """Colours [H, W, 3] of opacity [H, W] on the paper that they show, if they are a page, else on black or white,
    whichever the strokes are not."""
    if opacity.max() < 0.1:
        return np.zeros_like(colours)
    opacity = opacity / opacity.max()
    seen = opacity > 0.5
    filled = seen[extent_of(seen)].mean()
    page = filled > 0.6 and colours[seen].std(0).max() > 0.05
    ground = np.median(colours[seen], 0) if page else float(colours[seen].mean() < 0.5)
    return colours * opacity[..., None] + (1 - opacity[..., None]) * ground


def one_channel(pixels):
    """[H, W, C] -> [H, W]: along the colour in which strokes differ most from their ground, as grey where none do."""
    if pixels.shape[2] == 1:
        return pixels[..., 0]
    small = smaller(pixels.shape[:2], 64)
    coarse = [resized(channel, small, Image.Resampling.BOX) for channel in pixels.transpose(2, 0, 1)]
    rest = np.stack([channel - median(channel, WINDOWS[0]) for channel in coarse], -1).reshape(-1, 3)
    values, vectors = np.linalg.eigh((rest * np.square(rest).sum(1, keepdims=True)).T @ rest)  # strong ones count more
    axis = (vectors[:, -1] if values[-1] > 1e-6 else np.ones(3)).astype(np.float32)
    axis *= (np.sign(axis.sum()) or 1) / np.abs(axis).sum()
    return pixels @ axis - axis.clip(max=0).sum()  # in [0, 1]


def resized(channel, shape, how=Image.Resampling.BILINEAR):
    """[H, W] resampled to another shape."""
    return np.asarray(Image.fromarray(channel).resize(shape[::-1], how))


def extent_of(mask):
    """The slices of rows and columns that hold all of a mask [H, W]."""
    return tuple(slice(held[0], held[-1] + 1) for held in (np.flatnonzero(mask.any(axis)) for axis in (1, 0)))


def border(grey):
    """The pixels along the border of a picture [H, W]."""
    return np.concatenate([grey[[0, -1]].ravel(), grey[1:-1, [0, -1]].ravel()])


def smaller(shape, side):
    """A shape whose shorter side is `side`, if that makes it smaller."""
    scale = min(1, side / min(shape))
    return tuple(max(1, round(length * scale)) for length in shape)


def with_margin(grey):
    """(its width, the picture with a margin of its ground), where strokes on a plain ground reach the border: a digit
    cut out closely. The median would take it for the ground."""
    level = np.median(border(grey))
    away = np.abs(grey - level)
    ink, edge = away > 0.2, border(away)
    if edge.max() <= 0.2 or np.mean(edge < 0.05) < 0.5 or np.mean(away < 0.05) <= 0.25 or without_lines(ink)[1].any():
        return 0, grey
    coarse = resized(ink.astype(np.float32), smaller(grey.shape, COARSE), Image.Resampling.BOX) > 0.5
    if ndimage.distance_transform_edt(coarse).max() > 0.15 * max(coarse.shape):  # a shadow, a table
        return 0, grey
    margin = max(grey.shape) // 3
    return margin, np.pad(grey, margin, constant_values=level)


# --------------------------------------------------------------------------------------------------------------- ground

def median(grey, window):
    """The median along rows and then along columns, in a window of that share of the shorter side. It takes out what is
    narrower than half its window, and leaves edges and slopes of light where they are."""
    length = round(window * min(grey.shape)) | 1
    light = slope(grey)  # at the border a reflected slope would be a ridge
    grey = grey - light
    for size in ((1, length), (length, 1)):
        grey = ndimage.median_filter(grey, size, mode="reflect")
    return grey + light


def slope(grey):
    """The quadratic surface through most of a picture [H, W], by least squares in which outliers count less and less; 0
    where there is none: a sheet on a table, a shadow."""
    y, x = (axis / max(grey.shape) - 0.5 for axis in np.indices(grey.shape, np.float32))
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1).reshape(-1, 6)
    values, weight = grey.ravel(), np.ones(grey.size, np.float32)
    for _ in range(4):
        fit = np.linalg.lstsq(terms.T @ (terms * weight[:, None]), terms.T @ (weight * values))[0]
        rest = np.abs(values - terms @ fit)
        weight = 1 / (1 + np.square(rest / (np.median(rest) + 0.01)))
    return (terms @ fit).reshape(grey.shape).astype(np.float32) * np.float32(np.median(rest) < 0.03)


def bounds(level, shape):
    """The darkest and the lightest ground about each pixel, [H, W]: an edge of a shadow lies between them."""
    return [resized(extreme(level, 5), shape) for extreme in (ndimage.minimum_filter, ndimage.maximum_filter)]


def find(grey, signs, framing, on_sheet=False):
    """[H, W] -> (figures, with boxes in pixels of `grey`; a remark where there are none). `signs`: of ink lighter (1) and
    darker (-1) than its ground. `on_sheet`: `grey` is the inside of a sheet that was found."""
    if min(grey.shape) < SMALLEST:
        return [], "small"
    noise = 1.05 * np.median(np.abs(grey[1:, 1:] - grey[:-1, :-1]))  # its deviation, where most of the picture is plain
    factor = -(-ENLARGED // min(grey.shape))
    shape = tuple(length * factor for length in grey.shape)
    enlarged = resized(grey, shape, Image.Resampling.BICUBIC).clip(grey.min(), grey.max()) if factor > 1 else grey
    blur = 0.7 if noise < 0.01 else 1.0 if noise < 0.05 else 1.5
    smooth = ndimage.gaussian_filter(enlarged, blur)
    noise *= 0.8 if factor > 1 else 0.28 / blur
    coarse = resized(enlarged, smaller(shape, COARSE), Image.Resampling.BOX)

    def marks(level, signs):
        darkest, lightest = bounds(level, shape)
        rest = smooth - smooth.clip(darkest, lightest)
        return sorted((Marks((sign * rest).clip(0), darkest if sign < 0 else None, noise) for sign in signs),
                      key=lambda marks: marks.energy)

    *others, best = marks(median(coarse, WINDOWS[0]), signs)
    texture = any(other.total > TEXTURE[0] * best.total for other in others)
    *_, thick = marks(median(coarse, WINDOWS[1]), (-1 if best.dark else 1,) if best.figures else signs)
    if thick.energy > 1.1 * best.energy and thick.replaces(best):
        best = thick
    if best.figures:  # the ground again, without the ink and in a narrow window, close to the edges of shadows
        ink = np.isin(best.labels, sum(best.figures, [])).astype(np.float32)
        covered = ndimage.binary_dilation(resized(ink, coarse.shape, Image.Resampling.BOX) > 0.02, iterations=2)
        nearest = ndimage.distance_transform_edt(covered, return_distances=False, return_indices=True)
        close = marks(median(coarse[tuple(nearest)], 0.1), (1, -1))
        again, other = sorted(close, key=lambda marks: marks.dark != best.dark)
        texture |= other.total > TEXTURE[1] * again.total
        best = again if again.figures else best
    if texture and not on_sheet:
        return [], "texture"
    figures = []
    for parts in best.figures:
        box = np.array(best.box(parts)) / factor
        held = inside(grey, box, framing) if not on_sheet and best.is_sheet(parts) else []
        figures += held or [Figure(tuple(box), *frame(*best.cut(parts), framing))]
    return figures, best.remark


def inside(grey, box, framing):
    """The figures on a mark that is a sheet of paper, a label or a sign: a large rectangle with marks of its own."""
    left, top, right, bottom = (round(side) for side in box)
    rim = min(right - left, bottom - top) // 12
    if rim < 4:
        return []
    part = grey[top + rim:bottom - rim, left + rim:right - rim]
    figures, _ = find(part, (1, -1), framing, on_sheet=True)
    if any(extent(f.box) < 0.2 * min(part.shape) or min(f.box[2] - f.box[0], f.box[3] - f.box[1]) < 3 for f in figures):
        return []
    move = np.array([left + rim, top + rim] * 2)
    return [Figure(tuple(f.box + move), f.image, f.stroke) for f in figures]


# ---------------------------------------------------------------------------------------------------------------- marks

class Marks:
    """The connected marks in a picture's ink [H, W] >= 0, and figures, lists of marks that belong together.

    labels [H, W]: the number of each pixel's mark, 0 for none; boxes: of the marks that are kept, by number.
    """

    def __init__(self, rest, ground, noise):
        """`rest` [H, W] is ink's difference from its ground, >= 0; `ground` [H, W] is given for dark ink, which takes a
        share of the light there; `noise` is the deviation of grey on plain paper."""
        self.dark, self.remark, self.boxes, self.figures = ground is not None, "", {}, []
        ink = self.ink = rest / (ground + 0.02) if self.dark else rest
        noise = noise / np.median(ground + 0.02) if self.dark else noise
        self.energy = self.total = 0
        seen = ink > max(3 * noise, CONTRAST / 2)
        if not seen.any():
            self.remark = "blank"
            return
        self.total = float(np.square(rest[seen]).sum())  # in grey, for both signs alike
        strong = np.sort(ink[seen])
        square = np.cumsum(np.square(strong, dtype=np.float64))
        contrast = strong[np.searchsorted(square, square[-1] / 2)]  # half of all ink is stronger
        mask, lines = without_lines(ink > max(contrast / 2, 5 * noise, CONTRAST))
        self.labels, count = ndimage.label(mask, np.ones((3, 3)))
        area = np.bincount(self.labels.ravel(), minlength=count + 1)
        area[0] = 0
        slices = ndimage.find_objects(self.labels)
        numbers = [i for i in np.argsort(-area) if area[i] > 5]
        if len(numbers) > MARKS:
            self.remark = "texture"
            return
        for i in numbers:
            rows, columns = slices[i - 1]
            box = columns.start, rows.start, columns.stop, rows.stop
            if not between(box, lines):
                self.boxes[i] = box
        self.drop_borders()
        self.boxes = {i: box for i, box in self.boxes.items() if not self.is_frame(i)}
        self.group()
        cubes = ndimage.sum_labels(np.power(rest, 3), self.labels, np.arange(count + 1))
        powers = [cubes[figure].sum() for figure in self.figures]
        self.figures = [figure for figure, power in zip(self.figures, powers) if power > FAINT * max(powers)]
        self.energy = sum(powers)
        self.remark = "" if self.figures else "blank"

    def drop_borders(self):
        """Without what runs along the picture's border, a frame or a table, and what is small in a corner; nor, where
        others remain, with strips on the border."""
        h, w = self.ink.shape
        borders = self.labels[:, 0], self.labels[0], self.labels[:, -1], self.labels[-1]
        free, large = {}, {}
        for i, box in self.boxes.items():
            left, top, right, bottom = box
            at = [np.count_nonzero(border == i) * (place == end)
                  for border, place, end in zip(borders, box, (0, 0, w, h))]
            if max(at[0], at[2]) >= 0.4 * h or max(at[1], at[3]) >= 0.4 * w:
                continue
            upright, level = max(at[0], at[2]) / (bottom - top), max(at[1], at[3]) / (right - left)  # shares
            strip = (level > 0.6 and right - left > 1.5 * (bottom - top)
                     or upright > 0.6 and bottom - top > 1.5 * (right - left))
            if np.count_nonzero(at) < 2 or extent(box) > 0.25 * max(h, w):  # too little is seen of others
                large[i] = box
                if not strip:
                    free[i] = box
        self.boxes = free if any(extent(box) > 0.08 * max(h, w) for box in free.values()) else large

    def is_frame(self, i):
        """Whether a mark runs along at least three sides of its box, and others lie in it."""
        left, top, right, bottom = self.boxes[i]
        h, w = bottom - top, right - left
        if not any(left < b[0] and top < b[1] and b[2] < right and b[3] < bottom and b[3] - b[1] > 0.15 * h
                   for b in self.boxes.values()):
            return False
        own = self.labels[top:bottom, left:right] == i
        m, n = max(1, h // 12), max(1, w // 12)
        sides = own[:m].any(0), own[-m:].any(0), own[:, :n].any(1), own[:, -n:].any(1)
        return sorted(side.mean() for side in sides)[1] > 0.8

    def group(self):
        """Figures of the marks: small ones join what they are close to, and are dirt where they are alone."""
        boxes = dict(sorted(self.boxes.items(), key=lambda item: -extent(item[1])))
        largest = max(map(extent, boxes.values()), default=0)
        if largest < max(8, 0.012 * min(self.ink.shape)):
            return
        for i, box in boxes.items():
            size = extent(box) / largest
            bar = box[3] - box[1] < 0.5 * largest and any(  # as a 5's, not joined to it
                share_columns(box, boxes[figure[0]]) for figure in self.figures)
            gaps = [min(gap(box, boxes[j]) for j in figure) for figure in self.figures if size < 0.5 or bar]
            if gaps and min(gaps) < (0.15 if size > 0.12 else 0.08) * largest:
                self.figures[int(np.argmin(gaps))].append(i)
            elif size > 0.3:
                self.figures.append([i])

    def replaces(self, others):
        """Whether these marks, on a smoother ground, are the same figures as others, more of each, and no shadows."""
        h, w = self.ink.shape
        boxes = [self.box(figure) for figure in self.figures]
        return not others.figures or len(boxes) <= len(others.figures) and all(
            left > 0 and top > 0 and right < w and bottom < h for left, top, right, bottom in boxes)

    def box(self, figure):
        boxes = np.array([self.boxes[i] for i in figure])
        return (*boxes[:, :2].min(0), *boxes[:, 2:].max(0))

    def is_sheet(self, figure):
        """Whether a figure without its holes is a rectangle, upright or turned."""
        left, top, right, bottom = self.box(figure)
        own = np.isin(self.labels[top:bottom, left:right], figure)
        if own.mean() < 0.4 or ndimage.distance_transform_edt(np.pad(own, 1)).max() < 0.24 * min(own.shape):  # strokes
            return False
        whole = ndimage.binary_fill_holes(own)
        y, x = np.nonzero(whole & ~ndimage.binary_erosion(whole))
        angles = np.deg2rad(np.arange(0, 90, 3))[:, None]
        sides = [np.ptp(x * np.cos(turn) + y * np.sin(turn), axis=1) + 1 for turn in (angles, angles + np.pi / 2)]
        return whole.sum() > 0.88 * (sides[0] * sides[1]).min()

    def cut(self, figure):
        """A figure's own ink [h, w], with a rim: 1 in its strokes, 0 outside; and its extent in pixels."""
        left, top, right, bottom = box = self.box(figure)
        size = extent(box)
        rim = 3 + size // 20
        part = slice(max(0, top - rim), bottom + rim), slice(max(0, left - rim), right + rim)
        labels = self.labels[part]
        own = np.isin(labels, figure)
        near = ndimage.binary_dilation(own, iterations=rim) & (own | (labels == 0))
        strength = np.quantile(self.ink[part][own], 0.9)
        return np.where(near, self.ink[part] / strength, 0).clip(0, 1), size


def extent(box):
    return max(box[2] - box[0], box[3] - box[1])


def gap(a, b):
    """Pixels between two boxes; 0 where they touch or overlap."""
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3], 0)


def share_columns(a, b):
    """Whether two boxes share half of the narrower one's columns."""
    return min(a[2], b[2]) - max(a[0], b[0]) > 0.5 * min(a[2] - a[0], b[2] - b[0])


def without_lines(mask):
    """A mask without thin straight lines from border to border, and these lines; strokes that cross them are kept."""
    lines = np.zeros_like(mask)
    for found, ink in ((lines, mask), (lines.T, mask.T)):
        h, w = ink.shape
        ruled = np.flatnonzero(np.diff(ink[:, w // 50:-(w // 50) or None].mean(1) > 0.97, prepend=False, append=False))
        for first, end in zip(ruled[::2], ruled[1::2]):
            width = end - first
            if width <= max(3, 0.03 * h) and 0 < first and end < h:
                first, end = max(1, first - 1), min(h - 1, end + 1)  # its pale edges
                above, below = ink[max(0, first - 1 - width):first].any(0), ink[end:end + 1 + width].any(0)
                found[first:end] |= ~(above & below)
    return mask & ~lines, lines


def between(box, lines):
    """Whether a thin mark spans from one line to the next: the rest of a grid."""
    left, top, right, bottom = box
    upright = 10 * (right - left) < bottom - top
    level = 10 * (bottom - top) < right - left
    above, below = lines[max(0, top - 2):top + 1, left:right], lines[bottom - 1:bottom + 2, left:right]
    before, after = lines[top:bottom, max(0, left - 2):left + 1], lines[top:bottom, right - 1:right + 2]
    return bool(upright and above.any() and below.any() or level and before.any() and after.any())


# -------------------------------------------------------------------------------------------------------------- framing

def frame(ink, size, framing):
    """A figure's ink [h, w] in [0, 1], of `size` pixels without its rim -> float32 [28, 28] as MNIST has digits, or
    EMNIST characters, and the width of its strokes as a share of `size`."""
    scale = SIDE / size
    shape = tuple(max(1, round(length * scale)) for length in ink.shape)
    ink = np.pad(resized(ink, shape, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC), SIDE // 8)
    mask = ink > min(0.5, ink.max() / 2)
    depth = ndimage.distance_transform_edt(mask)
    distance = np.where(mask, depth - 0.5, 0.5 - ndimage.distance_transform_edt(~mask))  # to the edge, > 0 inside
    width = 4 * depth[mask].mean() - 1          # of a long stroke, whose pixels are width / 4 deep in the mean
    wanted = np.clip(width, *(SIDE / FRAMES[framing] * pixels for pixels in STROKE))
    grown = max((wanted - width) / 2, 1.5 - depth.max())  # on each side; something is left of it
    ink = (distance + grown + 0.5).clip(0, 1).astype(np.float32)
    ink = ink[extent_of(ink > 0.3)]
    shape = tuple(max(1, round(length * FRAMES[framing] / max(ink.shape))) for length in ink.shape)
    small = resized(ink, shape, Image.Resampling.BOX)
    image = np.zeros((28, 28), np.float32)
    place = []
    for axis, length in enumerate(small.shape):
        centre = small.sum(1 - axis) @ np.arange(length) / small.sum()
        start = min(max(round(14 - centre), 0), 28 - length)  # of all training images the mean is 14.00, counted from 0
        start = start if framing == "mnist" else (28 - length) // 2
        place.append(slice(start, start + length))
    image[tuple(place)] = small
    return image, float(width / SIDE)
