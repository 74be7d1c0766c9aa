"""torchvision's own formats: CIFAR, SVHN, EMNIST, QMNIST and USPS, by files made in them."""
import bz2
import os
import pickle

import numpy as np
import pytest
from common import write_idx
from made_sets import RNG, pictures, same

import caps
from caps.extras import datasets


def test_cifar(tmp_path):
    drawn, labels = RNG.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8), [n % 3 for n in range(12)]
    for folder, names, key, meta in (("cifar-10-batches-py", [f"data_batch_{n}" for n in range(1, 6)], b"labels", "label_names"),
                                     ("cifar-100-python", ["train"], b"fine_labels", "fine_label_names")):
        (tmp_path / folder).mkdir()
        tests = "test_batch" if len(names) > 1 else "test"
        for name in [*names, tests]:
            content = {b"data": drawn.reshape(12, -1), key: labels, b"coarse_labels": [0] * 12}
            (tmp_path / folder / name).write_bytes(pickle.dumps(content, protocol=2))
        (tmp_path / folder / ("batches.meta" if len(names) > 1 else "meta")).write_bytes(pickle.dumps({meta: ["cat", "dog", "ox"]}))
    for name, count in (("cifar10", 60), ("cifar100", 12)):
        data = caps.load_data(name, str(tmp_path))
        assert data.train_images.shape == (count, 3, 32, 32) and data.traits["classes"] == ["cat", "dog", "ox"]
        at = next(i for i in range(12) if np.array_equal(data.test_images[i], drawn[0]))
        assert data.test_labels[at] == 0
    assert caps.load_data("cifar10", str(tmp_path / "cifar-10-batches-py")).title == "cifar10"
    (tmp_path / "cifar-100-python/train").write_bytes(pickle.dumps(os.system))
    with pytest.raises(caps.UserError, match="train: is damaged.*system"):  # and is not run
        caps.load_data("cifar100", str(tmp_path))
    (tmp_path / "cifar-10-batches-py/data_batch_4").unlink()
    with pytest.raises(caps.UserError, match="no data_batch_4"):
        caps.load_data("cifar10", str(tmp_path))


def test_svhn(tmp_path):
    from scipy.io import savemat
    drawn = RNG.integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": drawn, "y": np.arange(1, 11)[:, None].astype(np.uint8)})
    data = caps.load_data("svhn", str(tmp_path))
    assert data.train_images.shape == (10, 3, 32, 32) and data.traits["classes"] == datasets.DIGITS
    zero = data.train_images[data.train_labels == 0][0]
    assert np.array_equal(zero, drawn[..., 9].transpose(2, 0, 1))  # label 10 is the digit 0


@pytest.mark.parametrize("name, first, classes", [("emnist-letters", 1, 26), ("emnist-balanced", 0, 47), ("emnist-digits", 0, 10)])
def test_emnist_is_upright(tmp_path, name, first, classes):
    drawn, labels = pictures(2 * classes, classes=classes)
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "test"):
        write_idx(raw / f"{name}-{split}-images-idx3-ubyte", drawn.swapaxes(1, 2))
        write_idx(raw / f"{name}-{split}-labels-idx1-ubyte", labels + first)
    write_idx(raw / "emnist-mnist-train-images-idx3-ubyte", drawn)  # of another split
    data = caps.load_data(name, str(tmp_path))
    assert len(data.traits["classes"]) == classes and data.traits["framing"] == "emnist"
    assert {image.numpy().tobytes() for image in data.train_images} == {image.tobytes() for image in drawn}
    at = next(i for i in range(len(drawn)) if np.array_equal(drawn[i], data.test_images[0, 0]))
    assert data.test_labels[0] == labels[at]
    (raw / "emnist-mnist-train-images-idx3-ubyte").unlink()
    again = caps.load_data(str(raw))  # told by the names of its files
    assert same(again, data) and again.traits["classes"] == data.traits["classes"]
    write_idx(raw / f"{name}-test-labels-idx1-ubyte", labels + 200)
    with pytest.raises(caps.UserError, match="test-labels.*expected labels from"):
        caps.load_data(name, str(tmp_path))


def test_qmnist_and_usps(tmp_path):
    drawn, labels = pictures(10, classes=10)
    raw = tmp_path / "QMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "test"):
        write_idx(raw / f"qmnist-{split}-images-idx3-ubyte", drawn)
        many = np.zeros((10, 8), ">i4")
        many[:, 0], many[:, 2] = labels, 4000
        (raw / f"qmnist-{split}-labels-idx2-int").write_bytes(
            bytes([0, 0, 12, 2]) + np.array(many.shape, ">u4").tobytes() + many.tobytes())
    data = caps.load_data("qmnist", str(tmp_path))
    at = next(i for i in range(10) if np.array_equal(drawn[i], data.test_images[0, 0]))
    assert data.test_labels[0] == labels[at]
    lines = [f"{digit % 10 + 1} " + " ".join(f"{i + 1}:{(digit / 5 - 1):.4f}" for i in range(256)) for digit in range(10)]
    for name in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / name).write_bytes(bz2.compress("\n".join(lines).encode()))
    data = caps.load_data("usps", str(tmp_path))
    assert data.traits["image"] == [1, 16, 16] and data.traits["classes"] == datasets.DIGITS
    for image, label in zip(data.train_images, data.train_labels):
        assert (image == int(label / 5 / 2 * 255)).all() or (image.int() - int(label / 5 / 2 * 255)).abs().max() <= 1


def test_what_a_set_with_a_name_lacks(tmp_path, monkeypatch):
    from torchvision.datasets import SVHN

    def fail(*args, **kwargs):
        raise RuntimeError("no network")
    monkeypatch.setattr("torchvision.datasets.SVHN", fail)
    with pytest.raises(caps.UserError, match="svhn: .*train_32x32.mat: not there.*no network.*--data-dir"):
        caps.load_data("svhn", str(tmp_path))
    assert SVHN.split_list["train"][1] == datasets.NAMED["svhn"].files[0]
