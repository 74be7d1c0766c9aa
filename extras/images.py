"""Images in files and folders, as a data set takes them: decoded by several threads, of one size, with or without colour.

    python caps.py --dataset letters           letters/train/CLASS/*.png and letters/test/CLASS/*.png, or letters/CLASS/*.png
"""

import concurrent.futures
import hashlib
import io
import os
import pathlib
import time
import unicodedata
import warnings

import numpy as np
from PIL import Image, ImageOps

from caps import UserError, first_line, progress
from caps.extras.runs import write_atomically

LARGEST_SIDE = 64   # pixels, without --size
TOGETHER = 64       # files that a thread takes at a time
SLOW = 3            # seconds of reading, after which what was read is kept for the next time
CACHE, CACHE_FORMAT = ".caps-cache.npz", 1
TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # photographs; Pillow's error remains


def counted(n, noun):
    return f"{n:,} {noun}{'s' * (n != 1)}"


def listing(names, most=3):
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


# ------------------------------------------------------------------------------------------------------------ one image

def natural_form(image):
    """((H, W), channels) of an opened image file, upright."""
    turned = image.getexif().get(0x0112, 1) > 4  # the tag Orientation
    grey = image.mode in ("1", "L", "LA", "La") or image.mode[0] in "IF"
    if image.mode == "P":
        red, *others = np.reshape(image.getpalette(), (-1, 3)).T
        grey = all(np.array_equal(red, other) for other in others)
    return (image.size if turned else image.size[::-1]), 1 if grey else 3


def at_most(size):
    """The size (H, W) that images of `size` are read at where none is asked for."""
    return (LARGEST_SIDE, LARGEST_SIDE) if max(size) > LARGEST_SIDE else tuple(size)


def read_image(path, size=None, channels=None):
    """An image file, by its path or opened -> (uint8 [H, W] or [H, W, 3], its own size (H, W), its pages, of which the
    first is read). Of `size`, by default its own up to 64×64, and 1 or 3 `channels`, by default its own; upright,
    transparent parts on the ground that strokes are seen on, 16 bits by their upper 8."""
    with Image.open(path) as file:
        natural, own = natural_form(file)
        size, channels = size or at_most(natural), channels or own
        pages = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # a phone's second picture is the same
        file.draft("L" if channels == 1 else None, (max(size), max(size)))  # JPEG: decoded at a fraction of its size
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":
            deep = np.nan_to_num(np.asarray(image, np.float32))
            scale = 1 / 257 if image.mode[0] == "I" else 255 if deep.max() <= 1.01 else 1
            image = Image.fromarray((deep * scale).clip(0, 255).round().astype(np.uint8))
        elif image.has_transparency_data:
            from caps.extras.reading import opaque  # of its packages other images have no need
            image = Image.fromarray((255 * opaque(image)).round().astype(np.uint8))
        return formed(image, size, channels), natural, pages


def formed(image, size, channels):
    """A Pillow image -> uint8 [H, W] or [H, W, 3]."""
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image)


def form_all(images, size, channels, name):
    """uint8 [n, H, W] or [n, H, W, 3] -> the same of `size` and `channels`, None as for read_image."""
    size, own = size or at_most(images.shape[1:3]), 3 if images.ndim == 4 else 1
    if (tuple(size), channels or own) == (images.shape[1:3], own):
        return images
    check_memory(name, len(images), size, channels or own)
    parts = progress(f"{os.path.basename(name)}: to {size[1]}×{size[0]} pixels", images)
    return np.stack([formed(Image.fromarray(image), size, channels or own) for image in parts])


def shrunk(natural):
    """What is said of images that no --size made smaller."""
    return (f"images of {natural[1]}×{natural[0]} pixels are resized to {LARGEST_SIDE}×{LARGEST_SIDE}"
            + ", which changes their shape" * (natural[0] != natural[1]) + "; --size N is another size")


