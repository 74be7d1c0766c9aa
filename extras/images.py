"""Images in files and folders, as a data set takes them: decoded by several threads, of one size, with or without colour.

    python caps.py --dataset letters           letters/train/CLASS/*.png and letters/test/CLASS/*.png, or letters/CLASS/*.png
"""

import concurrent.futures
import hashlib
import os
import pathlib
import time

import numpy as np
from PIL import Image, ImageOps

from caps import UserError, first_line, progress
from caps.extras.runs import write_atomically

LARGEST_SIDE = 64   # pixels, without --size
TOGETHER = 64       # files that a thread takes at a time
SLOW = 3            # seconds of reading, after which what was read is kept for the next time
CACHE = ".caps-cache.npz"
TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")


# ------------------------------------------------------------------------------------------------------------ one image

def natural_form(image):
    """((H, W), channels) of an opened image file, upright."""
    turned = image.getexif().get(0x0112, 1) > 4  # the tag Orientation
    channels = 1 if image.mode in ("1", "L", "LA", "La") or image.mode[0] in "IF" else 3
    return (image.size if turned else image.size[::-1]), channels


def at_most(size):
    """The size (H, W) that images of `size` are read at where none is asked for."""
    return (LARGEST_SIDE, LARGEST_SIDE) if max(size) > LARGEST_SIDE else tuple(size)


def read_image(path, size=None, channels=None):
    """An image file -> (uint8 [H, W] or [H, W, 3], its own size (H, W)). Of `size`, by default its own up to 64×64,
    and 1 or 3 `channels`, by default its own; upright, transparent parts on the ground that strokes are seen on."""
    with Image.open(path) as file:
        natural, own = natural_form(file)
        size, channels = size or at_most(natural), channels or own
        file.draft("L" if channels == 1 else None, (max(size), max(size)))  # JPEG: decoded at a fraction of its size
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF" or image.has_transparency_data:
            from caps.extras.reading import opaque  # of its packages others have no need
            image = Image.fromarray((255 * opaque(image)).round().astype(np.uint8).squeeze())
        return formed(image, size, channels), natural


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
    parts = progress(f"{name}: to {size[0]}×{size[1]} pixels", images)
    return np.stack([formed(Image.fromarray(image), size, channels or own) for image in parts])


def check_memory(name, count, size, channels):
    """UserError where so many images do not fit into this machine's memory."""
    need = count * size[0] * size[1] * channels
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else need
    if need > memory:
        raise UserError(f"--dataset {name}: {count:,} images of {size[0]}×{size[1]} pixels need {need / 2**30:.1f} GiB, "
                        f"this machine has {memory / 2**30:.1f}; take a smaller --size, or --grey")


# --------------------------------------------------------------------------------------------------- a folder of images

def read_folder(root, size, channels, say):
    """[(images, classes) to train, perhaps those to test] of a folder's images; `say` receives in words what is left out.
    Of `size` and `channels`, as for read_image, all of them."""
    root = pathlib.Path(root)
    splits = find_splits(root, say)
    listed = [(path, split, folder.name) for split, top in enumerate(splits) for folder in subfolders(top)
              for path in files_below(folder)]
    if not listed:
        raise UserError(f"--dataset {root}: no images in folders CLASS/ or train/CLASS/ and test/CLASS/, and no IDX files "
                        "train-images…, train-labels…, test-images…, test-labels…")
    images, kept = read_files(root, [path for path, _, _ in listed], size, channels, say)
    places = [[i for i, k in enumerate(kept) if listed[k][1] == split] for split in range(len(splits))]
    found = [(images[mine], [listed[kept[i]][2] for i in mine]) for mine in places]
    empty = [str(folder) for top, (_, names) in zip(splits, found) for folder in subfolders(top) if folder.name not in names]
    if empty:
        say(f"{len(empty)} folders without images: {listing(empty)}")
    return found


