"""The files that data sets come in, as arrays: IDX, and what torchvision downloads of USPS, SVHN and CIFAR; .npz files
with labels and pixels of any type. A UserError names the file and what is wrong with it.
"""

import contextlib
import gzip
import hashlib
import pickle
import re
import zipfile
import zlib

import numpy as np

from caps import UserError, first_line, package
from caps.extras.images import counted, listing

MOST_CLASSES = 256


def plain(name):
    """A file's name without what its copies differ in: separators, case, .gz, and `test` for `t10k`."""
    return re.sub("[^a-z0-9]", "", name.lower().removesuffix(".gz")).replace("test", "t10k")


def read_idx_sets(paths):
    """((images, labels) to train, (images, labels) to test) from four IDX files. EMNIST's images are stored transposed."""
    splits = []
    for images_path, labels_path in (paths[:2], paths[2:]):
        images, labels = read_idx(images_path, "images"), read_idx(labels_path, "labels")
        if len(images) != len(labels):
            raise UserError(f"{labels_path}: expected {len(images)} labels, one for each image of {images_path.name}, "
                            f"found {len(labels)}")
        images = images.swapaxes(1, 2) if plain(images_path.name).startswith("emnist") else images
        labels = labels[:, 0] if labels.ndim > 1 and plain(labels_path.name).startswith("qmnist") else labels
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


@contextlib.contextmanager
def reading_errors(path):
    """Around the reading of a file by a library: a UserError where it fails."""
    try:
        yield
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into this machine's memory ({first_line(error)})") from error
    except UserError:
        raise
    except Exception as error:  # libraries raise a dozen kinds upon a damaged file
        raise UserError(f"{path}: is damaged, or not such a file ({first_line(error)[:120]})") from error


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
            labels = content["y"].ravel().astype(np.int64)
            splits.append((content["X"].transpose(3, 0, 1, 2).astype(np.uint8), np.where(labels == 10, 0, labels)))
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


def read_npz(path, say):
    """[(images, classes) to train, perhaps those to test] of an .npz file, its arrays named as Keras or MedMNIST do."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"--dataset {path}: not an .npz file; expected one, or a folder")
    with reading_errors(path), np.load(path) as file:
        pairs = [[pair for pair in pairs if {*file.files} >= {*pair}][:1] for pairs in (
            [("x_train", "y_train"), ("train_images", "train_labels"), ("x", "y"), ("images", "labels")],
            [("x_test", "y_test"), ("test_images", "test_labels")])]
        if not pairs[0]:
            raise UserError(f"--dataset {path}: expected arrays x_train, y_train, x_test, y_test or train_images, "
                            f"train_labels, test_images, test_labels, or x and y alone; found {listing(file.files, 8) or 'none'}")
        used = sum(pairs, [])
        if left := [name for name in file.files if name not in sum(used, ())]:
            say(f"{counted(len(left), 'array')} left out: {listing(left)}")
        try:
            arrays = [[file[name] for name in pair] for pair in used]
        except ValueError as error:
            if "Object arrays" in str(error):
                raise UserError(f"--dataset {path}: holds Python objects, which are not read; save images as numbers of one "
                                "shape, and labels as numbers or by np.array(labels, dtype=str)") from error
            raise
    return [(pixels_of(images, f"{path}: {images_name}"), names_of(labels, f"{path}: {labels_name}"))
            for (images, labels), (images_name, labels_name) in zip(arrays, used)]


def keys_of(images):
    """A uint64 for each of the images uint8 [n, ...], by its bytes."""
    images = np.ascontiguousarray(images)
    return np.frombuffer(b"".join(hashlib.blake2b(image.data, digest_size=8).digest() for image in images), ">u8")


def pixels_of(array, what):
    """An array of images as uint8 [n, H, W] or [n, H, W, 3]; UserError where it cannot be meant so."""
    if array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)  # channels first
    if array.ndim not in (3, 4) or array.ndim == 4 and array.shape[3] not in (1, 3):
        raise UserError(f"{what} has the shape {'×'.join(map(str, array.shape))}, expected n×H×W, n×H×W×1 or n×H×W×3")
    array = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
    if array.dtype.kind not in "biuf" or not array.size or not np.isfinite(array).all() or array.min() < 0:
        values = (f"values from {array.min()}" if array.dtype.kind in "if" and array.size and np.isfinite(array).all() else
                  "values that are not finite numbers")
        raise UserError(f"{what} is of {array.dtype} with {values}, expected pixels of 0 to 255, or 0 to 1")
    top = array.max()
    if top > 255 or array.dtype.kind == "f" and 1.01 < top < 64:  # floats of another scale: 0 to 16, say
        raise UserError(f"{what} goes up to {top}, expected pixels of 0 to 255, or 0 to 1; rescale it")
    if top <= 1.01:
        array = (array * np.float32(255)).clip(0, 255)
    return array.round().astype(np.uint8) if array.dtype.kind == "f" else array.astype(np.uint8)


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
    number = labels.dtype.kind in "biuf"
    names = [str(int(label)) if number else text(label) for label in labels.tolist()]
    if (count := len(set(names))) > MOST_CLASSES:
        raise UserError(f"{what} holds {count:,} different labels for {len(names):,} images: a regression? Expected at most "
                        f"{MOST_CLASSES:,} classes")
    return names
