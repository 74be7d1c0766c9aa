"""What a trained network knows beyond its class: orientation, read from its capsules, and robustness to distortions."""

import numpy as np
import torch

from caps import EVALUATION_BATCH, World, autocast, class_scores, lengths, move, progress, to_float
from caps.extras.figures import legend_below, new_figure, shown
from caps.extras.runs import write_atomically

DISTORTIONS = {"rotation (degrees)": range(0, 61, 10), "shift (pixels)": range(7),
               "noise (standard deviation)": (0, 0.1, 0.2, 0.3, 0.4, 0.5)}


def distort(images, kind, level):
    """uint8 [n, C, H, W] -> the same, rotated or shifted sideways or made noisy by `level`, a number or one each."""
    if kind.startswith("noise"):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
        return (images + 255 * level * noise).clamp(0, 255).round().byte()
    column, unit = (0, np.pi / 180) if kind.startswith("rotation") else (1, 2 / images.shape[3])
    motion = torch.zeros(len(images), 3, device=images.device)
    motion[:, column] = level * unit
    return move(to_float(images), motion).mul(255).round().byte()


@torch.no_grad()
def orientation(model, images, labels, amp):
    """Rotate images [n, C, H, W] by angles in ±30° and fit these from what the model says of the images that it still
    recognises: (angles [m], winning capsules [m, 16], labels [m], {kind of features: fit_angles' result})."""
    angles = 60 * torch.rand(len(images), generator=torch.Generator().manual_seed(0)) - 30
    angles, parts = angles.to(images.device), []
    model.eval()
    for batch in progress("orientation", torch.arange(len(images)).split(EVALUATION_BATCH)):
        angle, label = angles[batch], labels[batch]
        with autocast(images.device, amp):
            primary = model.primary(model.backbone(to_float(distort(images[batch], "rotation", angle))))
            digits = model.digits(primary).float()
        right = lengths(digits).argmax(1) == label
        parts.append((angle[right], digits[right, label[right]], label[right], primary[right].flatten(1).float()))
    angles, capsules, labels, primary = (torch.cat(part).cpu().numpy() for part in zip(*parts))
    features = {"16 numbers of the winning capsule": capsules,
                "its length": np.linalg.norm(capsules, axis=1, keepdims=True),
                f"{primary.shape[1]:,} numbers of the primary capsules": primary}
    return angles, capsules, labels, {kind: fit_angles(x, angles, labels, digits.shape[1]) for kind, x in features.items()}


def fit_angles(features, angles, labels, classes):
    """R² and mean error in degrees [2, J] of a ridge regression for each class from features [n, F] to angles [n],
    fitted to every other image, its penalty chosen there by leave-one-out, and scored on the rest."""
    from sklearn import linear_model, metrics, pipeline, preprocessing
    found = np.full((2, classes), np.nan)
    for c in np.flatnonzero(np.bincount(labels) >= 6):
        x, y = features[labels == c].astype(np.float64), angles[labels == c]
        ridge = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.RidgeCV(np.logspace(-3, 5, 17)))
        guess = ridge.fit(x[::2], y[::2]).predict(x[1::2]).clip(-30, 30)
        found[:, c] = metrics.r2_score(y[1::2], guess), metrics.mean_absolute_error(y[1::2], guess)
    return found


def plot_orientation(results, path, classes, most=3):
    """The capsule dimensions of one class that vary most with the angle: of the third, or where few of its images are
    recognised, of that with the most. `results` maps titles to orientation's, `classes` to the classes' names."""
    figure, axes = new_figure(11, 3.2 * len(results), columns=most, rows=len(results))
    for row, (title, (angles, capsules, labels, _)) in enumerate(results.items()):
        counts = np.bincount(labels, minlength=3)
        digit = 2 if counts[2] > 5 else counts.argmax()
        x, values = angles[labels == digit], capsules[labels == digit]
        r = [np.corrcoef(x, dimension)[0, 1] for dimension in values.T]
        for place, d in enumerate(np.argsort(-np.abs(r))[:most]):
            axis = axes[row * most + place]
            axis.scatter(x, values[:, d], s=9, color=f"C{row}")
            axis.set(xlabel="rotation (degrees)", ylabel=f"capsule dimension {d}")
            heading = f"{title}\n" * (place == most // 2)  # over the middle one, for it may be long
            axis.set_title(f"{heading}class {shown(classes[title][digit])}: r = {r[d]:.2f}", fontsize=9)
    write_atomically(path, figure.savefig)


def robustness(model, images, scores, labels, amp):
    """{kind: accuracies at its levels} of images turned or shifted to either side in turn, or with noise; `scores`
    [n, J] are those at level 0, of the images as they are."""
    side = 1 - 2 * (torch.arange(len(images), device=images.device) % 2)
    found = {kind: [scores] for kind in DISTORTIONS}
    for kind, level in progress("robustness", [(kind, n) for kind in DISTORTIONS for n in DISTORTIONS[kind][1:]]):
        distorted = distort(images, kind, level if kind.startswith("noise") else level * side)
        found[kind].append(class_scores(model, distorted, World(0, 1, images.device), amp))
    return {kind: [(s.argmax(1) == labels).double().mean().item() for s in found[kind]] for kind in found}


def plot_robustness(results, path):
    """Accuracy against each distortion; `results` maps titles to robustness's."""
    figure, axes = new_figure(12, 3.8, columns=len(DISTORTIONS))
    for axis, (kind, levels) in zip(axes, DISTORTIONS.items()):
        for title, found in results.items():
            axis.plot(levels, 100 * np.array(found[kind]), marker=".", label=title)
        axis.set(xlabel=kind, ylabel="accuracy (%)", ylim=(0, 102))
    legend_below(figure, axes[0])
    write_atomically(path, figure.savefig)
