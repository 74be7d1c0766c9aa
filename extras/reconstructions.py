"""Pictures of what a decoder makes of capsules: test images and their reconstructions, and capsules' dimensions."""

import numpy as np
import torch.nn.functional as F

from caps import squared_errors, to_float
from caps.extras.decoding import STEPS, decode, move_dimensions
from caps.extras.figures import new_figure, pixels, shown
from caps.extras.runs import write_atomically

MOST = 10  # images of a row, and classes whose dimensions are drawn


def plot_results(model, images, scores, labels, classes, title, folder, amp="off"):
    """reconstructions.png and dimensions.png of uint8 test images [n, C, H, W] with class scores [n, J]: of each class
    the first that is right, of the errors some, evenly over the test set."""
    predicted, right = scores.argmax(1), []
    for c in spread(labels.unique(), MOST):
        right += ((labels == c) & (predicted == c)).nonzero()[:1].flatten().tolist()
    errors = (predicted != labels).nonzero().flatten()
    rows = [(right, [predicted]), (spread(errors, MOST).tolist(), [labels, predicted])]
    plot_reconstructions(model, images, labels, [row for row in rows if row[0]], classes,
                         f"{title}: test images that are recognised, and {len(errors):,} errors or some of these, each "
                         "above what its capsule is decoded to,\nwith the sum of squared differences; errors by the true, "
                         "then by the predicted capsule", folder / "reconstructions.png", amp)
    plot_dimensions(model, to_float(images[right]), classes,
                    f"{title}: each dimension of a digit capsule moved from -0.25 to 0.25, and how far it moves the image "
                    "(root mean square of pixels in [0, 1])", folder / "dimensions.png", amp)


def spread(items, most):
    """At most so many items of a vector, evenly over it."""
    return items[np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)]


def plot_reconstructions(model, images, labels, rows, classes, title, path, amp):
    """`rows`: numbers of images [n, C, H, W], and of which capsules they are decoded below, lists of classes [n]."""
    height = sum(1 + len(capsules) for _, capsules in rows)
    figure, axes = new_figure(11, 0.7 + 1.3 * height, columns=MOST, rows=max(1, height))
    for axis in axes:
        axis.set_axis_off()
    for chosen, capsules in rows:
        given = to_float(images[chosen])
        digits, _ = decode(model, given, amp)
        for axis, image, i in zip(axes, given, chosen):
            draw(axis, image, shown(classes[labels[i]], 12))
        for row, which in enumerate(capsules, 1):
            decoded = model.decoder(digits, which[chosen]).detach()
            for axis, image, i, error in zip(axes[row * MOST:], decoded, chosen, squared_errors(decoded, given).tolist()):
                draw(axis, image, f"by {shown(classes[which[i]], 10)}: {error:.0f}")
        axes = axes[(1 + len(capsules)) * MOST:]
    figure.suptitle(title, fontsize=10)
    write_atomically(path, figure.savefig)


def draw(axis, image, title):
    axis.imshow(pixels(image), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=8)


def plot_dimensions(model, images, classes, title, path, amp):
    """`draw_dimensions` of each image [n, C, H, W] in [0, 1]."""
    columns = min(5, max(1, len(images)))
    rows = max(1, -(-len(images) // columns))
    figure, axes = new_figure(max(6, 3 * columns), 0.6 + 3.7 * rows, columns, rows)
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
    axis.grid(False)
