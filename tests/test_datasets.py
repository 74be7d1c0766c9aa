"""Any data set: own folders, arrays and IDX files, torchvision's formats, labels of all kinds, other sizes and colour."""
import bz2
import csv
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from common import command, start, torchrun, write_idx
from PIL import Image

import caps
from caps.extras import datasets, figures, images, report

RNG = np.random.default_rng(0)


def pictures(count, shape=(28, 28), classes=3):
    """Images uint8 [n, *shape] of squares whose place tells their class, and labels [n]."""
    labels = np.arange(count) % classes
    drawn = RNG.integers(0, 60, (count, *shape), dtype=np.uint8)
    for image, label in zip(drawn, labels):
        left = 3 + label * (shape[1] - 10) // max(1, classes - 1)
        image[6:12, left - 3:left + 4] = 220
    return drawn, labels


def write_folder(root, images, labels, names=None, kind="png"):
    """root/CLASS/NUMBER.png, numbered anew in each class."""
    for image, label in zip(images, labels):
        folder = root / (names[label] if names else str(label))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{len(list(folder.iterdir()))}.{kind}", quality=95)
    return root


def same(a, b):
    return a.traits | {"classes": 0} == b.traits | {"classes": 0} and all(torch.equal(getattr(a, part), getattr(b, part)) for part in (
        "train_images", "train_labels", "test_images", "test_labels"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """One set as IDX files, as a folder of PNGs and as arrays: names of Keras and of MedMNIST."""
    root = tmp_path_factory.mktemp("sets")
    (train, train_labels), (test, test_labels) = pictures(90), pictures(30)
    (root / "idx").mkdir()
    for name, array in (("train-images.idx3-ubyte", train), ("train-labels.idx1-ubyte", train_labels),
                        ("test-images.idx3-ubyte", test), ("test-labels.idx1-ubyte", test_labels)):
        write_idx(root / "idx" / name, array)
    write_folder(root / "folder/train", train, train_labels)
    write_folder(root / "folder/test", test, test_labels)
    np.savez(root / "keras.npz", x_train=train, y_train=train_labels, x_test=test, y_test=test_labels)
    np.savez(root / "med.npz", train_images=train[..., None], train_labels=train_labels[:, None].astype(np.uint8),
             test_images=test[..., None], test_labels=test_labels[:, None], val_images=test, val_labels=test_labels)
    return root


# --------------------------------------------------------------------------------------------------- the user's own sets

def test_a_set_is_the_same_in_whatever_files(sets, capsys):
    first = caps.load_data(str(sets / "idx"))
    for name in ("folder", "keras.npz", "med.npz"):
        assert same(caps.load_data(str(sets / name)), first), name
    assert "2 arrays left out: val_images, val_labels" in capsys.readouterr().out
    assert first.traits["image"] == [1, 28, 28] and first.traits["classes"] == ["0", "1", "2"]
    train = first.train_images.double() / 255
    assert first.traits["mean"] == [round(train.mean().item(), 4)]
    assert first.traits["deviation"] == [round(train.std(correction=0).item(), 4)]
    assert not torch.equal(first.train_labels, first.train_labels.sort()[0])  # never class by class
    assert first.title == "idx" and caps.load_data(str(sets / "keras.npz")).title == "keras"


def test_the_same_training_to_the_bit(sets, main):
    weights = []
    for name in ("idx", "folder", "med.npz"):
        assert main("--dataset", sets / name, "--epochs", 2, "--out", name, "--shift", 1, "--flip")[0] == 0
        weights.append(caps.read_checkpoint(f"{name}/last.pt")["model"])
    assert all(torch.equal(weights[0][key], other[key]) for other in weights[1:] for key in weights[0])


@pytest.mark.parametrize("labels, expected", [
    ([3, 1, 10, 1], ["1", "3", "10"]), ([[3], [1], [10], [1]], ["1", "3", "10"]), ([2.0, 0.0, 1.0, 0.0], ["0", "1", "2"]),
    (["cat", "dog", "cat", "ant"], ["ant", "cat", "dog"]), ([b"b", b"a", b"b", b"a"], ["a", "b"]),
    (np.array([2 ** 63 + 1, 5, 5, 1], np.uint64), ["1", "5", "9223372036854775809"]), ([True, False, True, True], ["0", "1"]), ([[0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 0, 0]], ["0", "1", "2"]),
    ([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], ["0", "1"]), ([-1, 1, -1, 1], ["-1", "1"])])
def test_labels_that_can_be_meant_without_doubt(tmp_path, labels, expected):
    drawn, _ = pictures(4)
    np.savez(tmp_path / "a.npz", x_train=drawn, y_train=labels, x_test=drawn, y_test=labels)
    data = caps.load_data(str(tmp_path / "a.npz"))
    assert data.traits["classes"] == expected
    plain = np.array(labels)
    plain = plain.argmax(1) if plain.ndim == 2 and plain.shape[1] > 1 else plain.ravel()
    plain = plain.astype(int) if plain.dtype.kind == "b" or plain.dtype.kind == "f" and max(plain) < 9 else plain
    for image, label in zip(data.train_images, data.train_labels):
        number = next(i for i in range(4) if np.array_equal(drawn[i], image[0]))
        wanted = plain[number].decode() if isinstance(plain[number], bytes) else str(plain[number])
        assert expected[label] == wanted


@pytest.mark.parametrize("labels, words", [
    ([[1, 1], [0, 1], [1, 0], [0, 0]], ("4×2", "multi-label")), ([0.5, 1.0, 2.0, 3.25], ("not whole", "regression")),
    ([0.0, 1.0, np.nan, 2.0], ("not whole",)), ([0, 1, 2], ("4 training images", "3 labels")),
    (np.zeros((4, 2, 2), int), ("4×2×2",)), (np.array([None, 1, "a", 2]), ("Python objects", "dtype=str")), ([1e20, 2, 3, np.inf], ("not whole",))])
def test_labels_that_cannot_be_meant(tmp_path, labels, words):
    np.savez(tmp_path / "a.npz", x_train=pictures(4)[0], y_train=labels)
    with pytest.raises(caps.UserError) as error:
        caps.load_data(str(tmp_path / "a.npz"))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("form, channels", [
    (lambda x: x[..., None], 1), (lambda x: x / 255, 1), (lambda x: x / np.float32(254.99999), 1), (lambda x: x.astype(np.float32), 1), (lambda x: x.astype(np.int64), 1),
    (lambda x: np.stack([x, x, 255 - x], 3), 3), (lambda x: np.stack([x, x, 255 - x], 1), 3)])
def test_pixels_of_any_type(tmp_path, form, channels):
    drawn, labels = pictures(9)
    np.savez(tmp_path / "a.npz", images=form(drawn), labels=labels)
    data = caps.load_data(str(tmp_path / "a.npz"))
    assert data.traits["image"] == [channels, 28, 28] and len(data.test_images) == 3
    found = {image[0].numpy().tobytes() for image in torch.cat([data.train_images, data.test_images])}
    assert found == {image.tobytes() for image in drawn}


@pytest.mark.parametrize("array, words", [
    (np.zeros((4, 784), np.uint8), "4×784"), (np.full((4, 28, 28), -1.0), "from -1.0"), (np.full((4, 28, 28), 300), "300"),
    (np.zeros((4, 5, 28, 28), np.uint8), "4×5×28×28"), (np.full((4, 28, 28), np.nan), "not finite"),
    (np.full((4, 28, 28), 16.0), "up to 16.0.*rescale")])
def test_arrays_that_are_no_images(tmp_path, array, words):
    np.savez(tmp_path / "a.npz", x_train=array, y_train=[0, 1, 0, 1])
    with pytest.raises(caps.UserError, match=words):
        caps.load_data(str(tmp_path / "a.npz"))


def test_what_is_no_data_set(tmp_path, main):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.npz").write_bytes(b"no zip")
    np.savez(tmp_path / "b.npz", pictures=np.zeros((4, 28, 28)))
    for name, expected in (("empty", ["empty", "CLASS/", "IDX"]), ("a.npz", ["a.npz", "not an .npz"]),
                           ("b.npz", ["x_train", "pictures"]), ("mnits", ["mnist", "emnist-letters", "mnits"]),
                           ("no/such", ["no/such", "no such folder"])):
        status, line = main("--dataset", name, "--check")
        assert status == 2 and all(word in line for word in expected), line


def test_a_fifth_of_each_class_is_held_out(tmp_path):
    write_folder(tmp_path / "photos", *pictures(100, classes=4), names=["ä b", "$x_1$", "c", "d"])
    one, two = (caps.load_data(str(tmp_path / "photos"), seed=seed) for seed in (1, 2))
    assert same(one, two) and one.test_labels.bincount().tolist() == [5] * 4  # the test set is the same for every seed
    assert "a fifth of each class, 20 images" in one.note
    assert one.traits["classes"] == ["$x_1$", "c", "d", "ä b"]
    shown = lambda *parts: sorted(image.numpy().tobytes() for part in parts for image in part)
    assert len(set(shown(one.train_images, one.test_images))) == 100
    held = caps.load_data(str(tmp_path / "photos"), holdout=8)
    assert len(held.train_images) == 72 and len(held.test_images) == 8 and "held out" in held.note
    assert not set(shown(held.test_images)) & set(shown(one.test_images))
    small = caps.load_data(str(tmp_path / "photos"), size=(9, 9))
    resized = lambda images: sorted(images_of_size(image[0].numpy(), 9).tobytes() for image in images)
    assert shown(small.test_images) == resized(one.test_images)  # the same ones, whatever the size


def images_of_size(image, size):
    return images.formed(Image.fromarray(image), (size, size), 1)


def test_an_image_stays_on_its_side_of_the_fifth(tmp_path):
    write_folder(tmp_path / "a", *pictures(100, classes=4))
    before = caps.load_data(str(tmp_path / "a"))
    write_folder(tmp_path / "a", *pictures(4, classes=4))
    (tmp_path / "a/2/7.png").unlink()
    after = caps.load_data(str(tmp_path / "a"))
    content = lambda images: {image.numpy().tobytes() for image in images}
    assert len(content(before.train_images) & content(after.test_images)) <= 4  # one a class at most
    assert len(content(before.test_images) & content(after.test_images)) >= 15
    few = write_folder(tmp_path / "few", *pictures(50, classes=25))
    assert caps.load_data(str(few)).test_labels.bincount().tolist() == [1] * 25  # each class is tested


def test_what_is_odd_in_a_folder_is_said(tmp_path, capsys):
    root = tmp_path / "letters"
    write_folder(root / "train", *pictures(30))
    write_folder(root / "test", *pictures(12, classes=4))
    write_folder(root / "extra", *pictures(3))
    (root / "train/7").mkdir()
    (root / "train/0/notes.txt").write_text("no image")
    (root / "train/1/cut.png").write_bytes((root / "train/1/0.png").read_bytes()[:200])
    (root / "train/readme.md").write_text("about")
    (root / ".DS_Store").write_text("hidden")
    shutil.copytree(root / "train/2", root / "train/2/.ipynb_checkpoints")
    (root / "train/2/loop").symlink_to(root / "train/2")
    (root / "train/0/nowhere.png").symlink_to("gone")
    data = caps.load_data(str(root))
    said = capsys.readouterr().out.splitlines()
    for words in (("1 folder outside", "extra"), ("1 file outside", "train/readme.md"),
                  ("3 of 45 files cannot be read", "train/0/notes.txt", "train/0/nowhere.png", "train/1/cut.png"), ("1 folder without images", "train/7"),
                  ("1 of 4 classes", "test images alone", "3 (3)"), ("30 images to train and 12 to test, of 28×28 pixels, 4 classes: 0, 1, 2, 3",)):
        assert sum(all(word in line for word in words) for line in said) == 1, (words, said)
    assert len(said) == 6 and data.traits["classes"] == ["0", "1", "2", "3"] and len(data.train_images) == 30


def test_images_of_several_sizes(tmp_path, capsys):
    folder = write_folder(tmp_path / "a", *pictures(12))
    write_folder(tmp_path / "a", *pictures(3, shape=(30, 28)), names=["x", "y", "z"])
    with pytest.raises(caps.UserError, match="differ in size.*28×30.*--size"):
        caps.load_data(str(folder))
    data = caps.load_data(str(folder), size=(20, 20))
    assert data.traits["image"] == [1, 20, 20] and len(data.train_images) + len(data.test_images) == 15
    write_folder(tmp_path / "large", *pictures(15, shape=(120, 90)))
    assert caps.load_data(str(tmp_path / "large")).traits["image"] == [1, 64, 64]
    assert "90×120 pixels are resized to 64×64" in capsys.readouterr().out
    assert caps.load_data(str(tmp_path / "large"), size=(100, 100)).traits["image"] == [1, 100, 100]


def test_resizing_is_the_same_for_files_and_arrays(tmp_path):
    drawn, labels = pictures(15, shape=(40, 30, 3))
    for split in ("training", "Test"):
        write_folder(tmp_path / "a" / split, drawn, labels)
    np.savez(tmp_path / "a.npz", x_train=drawn, y_train=labels, x_test=drawn, y_test=labels)
    for how in ({"size": (28, 28)}, {"size": (28, 28), "channels": 1}, {"channels": 1}, {}):
        assert same(caps.load_data(str(tmp_path / "a"), **how), caps.load_data(str(tmp_path / "a.npz"), **how)), how


def test_modes_of_images(tmp_path):
    """Upright, of 16 bits, transparent, of a palette; grey ones among colour."""
    drawn, _ = pictures(1, shape=(20, 28))
    whole = Image.fromarray(drawn[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    ink = Image.new("RGBA", (28, 20))
    ink.paste((0, 0, 0, 255), (4, 4, 10, 10))
    made = {"grey.png": whole, "deep.png": Image.fromarray(drawn[0].astype(np.uint16) * 257), "ink.png": ink,
            "palette.png": whole.convert("P")}
    for name, image in made.items():
        image.save(tmp_path / name)
    whole.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    grey, natural, pages = images.read_image(tmp_path / "grey.png")
    assert natural == (20, 28) and pages == 1 and np.array_equal(grey, drawn[0])
    assert abs(images.read_image(tmp_path / "deep.png")[0].astype(int) - drawn[0]).max() <= 1
    turned, natural, _ = images.read_image(tmp_path / "turned.png")
    assert natural == (20, 28) and np.array_equal(turned, drawn[0])
    assert np.array_equal(images.read_image(tmp_path / "palette.png")[0], drawn[0])  # all of it grey
    whole.save(tmp_path / "two.tif", save_all=True, append_images=[whole])
    assert images.read_image(tmp_path / "two.tif")[2] == 2
    seen = images.read_image(tmp_path / "ink.png", channels=1)[0]
    assert seen[6, 6] == 0 and seen[15, 20] == 255  # black ink is on white


def test_what_took_long_is_read_once(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "a", *pictures(30))
    (root / "0" / "x.txt").write_text("no image")
    first = caps.load_data(str(root))
    assert not (root / images.CACHE).exists()
    monkeypatch.setattr(images, "SLOW", 0)
    assert same(caps.load_data(str(root)), first) and (root / images.CACHE).exists()
    monkeypatch.setattr(images, "attempt", None)
    assert same(caps.load_data(str(root)), first)
    assert same(caps.load_data(str(root), size=(28, 28), channels=1), first)  # as eval asks for it
    monkeypatch.undo()
    Image.fromarray(255 - np.array(Image.open(root / "1/0.png"))).save(root / "1/0.png")  # of another time
    assert not same(caps.load_data(str(root)), first)


def test_a_set_that_does_not_fit_says_what_it_needs(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "a", *pictures(9))
    monkeypatch.setattr(os, "sysconf", lambda name: 50)
    with pytest.raises(caps.UserError, match="9 images of 28×28 pixels need 0.0 GiB, this machine has"):
        caps.load_data(str(root))


def test_one_class_and_few_images(tmp_path, main):
    write_folder(tmp_path / "one", *pictures(10, classes=1))
    assert main("--dataset", "one", "--epochs", 1)[0] == 0 and "one class alone" in main.printed
    assert main("predict", "--checkpoint", "runs/alexcaps-one", "one/0/0.png", "--explain", "--show")[0] == 0
    assert "0.png: 0  lengths 0 (" in main.printed
    write_folder(tmp_path / "few", *pictures(4, classes=4))
    status, line = main("--dataset", "few", "--check")
    assert status == 2 and "4 images, one of each class" in line and "too few" in line


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, bool])
def test_black_and_white_of_any_type(tmp_path, dtype):
    drawn, labels = pictures(9)
    np.savez(tmp_path / "a.npz", x_train=(drawn > 100).astype(dtype), y_train=labels)
    assert caps.load_data(str(tmp_path / "a.npz")).train_images.unique().tolist() == [0, 255]


def test_dark_images_are_said(tmp_path, capsys):
    drawn, labels = pictures(9)
    np.savez(tmp_path / "a.npz", x_train=drawn // 16, y_train=labels)
    caps.load_data(str(tmp_path / "a.npz"))
    assert "pixels go up to 13 of 255" in capsys.readouterr().out


def test_labels_of_own_idx_files(sets, tmp_path):
    shutil.copytree(sets / "idx", tmp_path / "idx")
    for split, count in (("train", 90), ("test", 30)):
        write_idx(tmp_path / f"idx/{split}-labels.idx1-ubyte", np.eye(3)[np.arange(count) % 3])
    assert same(caps.load_data(str(tmp_path / "idx")), caps.load_data(str(sets / "idx")))  # one-hot
    write_idx(tmp_path / "idx/train-labels.idx1-ubyte", np.ones((90, 3)))
    with pytest.raises(caps.UserError, match="train-labels.*multi-label"):
        caps.load_data(str(tmp_path / "idx"))


def test_names_of_folders(tmp_path, main):
    """With auto in them; leading zeros; no UTF-8; one folder alone around it all; a class called train; one half alone."""
    root = write_folder(tmp_path / "auto_1", *pictures(12), names=["01", "1", "2"])
    assert all(caps.load_data(str(root)).traits["classes"] == ["01", "1", "2"] for _ in range(3))
    write_folder(tmp_path / "mnist_1", *pictures(12), names=["x", "y", "z"])
    nested = write_folder(tmp_path / "nested/archive/train", *pictures(12)).parent.parent
    write_folder(nested / "archive/test", *pictures(12))
    with pytest.raises(caps.UserError, match="one folder alone.*name .*nested/archive"):
        caps.load_data(str(nested))
    cars = write_folder(tmp_path / "cars", *pictures(12), names=["car", "train", "test"])
    assert caps.load_data(str(cars)).traits["classes"] == ["car", "test", "train"]
    write_folder(tmp_path / "odd", *pictures(12), names=[os.fsdecode(b"caf\xe9"), "_x", "a|b"])
    assert main("--dataset", "odd", "--epochs", 1)[0] == 0 and main("report")[0] == 0
    assert report.markdown([{"a|b": "c|d"}]).count("\\|") == 2
    write_folder(tmp_path / "half/test", *pictures(12), names=[os.fsdecode(b"caf\xe9"), "_x", "a|b"])
    assert main("eval", "--checkpoint", "runs/alexcaps-odd", "--dataset", "half")[0] == 0
    assert json.loads((tmp_path / "runs/alexcaps-odd/eval-half/summary.json").read_text())["test_images"] == 12


def test_a_network_of_a_changed_set_is_not_tested_on_what_it_learned(tmp_path, main):
    root = write_folder(tmp_path / "a", *pictures(60))
    assert main("--dataset", "a", "--epochs", 1)[0] == 0
    assert main("eval", "--checkpoint", "runs/alexcaps-a")[0] == 0 and "a fifth of each class" in main.printed
    (root / "1/3.png").unlink()
    status, line = main("eval", "--checkpoint", "runs/alexcaps-a")
    assert status == 2 and "has changed since the training" in line and "test/" in line
    assert main("export", "--checkpoint", "runs/alexcaps-a", "a.onnx")[0] == 0 and "of noise" in main.printed


def test_few_steps_an_epoch_begin_gently(tmp_path, sets, small):
    args, _, data = caps.prepare(caps.parse(["train", "--dataset", str(sets / "folder")]))
    assert args.warmup == round(100 * 32 / 90, 2)
    assert caps.prepare(caps.parse(["train", "--dataset", str(sets / "folder"), "--warmup", "0"]))[0].warmup == 0
    assert caps.prepare(caps.parse(["train", "--data-dir", str(small)]))[0].warmup == 0  # the study's recipe


def test_digits_of_another_size_are_predicted(small, tmp_path, main, embedded):
    assert main("--data-dir", small, "--size", 32, "--epochs", 1)[0] == 0
    Image.fromarray(255 - embedded.test_images[0, 0].numpy()).resize((90, 90)).save(tmp_path / "0.png")
    assert main("predict", "--checkpoint", "runs/alexcaps-mnist", "0.png", "--show", "--explain")[0] == 0
    assert "0.png: " in main.printed


# --------------------------------------------------------------------------------------------- torchvision's own formats

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

    def mode(*words):
        assert main(*words, "--checkpoint", run) == (0, "")
        return main.printed

    assert "colours, not the 6 training images" in mode("eval", "--out", "e")
    assert json.loads((tmp_path / "e/summary.json").read_text())["test_images"] == 15
    first = sorted((data / "test/red fox").iterdir())[0]
    [seen] = json.loads(mode("predict", first, "--json", "--show", "--explain"))
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
