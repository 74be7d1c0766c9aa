"""Other sets than MNIST: models, augmentation, every mode of the program, and pictures of many classes."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from common import command, start, torchrun
from made_sets import pictures, write_folder
from PIL import Image

import caps
from caps.extras import figures


# -------------------------------------------------------------------------------------------------- models and augmentation

@pytest.mark.parametrize("image, capsules", [((1, 28, 28), 128), ((3, 64, 64), 1568), ((3, 32, 32), 288), ((1, 15, 40), 128)])
def test_alexcapsnet_of_other_sizes(image, capsules):
    channels = image[0]
    model = caps.AlexCapsNet(num_classes=7, image=image, mean=(0.5,) * channels, deviation=(0.25,) * channels)
    drawn = torch.rand(2, *image)
    assert model(drawn).shape == (2, 7, 16) and model.digits.weight.shape[0] == capsules
    torch.testing.assert_close(model.backbone[0](drawn), (drawn - 0.5) / 0.25)
    caps.margin_loss(caps.lengths(model(drawn)), torch.tensor([0, 6])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_models_of_mnist_are_what_they_were():
    counts = [sum(p.numel() for p in model().parameters()) for model in caps.MODELS.values()]
    assert counts == [2_683_840, 2_022_272]
    torch.manual_seed(3)
    weight = caps.AlexCapsNet().digits.weight
    assert abs(weight.std().item() - 0.1) < 1e-3 and caps.ResCapsNet(image=(3, 20, 50)).backbone[1].weight.shape[1] == 3
    assert caps.ResCapsNet(5, image=(3, 20, 50))(torch.rand(1, 3, 20, 50)).shape == (1, 5, 16)
    with pytest.raises(ValueError, match="8×8.*at least 15×15"):
        caps.AlexCapsNet(image=(1, 8, 8))
    assert caps.AlexCapsNet(5, (3, 28, 28)).backbone[0].mean == [0.1307] * 3
    with pytest.raises(ValueError, match="3 channels"):
        caps.AlexCapsNet(image=(3, 28, 28), mean=(0.5, 0.5), deviation=(0.3,))
    with pytest.raises(ValueError, match="channels, height, width"):
        caps.ResCapsNet(image=28)


def test_flip_and_motions_of_other_shapes():
    order, motion = caps.epoch_plan(1000, 1, 0, 10, 2, (32, 64), True)
    plain = caps.epoch_plan(1000, 1, 0, 10, 2)
    assert torch.equal(order, plain[0]) and torch.equal(motion[:, 0], plain[1][:, 0])
    assert 400 < (motion[:, 3] == -1).sum() < 600 and motion[:, 3].abs().eq(1).all()
    torch.testing.assert_close(motion[:, 1] * 32, plain[1][:, 1] * 14)  # pixels
    torch.testing.assert_close(motion[:, 2] * 16, plain[1][:, 2] * 14)
    drawn = torch.rand(1, 3, 20, 30)
    mirrored = caps.move(drawn, torch.tensor([[0.0, 0, 0, -1]]))
    torch.testing.assert_close(mirrored, drawn.flip(3), atol=1e-5, rtol=0)
    square = torch.zeros(1, 1, 20, 40)
    square[..., 8:12, 10:30] = 1
    turned = caps.move(square, torch.tensor([[np.pi / 2, 0, 0]]))  # is no wider: a rotation, not a shear
    assert turned[0, 0, :, 18:22].sum().item() == pytest.approx(80, rel=0.02) and turned.sum().item() == pytest.approx(80, rel=0.02)


# ------------------------------------------------------------------------------------------------------ the whole program

@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """The folder of a run on colour images of 20×30 pixels with named classes, and of the set, colours/."""
    root = tmp_path_factory.mktemp("colour")
    names = ["red fox", "$b$", "ä"]
    for split, count in (("train", 60), ("test", 15)):
        write_folder(root / "colours" / split, *pictures(count, shape=(20, 30, 3)), names=names)
    words = ["--dataset", "colours", "--epochs", "2", "--flip", "--shift", "2", "--holdout", "6"]
    assert command(*words, cwd=root).returncode == 0  # as a user types it: into runs/
    return root


def test_every_mode_goes_by_the_set(colour, tmp_path, main):
    run, data = colour / "runs/alexcaps-colours", colour / "colours"
    facts = json.loads((run / "summary.json").read_text())
    assert facts["traits"]["classes"] == ["$b$", "red fox", "ä"] and facts["traits"]["image"] == [3, 20, 30]
    assert np.shape(facts["confusion"]) == (3, 3) and facts["test_images"] == 6

    def mode(*words, told=""):
        assert main(*words, "--checkpoint", run) == (0, told)
        return main.printed

    assert "colours, not the 6 training images" in mode("eval", "--out", "e")
    assert json.loads((tmp_path / "e/summary.json").read_text())["test_images"] == 15
    first = sorted((data / "test/red fox").iterdir())[0]
    [seen] = json.loads(mode("predict", first, "--json", "--show", "--explain",
                             told="caps: --show: drawn in ./\ncaps: --explain: drawn in ./"))
    assert seen["size"] == [30, 20] and seen["result"] == "class" and set(seen["lengths"]) == set(facts["traits"]["classes"])
    assert seen["text"] == max(seen["lengths"], key=seen["lengths"].get) and len(list(tmp_path.glob("*.png"))) == 2
    assert "one image [3, 20, 30] and 3 classes" in mode("summary")
    assert mode("diagram") and "red fox" in (tmp_path / "diagram-alexcaps.svg").read_text()
    assert "[batch, 3, 20, 30]" in mode("export", "m.onnx")
    import onnx
    assert json.loads(onnx.load(tmp_path / "m.onnx").metadata_props[0].value) == facts["traits"]["classes"]
    assert main("report", run, "--out", "r")[0] == 0
    text = (tmp_path / "r/report.md").read_text()
    assert "AlexCapsNet, 1 process, colours" in text and "**does not hold**" not in text  # the study is of MNIST
    with open(run / "metrics.csv") as file:
        assert {row["dataset"] for row in csv.DictReader(file)} == {str(data)}


def test_predicted_as_tested(colour, main):
    """Each file is seen as its image among the data is."""
    run, data = colour / "runs/alexcaps-colours", caps.load_data(str(colour / "colours"))
    model = caps.load_model(caps.read_checkpoint(run / "last.pt"), torch.device("cpu"))
    scores = caps.class_scores(model, data.test_images, caps.World(0, 1, torch.device("cpu")))
    expected = {image.numpy().tobytes(): score for image, score in zip(data.test_images, scores)}
    files = sorted((colour / "colours/test").rglob("*.png"))
    assert main("predict", "--checkpoint", run, *files, "--json")[0] == 0
    for file, seen in zip(files, json.loads(main.printed), strict=True):
        score = expected[np.asarray(Image.open(file)).transpose(2, 0, 1).tobytes()]
        np.testing.assert_allclose(list(seen["lengths"].values()), score, atol=2e-4)


def test_a_moved_set_and_another_one(colour, tmp_path, main):
    def refused(*words, expected):
        status, line = main(*words)
        assert status == 2 and all(word in line for word in expected), line

    run = shutil.copytree(colour / "runs/alexcaps-colours", tmp_path / "run")
    shutil.copytree(colour / "colours", tmp_path / "moved")
    assert main("--resume", run, "--dataset", "moved", "--epochs", 3)[0] == 0
    extra = sorted((tmp_path / "moved/train/ä").iterdir())[0]
    extra.unlink()
    refused("--resume", run, "--dataset", "moved", "--epochs", 4, expected=("other images", "moved"))
    assert main("eval", "--checkpoint", run, "--dataset", "moved")[0] == 0
    shutil.copytree(tmp_path / "moved/test/ä", tmp_path / "moved/test/z")
    refused("eval", "--checkpoint", run, "--dataset", "moved", expected=("does not know", "z"))
    shutil.rmtree(tmp_path / "moved")
    refused("eval", "--checkpoint", run, expected=("moved", "no such folder"))


def test_a_resumed_run_is_the_same(colour, tmp_path):
    words = ["--dataset", str(colour / "colours"), "--flip", "--grey", "--size", "24"]
    whole, half = (start(colour, tmp_path / name, *words, "--batch-size", "7") for name in ("whole", "half"))
    assert whole.model.image == (1, 24, 24)
    for run, stop in ((whole, None), (half, 28)):
        order, motion = run.plan(0)
        for first in range(0, stop or 60, 7):
            caps.train_step(run, order[first:first + 7], motion[first:first + 7], 7)
            run.position = first + 7
    caps.save(half)
    again = start(colour, tmp_path / "half", *words[:2], "--resume", str(tmp_path / "half/last.pt"))
    assert again.args.flip and again.args.grey and again.args.size == 24
    order, motion = again.plan(0)
    for first in range(28, 60, 7):
        caps.train_step(again, order[first:first + 7], motion[first:first + 7], 7)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()))


def test_several_processes_on_a_folder(colour, tmp_path):
    result = torchrun(2, "--dataset", colour / "colours", "--device", "cpu", "--epochs", 1, "--amp", "off", "--model", "alexcaps",
                      "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["world_size"] == 2


def test_checkpoints_of_earlier_versions(small, trained, tmp_path, main):
    """Without traits, size, grey and flip: MNIST is what they are of."""
    checkpoint = caps.read_checkpoint(trained / "last.pt")
    del checkpoint["traits"]
    for key in caps.LATER:
        del checkpoint["config"][key]
    torch.save(checkpoint, tmp_path / "last.pt")
    assert caps.read_checkpoint(tmp_path / "last.pt")["traits"]["mean"] == [0.1307]
    assert main("eval", "--checkpoint", "last.pt")[0] == 0
    assert main("--resume", "last.pt", "--out", "on", "--epochs", 2)[0] == 0
    checkpoint["config"]["dataset"] = "fashion"
    torch.save(checkpoint, tmp_path / "last.pt")
    assert caps.read_checkpoint(tmp_path / "last.pt")["traits"]["classes"][9] == "Ankle boot"
    shutil.copytree(small / "MNIST", tmp_path / "FashionMNIST")
    status, line = main("--resume", "last.pt", "--epochs", 3, "--data-dir", tmp_path)
    assert status == 2 and "another order" in line and "can be used" in line


# ------------------------------------------------------------------------------------------------- pictures of many classes

@pytest.mark.parametrize("classes", [3, 26, 100])
def test_pictures_of_many_classes_are_legible(classes, tmp_path, monkeypatch):
    drawn, new_figure = [], figures.new_figure
    monkeypatch.setattr(figures, "new_figure", lambda *a, **k: drawn.append(new_figure(*a, **k)) or drawn[-1])
    names = [f"a long name of class {c}" if classes > 10 else "$x$" for c in range(classes)]
    labels = torch.arange(classes).repeat(20)
    scores = torch.rand(len(labels), classes, generator=torch.Generator().manual_seed(0)) * 0.5
    scores[torch.arange(len(labels)), labels] += 0.3
    result = caps.measure(scores, labels) | {"classes": names}
    figures.plot_confusion({"title": result}, tmp_path / "c.png")
    figures.plot_roc({"title": (scores, labels, result)}, tmp_path / "r.png")
    figures.plot_misclassified(torch.zeros(len(labels), 3, 20, 20).byte(), scores, labels, names, "title", tmp_path / "m.png")
    (confusion, [axis]), (_, [whole, _]), _ = drawn
    confusion.canvas.draw()
    for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
        boxes = [label.get_window_extent() for label in ticks]
        assert len(boxes) == classes and not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))
    assert max(confusion.get_size_inches()) < 25
    legend = [text.get_text() for text in whole.get_legend().get_texts()]
    assert len(legend) == (3 if classes == 3 else 8)
    if classes > 12:
        worst = int(np.argmin(result["auc"]))
        assert legend[0].startswith(f"macro, {classes} classes") and legend[1].startswith("micro")
        assert f"{result['auc'][worst]:.5f}" in legend[2]
