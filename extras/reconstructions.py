"""Pictures of what a decoder makes of capsules: test images and their reconstructions, and capsules' dimensions."""

import numpy as np
import torch.nn.functional as F

from caps import squared_errors, to_float
from caps.extras.decoding import STEPS, decode, move_dimensions
from caps.extras.figures import new_figure, pixels, shown
from caps.extras.runs import DECODED_FILES, write_atomically

MOST = 10  # images of a row, and classes whose dimensions are drawn


def plot_results(model, images, scores, labels, classes, title, folder, amp="off"):
    """DECODED_FILES of uint8 test images [n, C, H, W] with class scores [n, J]: of each class the first that is right, of the
    errors some, evenly over the test set."""
    predicted, right = scores.argmax(1), []
    for c in spread(labels[predicted == labels].unique(), MOST):
        right += ((labels == c) & (predicted == c)).nonzero()[:1].flatten().tolist()
    wrong = (predicted != labels).nonzero().flatten()
    errors = spread(wrong, MOST).tolist()
    rows = [(right, {"decoded": predicted}), (errors, {"true capsule": labels, "predicted capsule": predicted})]
    plot_reconstructions(model, images, labels, [row for row in rows if row[0]], classes,
                         f"{title}: recognised test images and {len(errors)} of {len(wrong):,} errors, above what is decoded "
                         "of them (capsule: sum of squared errors)", folder / DECODED_FILES[0], amp)
    plot_dimensions(model, to_float(images[right]), classes,
                    f"{title}: test images decoded with one dimension\nof their capsule moved, those that change the image "
                    "most first", folder / DECODED_FILES[1], amp)


def spread(items, most):
    """At most so many items of a vector, evenly over it."""
    return items[np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)]


def plot_reconstructions(model, images, labels, rows, classes, title, path, amp):
    """`rows`: numbers of images [n, C, H, W], and of which capsules they are decoded below: the row's name and classes [n].
    """
    height = sum(1 + len(capsules) for _, capsules in rows)
    figure, axes = new_figure(11, 0.5 + 1.3 * height, columns=MOST, rows=max(1, height))
    for axis in axes:
        axis.set_axis_off()
    for chosen, capsules in rows:
        given = to_float(images[chosen])
        draw_row(axes, "image", given, [shown(classes[labels[i]], 12) for i in chosen])
        for name, which in capsules.items():
            axes = axes[MOST:]
            _, decoded = decode(model, given, which[chosen], amp)
            errors = squared_errors(decoded, given).tolist()
            draw_row(axes, name, decoded, [f"{shown(classes[which[i]], 10)}: {error:.0f}" for i, error in zip(chosen, errors)])
        axes = axes[MOST:]
    figure.suptitle(title, fontsize=10)
    write_atomically(path, figure.savefig)


def draw_row(axes, name, images, titles):
    axes[0].text(-0.06, 0.5, name, fontsize=8, rotation=90, ha="right", va="center", transform=axes[0].transAxes)
    for axis, image, title in zip(axes, images, titles):
        axis.imshow(pixels(image), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8)


def plot_dimensions(model, images, classes, title, path, amp):
    """`draw_dimensions` of each image [n, C, H, W] in [0, 1]."""
    columns = min(5, max(1, len(images)))
    rows = max(1, -(-len(images) // columns))
    figure, axes = new_figure(max(6, 3.1 * columns), 0.6 + 3.8 * rows, columns, rows)
    for axis in axes[len(images):]:
        axis.set_axis_off()
    for axis, image in zip(axes, images):
        draw_dimensions(axis, model, image, classes, amp)
    figure.suptitle(title, fontsize=10)
    write_atomically(path, figure.savefig)


def draw_dimensions(axis, model, image, classes, amp="off"):
    """What the longest capsule of an image [C, H, W] is decoded to: a row for each dimension, a column for each step."""
    which, order, distance, decoded = move_dimensions(model, image, amp)
    sheet = F.pad(decoded, (0, 1, 0, 1), value=1.0)              # [D, steps, C, H + 1, W + 1], a white line between
    height, width = sheet.shape[3:]
    axis.imshow(pixels(sheet.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)), cmap="gray", vmin=0, vmax=1)
    axis.set_yticks(height * (np.arange(len(order)) + 0.5), [f"{d}: {x:.3f}" for d, x in zip(order, distance)], fontsize=7)
    axis.set_xticks(width * (np.arange(len(STEPS))[::5] + 0.5), [f"{step:+.2f}" for step in STEPS[::5]], fontsize=7)
    axis.set_title(f"class {shown(classes[which])}", fontsize=9)
    axis.set_xlabel("added to the dimension", fontsize=7)
    axis.set_ylabel("dimension: RMS change of pixels", fontsize=7)
    axis.grid(False)