def check_memory(name, count, size, channels):
    """UserError where so many images, of which there are two copies for a time, do not fit into this machine's memory."""
    need = 2 * count * size[0] * size[1] * channels
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else need
    if need > memory:
        raise UserError(f"--dataset {name}: {count:,} images of {size[1]}×{size[0]} pixels need {need / 2**30:.1f} GiB, "
                        f"this machine has {memory / 2**30:.1f}; take a smaller --size, or --grey")


# --------------------------------------------------------------------------------------------------- a folder of images

def read_folder(root, size, channels, say):
    """[(images, classes, keys) to train, perhaps those to test] of a folder's images; `say` receives in words what is
    left out. `size` and `channels` as for read_image; keys are uint64 by the files' bytes."""
    root = pathlib.Path(root)
    splits = find_splits(root, say)
    listed = [(path, split, class_name(folder)) for split, top in enumerate(splits)
              for folder in subfolders(top) for path in files_below(folder)]
    if not listed:
        flat = any(path.is_file() for path in splits[0].iterdir())
        raise UserError(f"--dataset {root}: " + "its files are in no folders of classes; name the folder above, or predict them"
                        * flat + "no images in folders CLASS/ or train/CLASS/ and test/CLASS/, and no IDX files "
                        "train-images…, train-labels…, test-images…, test-labels…" * (not flat))
    images, keys, kept = read_files(root, [path for path, _, _ in listed], size, channels, say)
    found = []
    for split, top in enumerate(splits):
        mine = [i for i, k in enumerate(kept) if listed[k][1] == split]
        found.append((images[mine], [listed[kept[i]][2] for i in mine], keys[mine]))
        if empty := [str(folder) for folder in subfolders(top) if class_name(folder) not in found[-1][1]]:
            say(f"{counted(len(empty), 'folder')} without images: {listing(empty)}")
    return found


def class_name(folder):
    """A folder's name as text, in whatever form its letters and bytes are."""
    return unicodedata.normalize("NFC", folder.name.encode(errors="backslashreplace").decode())


