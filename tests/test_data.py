"""The data sets: reading, damage, fallbacks, held-out images, and the plan of an epoch."""
import gzip
import math
import os
import shutil

import numpy as np
import pytest
import torch
from common import FILES, command, no_download, refused, write_idx

import caps
from caps.extras import datasets


def test_embedded_split_is_stratified(embedded):
    assert embedded.train_labels.bincount().tolist() == [400] * 10
    assert embedded.test_labels.bincount().tolist() == [100] * 10
    train = {image.numpy().tobytes() for image in embedded.train_images}
    assert not any(image.numpy().tobytes() in train for image in embedded.test_images)


def test_gzipped_and_raw_files_read_alike(small, tmp_path):
    shutil.copytree(small, tmp_path / "gz")
    for path in (tmp_path / "gz/MNIST/raw").iterdir():
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    raw, zipped = (caps.load_data("mnist", folder) for folder in (small, tmp_path / "gz"))
    assert torch.equal(raw.train_images, zipped.train_images) and torch.equal(raw.test_labels, zipped.test_labels)
    assert raw.train_images.shape == (320, 1, 28, 28)


def test_holdout_takes_the_place_of_the_test_set(small):
    """Of each class its share, drawn by the seed; nothing is lost or twice."""
    whole, part = caps.load_data("mnist", small), caps.load_data("mnist", small, holdout=23)
    images = lambda *parts: sorted(image.numpy().tobytes() for images in parts for image in images)
    assert images(part.train_images, part.test_images) == images(whole.train_images)
    assert torch.equal(part.test_labels.bincount().sort()[0], torch.tensor([2] * 7 + [3] * 3))
    assert "23 training images held out" in part.note
    again, other = (caps.load_data("mnist", small, holdout=23, seed=seed) for seed in (1, 2))
    assert torch.equal(again.test_images, part.test_images) and not torch.equal(other.test_images, part.test_images)


def test_holdout_of_uneven_classes():
    labels = torch.tensor([3] * 70 + [5] * 20 + [7] * 9 + [9])
    data = caps.Data("own", "", torch.arange(100).byte(), labels, torch.zeros(1), torch.zeros(1), {})
    for count, shares in ((10, {3: 7, 5: 2, 7: 1}), (96, {3: 69, 5: 19, 7: 8})):
        held = datasets.hold_out(data, count, seed=4)
        assert dict(zip(*(t.tolist() for t in held.test_labels.unique(return_counts=True)))) == shares
        assert torch.equal(labels[held.test_images.long()], held.test_labels)
    with pytest.raises(caps.UserError, match="--holdout 97.*96"):
        datasets.hold_out(data, 97, seed=4)


def test_an_epoch_is_a_function_of_seed_and_epoch():
    order, motion = caps.epoch_plan(1000, 1, 0, rotate=10, shift=2)
    assert sorted(order.tolist()) == list(range(1000))
    assert torch.equal(order, caps.epoch_plan(1000, 1, 0, 10, 2)[0])
    assert not torch.equal(order, caps.epoch_plan(1000, 1, 1, 10, 2)[0])
    assert not torch.equal(order, caps.epoch_plan(1000, 2, 0, 10, 2)[0])
    angle = motion[:, 0].rad2deg().abs().max().item()
    assert 9 < angle <= 10 and 1.8 / 14 < motion[:, 1:].abs().max().item() <= 2 / 14


def test_move_rotates_and_shifts():
    images = torch.rand(3, 1, 28, 28)
    motion = torch.tensor([[0, 0, 0], [math.pi / 2, 0, 0], [0, 2 / 28, 0]])
    moved = caps.move(images, motion)
    torch.testing.assert_close(moved[0], images[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[1], images[1].rot90(1, (1, 2)), atol=1e-4, rtol=0)
    torch.testing.assert_close(moved[2, :, :, :-1], images[2, :, :, 1:], atol=1e-4, rtol=0)
    assert moved[2, :, :, -1].abs().max() < 1e-4


def damage(raw, kind):
    images, labels = raw / FILES["train"][0], raw / FILES["train"][1]
    if kind == "truncated":
        images.write_bytes(images.read_bytes()[:-1000])
    elif kind == "swapped":
        images.rename(raw / "x"), labels.rename(images), (raw / "x").rename(labels)
    elif kind == "empty":
        images.write_bytes(b"")
    elif kind == "foreign":
        images.write_bytes(b"<html>404 not found</html>")
    elif kind == "broken gzip":
        images.with_name(images.name + ".gz").write_bytes(gzip.compress(images.read_bytes())[:500])
        images.unlink()
    elif kind == "exchanged":
        for split, count in (("train", 10_000), ("t10k", 60_000)):
            for name, shape in zip(FILES[split], ((count, 28, 28), (count,))):
                write_idx(raw / name, np.zeros(shape, np.uint8))
    elif kind == "mismatch":
        write_idx(labels, np.zeros(7))
    elif kind == "labels":
        write_idx(labels, np.full(320, 11))


@pytest.mark.parametrize("kind, words", [
    ("truncated", ("train-images", "bytes")), ("swapped", ("train-images", "00000803")), ("empty", ("train-images", "nothing")),
    ("foreign", ("train-images", "IDX")), ("broken gzip", ("train-images", ".gz")), ("exchanged", ("exchanged",)),
    ("mismatch", ("train-labels", "320", "7")), ("labels", ("train-labels", "11"))])
def test_damaged_files_are_named(small, tmp_path, kind, words):
    shutil.copytree(small, tmp_path / "d")
    damage(tmp_path / "d/MNIST/raw", kind)
    with pytest.raises(caps.UserError) as error:
        caps.load_data("auto", tmp_path / "d")
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)
    if kind in ("truncated", "swapped", "empty", "foreign"):
        refused(command("--data-dir", tmp_path / "d", cwd=tmp_path), *words)
        assert not (tmp_path / "runs").exists()


def test_only_auto_falls_back(tmp_path, monkeypatch):
    no_download(monkeypatch)
    with pytest.raises(caps.UserError, match="train-images-idx3-ubyte.*CAPS_DATA.*mnist5k"):
        caps.load_data("mnist", tmp_path)
    with pytest.raises(caps.UserError, match="train-images-idx3-ubyte.*CAPS_DATA.*mnist5k"):
        caps.load_data("auto", tmp_path)  # a folder that was named
    monkeypatch.chdir(tmp_path)
    data = caps.load_data("auto")
    assert data.name == "mnist5k" and "not the full MNIST" in data.note


@pytest.mark.skipif(not os.environ.get("CAPS_DATA"), reason="CAPS_DATA does not name the full MNIST set")
def test_the_full_set():
    data = caps.load_data("auto", os.environ["CAPS_DATA"])
    assert data.name == "mnist" and data.train_images.shape == (60_000, 1, 28, 28) and len(data.test_labels) == 10_000
