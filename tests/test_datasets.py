"""The user's own sets: folders, arrays and IDX files, labels of all kinds, any sizes and pixels."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from common import write_idx
from made_sets import pictures, same, write_folder
from PIL import Image

import caps
from caps.extras import images, report


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