def subfolders(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def files_below(folder):
    """All files in a folder and those in it, but for hidden ones; each once, wherever links lead. OSError where one of
    them cannot be looked into."""
    def fail(error):
        raise error

    found, been = [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        again = os.path.realpath(place) in been
        been.add(os.path.realpath(place))
        folders[:] = [name for name in folders if not name.startswith(".") and not again]
        found += [pathlib.Path(place, name) for name in names if not name.startswith(".") and not again]
    return sorted(found)


def find_splits(root, say):
    """The folders of classes: [train, test], or one where there are no two."""
    folders = {folder.name.lower(): folder for folder in subfolders(root)}
    train, test = ([folders[name] for name in names if name in folders and subfolders(folders[name])]
                   for names in (TRAIN, TEST))
    top = [root]
    if train and (test or folders.keys() <= {*TRAIN, *TEST}):
        top = [train[0], *test[:1]]
    elif test and len(folders) == 1:
        top = test
    elif len(folders) == 1 and len(find_splits(*folders.values(), lambda line: None)) == 2:
        raise UserError(f"--dataset {root}: has one folder alone, with train and test in it; name "
                        f"{next(iter(folders.values()))}")
    elif folders and all(name.startswith(("train", "test", "val")) for name in folders) and len(folders) > 1:
        raise UserError(f"--dataset {root}: folders {listing(sorted(folders))} are no classes; expected train/CLASS/ and "
                        "test/CLASS/, or CLASS/ alone")
    left = [path for path in subfolders(root) if path not in top] if top != [root] else []
    stray = [path for folder in {root, *top} for path in folder.iterdir()
             if not path.is_dir() and not path.name.startswith(".")]
    for what, paths in (("folder", left), ("file", stray)):
        if paths:
            names = [str(path.relative_to(root)) for path in sorted(paths)]
            say(f"{counted(len(paths), what)} outside of the classes' folders left out: {listing(names)}")
    return top


def read_files(root, paths, size, channels, say):
    """(images uint8 [m, H, W] or [m, H, W, 3], their keys uint64 [m], which m of the paths they are). Kept in `root`
    where it took long."""
    files = hashlib.sha256()
    for path in paths:
        about = path.stat() if path.exists() else None  # a link to nowhere
        facts = about and (about.st_size, about.st_mtime_ns)
        files.update(f"{path.relative_to(root)}\0{facts}\0".encode(errors="surrogateescape"))
    asked = [CACHE_FORMAT, LARGEST_SIDE, *(size or (0, 0)), channels or 0]
    cache = read_cache(root / CACHE, files.hexdigest(), asked)
    if not cache:
        begun, said = time.perf_counter(), []
        images, keys, kept = decode(root, paths, size, channels, said.append)
        cache = {"files": files.hexdigest(), "asked": asked, "images": images, "keys": keys, "kept": kept, "said": said}
        if time.perf_counter() - begun > SLOW:
            try:
                write_atomically(root / CACHE, lambda path: np.savez(path, **cache))
            except UserError:  # a folder that cannot be written to
                pass
    for line in cache["said"]:
        say(line)
    return cache["images"], cache["keys"], list(cache["kept"])


def read_cache(path, files, asked):
    """What an earlier read_files has kept of the same files, in the form that is asked for, or that came of asking for
    none; None without it."""
    try:
        with np.load(path) as file:
            cache = {name: file[name] for name in file.files} if file["files"] == files else None
        images, before = cache["images"], cache["asked"].tolist()
        form = [*before[:2], *images.shape[1:3], 3 if images.ndim == 4 else 1]
        whole = images.dtype == np.uint8 and len(images) == len(cache["keys"]) == len(cache["kept"]) > 0
        return cache if whole and asked in (before, form) else None
    except Exception:  # none there, or none that can be read
        return None


def decode(root, paths, size, channels, say):
    """read_files, from the files. UserError where images differ in size and none is asked for."""
    stop = []

    def read(part):
        return [attempt(paths[k], size, channels) for k in part if not stop]

    images, keys, kept, unread, several, first = [], [], [], [], [], None
    threads = concurrent.futures.ThreadPoolExecutor()
    parts = [range(start, min(start + TOGETHER, len(paths))) for start in range(0, len(paths), TOGETHER)]
    try:
        with progress(f"{root.name}: reading", total=len(paths), unit=" files") as bar:
            for part, results in zip(parts, threads.map(read, parts)):
                for k, (image, natural, pages, key) in zip(part, results):
                    name = str(paths[k].relative_to(root))
                    if image is None:
                        unread.append(f"{name} ({key})")
                        continue
                    first = first or (name, natural)
                    if natural != first[1] and not size:
                        raise UserError("--dataset {}: images differ in size, {} is {}×{} and {} is {}×{}; add --size N, 28 "
                                        "say".format(root, *first[:1], *first[1][::-1], name, *natural[::-1]))
                    if not images:
                        check_memory(str(root), len(paths), image.shape[:2], image[..., None].shape[2])
                    several += [name] * (pages > 1)
                    images.append(image)
                    keys.append(key)
                    kept.append(k)
                bar.update(len(part))
    finally:
        stop.append(True)
        threads.shutdown(cancel_futures=True)
    if not images:
        raise UserError(f"--dataset {root}: none of its {counted(len(paths), 'file')} can be read as an image: "
                        f"{listing(unread)}")
    for what, names in (("cannot be read as images, left out", unread), ("with several pages, the first is read", several)):
        if names:
            say(f"{len(names)} of {counted(len(paths), 'file')} {what}: {listing(names)}")
    if not size and max(first[1]) > LARGEST_SIDE:
        say(shrunk(first[1]))
    if len({image.ndim for image in images}) > 1:  # some of them without colour
        images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, 2) for image in images]
    return np.stack(images), np.array(keys, np.uint64), kept


def attempt(path, size, channels):
    """(image, its own size, pages, key) of a file, or (None, None, None, why not)."""
    try:
        if not path.is_file():
            return None, None, None, "no file"
        content = path.read_bytes()
        key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        return *read_image(io.BytesIO(content), size, channels), key
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        reason = "no image" if isinstance(error, Image.UnidentifiedImageError) else first_line(error)
        return None, None, None, getattr(error, "strerror", None) or reason
