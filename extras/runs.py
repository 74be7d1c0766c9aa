"""The folder of a run: which one it is, whether it can be written to, and files that are written whole or not at all."""

import contextlib
import csv
import itertools
import os
import pathlib
import sys
import tempfile
import zipfile

import torch

import caps
from caps import COLUMNS, MODELS, RECIPE, UserError, read_checkpoint, set_title

DECODED_FILES = "reconstructions.png", "dimensions.png"  # of a network with a decoder alone
RUN_FILES = ("last.pt", "metrics.csv", "summary.json", "curves.png", "confusion.png", "roc.png", "misclassified.png",
             *DECODED_FILES)
# Trained networks that come along (docs/measurements.md tells how they were made): --checkpoint takes their names.
NETWORKS = {name: pathlib.Path(__file__).resolve().with_name("networks") / f"{name}.pt" for name in MODELS}
# One name for all processes and restarts of a job; torchrun's own is unique with --standalone alone.
JOB = os.environ.get("CAPS_JOB", "") + os.environ.get("TORCHELASTIC_RUN_ID", "")


def folder_of(checkpoint):
    """Where a checkpoint's evaluations go: beside it; of a network that comes along below runs/."""
    path = pathlib.Path(checkpoint)
    return pathlib.Path("runs", "networks", path.stem) if path.resolve() in NETWORKS.values() else path.parent


def tell_network(args):
    """Name on stderr the network that comes along, where no --checkpoint was given."""
    if "checkpoint" not in args.given:
        print(f"caps: network {pathlib.Path(args.checkpoint).stem}, which comes along; --checkpoint names another", file=sys.stderr)


def find_resume(args):
    """The checkpoint to go on from, or None: what --resume names, or after a restart by torchrun this job's newest one;
    without a file's name that is last.pt of --out, or the newest of the model's default folders."""
    folder = args.out or (pathlib.Path(args.resume).parent if args.resume and args.resume != "newest" else None)
    pattern = "last.pt" if folder else f"{args.model}-*/last.pt"
    found = sorted(pathlib.Path(folder or "runs").glob(pattern), key=os.path.getmtime, reverse=True)
    # torchrun does not count restarts that another machine is the cause of; run.sh names each job, so none is missed.
    if os.environ.get("CAPS_JOB") or JOB and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0"):
        for path in found:
            with contextlib.suppress(UserError):  # a damaged one is not this job's
                if read_checkpoint(path).get("job") == JOB:
                    return str(path)
    if args.resume == "newest":
        if not found:
            raise UserError(f"--resume: no {folder or 'runs'}/{pattern} here; name a checkpoint file")
        return str(found[0])
    return args.resume


def settle_resume(args):
    """(args, the checkpoint to go on from or None): the recipe and the folder are taken from the checkpoint. An option
    that contradicts it is a UserError; --epochs and --out may differ."""
    args.resume = find_resume(args)
    if not args.resume:
        return args, None
    checkpoint = read_checkpoint(args.resume)
    if lacking := {"job", "rng", "totals"} - checkpoint.keys():
        why = f"lacks {', '.join(sorted(lacking))}" if checkpoint["optimizer"] else "holds the network alone"
        raise UserError(f"{args.resume}: cannot be gone on with, it {why}; it can be used")
    if checkpoint["config"]["holdout"] and "format" not in checkpoint:
        raise UserError(f"{args.resume}: of an earlier version, which held out the last images; it can be used, but not "
                        "gone on with")
    for key in RECIPE:
        given, value = getattr(args, key), checkpoint["config"][key]
        moved = key == "dataset" and key in args.given and os.path.isabs(given) and os.path.isabs(value)  # see digest
        if key in args.given and given != value and (key, given) != ("dataset", "auto") and not moved:
            raise UserError(f"--{key.replace('_', '-')} {given}: {args.resume} was trained with {value}; leave the "
                            "option out, or start a new run")
        setattr(args, key, given if moved else value)
    if args.amp == "fp16" and caps.lacks_gpu(args):
        raise UserError(f"--resume {args.resume}: was trained with --amp fp16, which needs a GPU")
    if "epochs" not in args.given:
        args.epochs = checkpoint["config"]["epochs"]
    args.out = args.out or str(pathlib.Path(args.resume).parent)
    return args, checkpoint


def files_to_replace(args):
    """The files of another run in --out; a UserError unless --overwrite gives them up."""
    folder = pathlib.Path(args.out or "")
    if not args.out or args.resume and (folder / "last.pt").resolve() == pathlib.Path(args.resume).resolve():
        return []
    held = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if held and not args.overwrite:
        raise UserError(f"--out {folder}: holds a run ({held[0].name}); add --resume to go on with it, --overwrite to "
                        "replace it, or name another folder")
    return held


def check_writable(folder, option="--out"):
    """A UserError where no file can be made in `folder`, which may have to be made first; nothing is left there."""
    folder = pathlib.Path(folder)
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise UserError(f"{folder}: no files can be made there ({nearest}: {error.strerror}); mend it, or name another "
                        f"folder by {option}") from error


def make_folder(args):
    """The folder to write to: --out, or a new one below runs/, made."""
    if args.out:
        pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
        return pathlib.Path(args.out)
    pathlib.Path("runs").mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = pathlib.Path(f"runs/{args.model}-{set_title(args.dataset)}{f'-{number}' if number > 1 else ''}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def naming_checkpoint(folder, write):
    """`write()`, whose UserError names the checkpoint that is left; a folder with nothing in it goes."""
    try:
        write()
    except UserError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        kept = folder / "last.pt"
        if not kept.exists():
            raise UserError(f"{error}; nothing was trained yet") from error
        checkpoint = read_checkpoint(kept)
        raise UserError(f"{error}; {kept} is whole, of epoch {len(checkpoint['history'])} and step "
                        f"{checkpoint['steps']}: go on from there by --resume {kept}") from error


def write_atomically(path, write):
    """Let `write(temporary_path)` make a file, then rename it to `path`, whose folder is made: a kill leaves the old or
    the new one whole. UserError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")  # the suffix tells savefig the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_sums(path):
    """A UserError where a part of a checkpoint is not as it was written, which torch.load does not look at."""
    damaged = None
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:  # what is no zip file, torch.load judges
        damaged = archive.testzip()
    if damaged:
        raise UserError(f"{path}: is damaged, {damaged} in it does not fit its checksum; take another copy of it")


def write_checkpoint(path, content):
    try:
        torch.save(content, path)
    except RuntimeError:  # in its archive's own words; Python's, for one more block, say why
        with open(path, "ab") as file:
            file.write(bytes(2 ** 20))
        raise  # of something else


def write_metrics(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