def subfolders(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def files_below(folder):
    """All files in a folder and those in it, but for hidden ones; each once, wherever links lead."""
    found, been = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        again = os.path.realpath(place) in been
        been.add(os.path.realpath(place))
        folders[:] = [name for name in folders if not name.startswith(".") and not again]
        found += [pathlib.Path(place, name) for name in names if not name.startswith(".") and not again]
    return sorted(found)


def find_splits(root, say):
    """The folders of classes: [train, test], or one where there are no two."""
    folders = {folder.name.lower(): folder for folder in subfolders(root)}
    train, *others = [[folders[name] for name in names if name in folders] for names in (TRAIN, TEST)]
    tests = others[0]
    if train and (tests or len(folders) == 1):
        top = [train[0], *tests[:1]]
        left = [path for path in subfolders(root) if path not in top]
    else:
        top, left = [root], []
    stray = [path for folder in {root, *top} for path in folder.iterdir()
             if path.is_file() and not path.name.startswith(".")]
    for what, paths in (("folders", left), ("files outside of the classes' folders", stray)):
        if paths:
            say(f"{len(paths)} {what} left out: {listing([str(path.relative_to(root)) for path in sorted(paths)])}")
    return top


def read_files(root, paths, size, channels, say):
    """(images uint8 [m, H, W] or [m, H, W, 3], which m of the paths they are). Kept in `root` where it took long."""
    key = hashlib.sha256(repr((size, channels, LARGEST_SIDE)).encode())
    for path in paths:
        about = path.stat() if path.exists() else None  # a link to nowhere
        facts = about and (about.st_size, about.st_mtime_ns)
        key.update(f"{path.relative_to(root)}\0{facts}\0".encode(errors="surrogateescape"))
    try:
        with np.load(root / CACHE) as cache:
            if cache["key"] == key.hexdigest():
                for line in cache["said"].tolist():
                    say(line)
                return cache["images"], cache["kept"].tolist()
    except Exception:  # none there, or none that can be read
        pass
    begun, said = time.perf_counter(), []
    images, kept = decode(root, paths, size, channels, said.append)
    for line in said:
        say(line)
    if time.perf_counter() - begun > SLOW:
        content = {"key": key.hexdigest(), "images": images, "kept": kept, "said": said}
        try:
            write_atomically(root / CACHE, lambda path: np.savez(path, **content))
        except UserError:  # a folder that cannot be written to
            pass
    return images, kept


def decode(root, paths, size, channels, say):
    """read_files, from the files. UserError where images differ in size and none is asked for."""
    def read(part):
        results = []
        for path in part:
            try:
                results.append(read_image(path, size, channels))
            except Exception as error:  # Pillow's decoders raise a dozen kinds
                results.append(getattr(error, "strerror", None) or first_line(error))
        return results

    images, kept, unread, first = [], [], [], None
    threads = concurrent.futures.ThreadPoolExecutor()
    parts = [paths[start:start + TOGETHER] for start in range(0, len(paths), TOGETHER)]
    try:
        with progress(f"{root.name}: reading", total=len(paths), unit=" files") as bar:
            for part, results in zip(parts, threads.map(read, parts)):
                for path, result in zip(part, results):
                    if isinstance(result, str):
                        unread.append(path)
                        continue
                    image, natural = result
                    first = first or (path, natural)
                    if natural != first[1] and not size:
                        raise UserError("images differ in size, {} is {}×{} and {} is {}×{}: add --size N, 28 say".format(
                            *(word for path, (h, w) in (first, (path, natural)) for word in (path, w, h))))
                    if not images:
                        check_memory(root.name, len(paths), image.shape[:2], image[..., None].shape[2])
                    kept.append(len(kept) + len(unread))
                    images.append(image)
                bar.update(len(part))
    finally:
        threads.shutdown(cancel_futures=True)
    if not images:
        raise UserError(f"{root}: none of its {len(paths)} files can be read as an image ({paths[0].name} and others)")
    if unread:
        say(f"{len(unread)} of {len(paths)} files cannot be read as images, left out: "
            f"{listing([str(path.relative_to(root)) for path in unread])}")
    if not size and max(first[1]) > LARGEST_SIDE:
        say(f"images of {first[1][1]}×{first[1][0]} pixels are resized to {LARGEST_SIDE}×{LARGEST_SIDE}; --size N is "
            "another size")
    if len({image.ndim for image in images}) > 1:  # some of them without colour
        images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, 2) for image in images]
    return np.stack(images), kept


def listing(names, most=3):
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)
