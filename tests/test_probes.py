"""What a network knows beyond its class: distorted images, angles fitted from capsules."""
import numpy as np
import pytest
import torch

import caps
from caps.extras import probes, report


def test_distortions(embedded):
    images = embedded.test_images[::50]
    for kind in probes.DISTORTIONS:
        assert torch.equal(probes.distort(images, kind, 0), images)
    shifted = probes.distort(images, "shift", 2)
    assert torch.equal(shifted[..., :-2], images[..., 2:]) and not shifted[..., -2:].any()
    assert torch.equal(probes.distort(images, "rotation", 90), images.rot90(1, (2, 3)))
    each = probes.distort(images[:2], "rotation", torch.tensor([0.0, 90.0]))
    assert torch.equal(each[0], images[0]) and torch.equal(each[1], images[1].rot90(1, (1, 2)))
    grey = torch.full((50, 1, 28, 28), 127, dtype=torch.uint8)
    assert probes.distort(grey, "noise", 0.1).float().std().item() == pytest.approx(25.5, rel=0.02)


def test_robustness_starts_at_the_plain_accuracy(trained, embedded):
    run = report.read_run(trained)
    images, labels = embedded.test_images[::10], embedded.test_labels[::10]
    scores = caps.class_scores(run.model, images, caps.World(0, 1, images.device))
    plain = (scores.argmax(1) == labels).double().mean().item()
    curves = probes.robustness(run.model, images, scores, labels, "off")
    assert [curve[0] for curve in curves.values()] == [plain] * 3
    assert [len(curve) for curve in curves.values()] == [7, 7, 6] and all(curve[-1] < plain for curve in curves.values())


def test_angles_are_fitted_and_scored_on_different_images():
    angles, labels = np.random.default_rng(0).uniform(-30, 30, 400), np.repeat([0, 3], 200)
    told = np.stack([angles * (labels == 0), np.ones(400)], 1)  # of the class 0 alone
    r2, error = probes.fit_angles(told, angles, labels, 10)
    assert r2[0] > 0.999 and error[0] < 0.5 and abs(r2[3]) < 0.05 and 13 < error[3] < 17
    assert np.isnan(r2[[1, 2, 4, 5, 6, 7, 8, 9]]).all()
    by_heart = probes.fit_angles(np.eye(400), angles, labels, 10)[0]  # tells each fitted image, and none of the others
    assert by_heart[0] < 0.05 and by_heart[3] < 0.05


class Toy(torch.nn.Module):
    """Calls everything a 0; its primary capsule is the tilt of a bar, which the digit capsule holds unless `deaf`."""

    def __init__(self, deaf):
        super().__init__()
        self.deaf, self.backbone = deaf, torch.nn.Identity()

    def primary(self, images):
        x = torch.arange(28.0) - 13.5
        return (images * x * x[:, None]).sum((2, 3)).div(images.sum((2, 3)) * 60)[:, :, None]

    def digits(self, primary):
        capsules = torch.zeros(len(primary), 10, 16)
        capsules[:, 0, 0] = 0.9
        capsules[:, 0, 1] = 0 if self.deaf else primary[:, 0, 0]
        return capsules


def test_each_model_has_its_own_row_of_orientation(tmp_path, monkeypatch):
    drawn, new_figure = [], probes.new_figure
    monkeypatch.setattr(probes, "new_figure", lambda *a, **k: drawn.append(new_figure(*a, **k)) or drawn[-1])
    angles, capsules = np.linspace(-30, 30, 20), np.random.default_rng(0).normal(size=(20, 16))
    for factor, dimension in ((3.0, 5), (-2.0, 7)):
        capsules[:, dimension] += factor * angles / 30
    results = {name: (angles, capsules, np.full(20, 2), {}) for name in "ab"}
    probes.plot_orientation(results, tmp_path / "x.png", dict.fromkeys("ab", list("0123456789")))
    axes = drawn[0][1]
    assert len(axes) == 6 and all(len(axis.collections) == 1 for axis in axes)
    assert [axis.get_title().split("\n")[0] for axis in axes[1::3]] == ["a", "b"] and axes[3].get_ylabel().endswith(" 5")


@pytest.mark.parametrize("deaf", [False, True])
def test_orientation_of_a_bar(deaf):
    images = torch.zeros(80, 1, 28, 28, dtype=torch.uint8)
    images[..., 4:24, 13:15] = 255
    labels = torch.arange(80) // 60  # the last 20 are not recognised, and left out
    angles, capsules, kept, fits = probes.orientation(Toy(deaf), images, labels, "off")
    assert len(angles) == len(capsules) == 60 and not kept.any() and abs(angles).max() <= 30 and angles.std() > 12
    capsule, length, primary = (r2[0] for r2, _ in fits.values())
    assert primary > 0.9 and (capsule < 0.1 if deaf else capsule > 0.9) and length < 0.3
