"""Accuracies that hold: settings of training, each with several seeds, one run after the other."""
import argparse
import collections
import functools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

import caps
from bench_training import BENCH, plain_layers
from caps.extras import faster, results
from caps.extras.compare import spread
from common import CAPS
from timing import machine

# Of each setting the number of seeds and a command of run.sh (train, ddp N) or of bench.py (plain), without --seed and
# --out: first what the study describes, then what its published code did, then what was chosen on held-out training
# images (for AlexCapsNet; ResCapsNet's is like it), then single epochs for times, with nothing beside them, then what
# other comparisons take.
SETTINGS = {
    "alexcaps": (3, "train --model alexcaps --epochs 20"),
    "alexcaps-ddp4": (3, "ddp 4 --model alexcaps --epochs 20 --amp bf16"),
    "alexcaps-ddp4-unscaled": (3, "ddp 4 --model alexcaps --epochs 20 --amp bf16 --lr-scale none --warmup 0"),
    "rescaps": (3, "train --model rescaps --epochs 20 --amp bf16"),
    "rescaps-ddp4": (3, "ddp 4 --model rescaps --epochs 10 --amp bf16"),
    "alexcaps-code": (1, "train --model alexcaps --epochs 10 --batch-size 128 --gamma 1"),
    "alexcaps-code-ddp4": (1, "ddp 4 --model alexcaps --epochs 20 --amp bf16 --batch-size 128 --gamma 1 --lr-scale none "
                              "--warmup 0"),
    "rescaps-code": (1, "train --model rescaps --epochs 20 --amp bf16 --rotate 0 --gamma 1"),
    "alexcaps-best": (3, "train --model alexcaps --epochs 50 --step-size 8 --shift 2 --ema 0.9995"),
    "rescaps-best": (3, "train --model rescaps --epochs 20 --step-size 3 --shift 2 --ema 0.999 --amp bf16"),
    "alexcaps-epoch": (1, "train --model alexcaps --epochs 1"),
    "alexcaps-epoch-bf16": (1, "train --model alexcaps --epochs 1 --amp bf16"),
    "alexcaps-epoch-ddp4": (1, "ddp 4 --model alexcaps --epochs 1 --amp bf16"),
    "rescaps-epoch": (1, "train --model rescaps --epochs 1 --amp bf16"),
    "rescaps-epoch-ddp4": (1, "ddp 4 --model rescaps --epochs 1 --amp bf16"),
    "alexcaps-epoch-best": (1, "train --model alexcaps --epochs 1 --shift 2 --ema 0.9995"),
    "rescaps-epoch-best": (1, "train --model rescaps --epochs 1 --shift 2 --ema 0.999 --amp bf16"),
    "alexcaps-epoch-code": (1, "train --model alexcaps --epochs 1 --batch-size 128"),
    "alexcaps-epoch-code-ddp4": (1, "ddp 4 --model alexcaps --epochs 1 --amp bf16 --batch-size 128"),
    "rescaps-epoch-code": (1, "train --model rescaps --epochs 1 --rotate 0 --amp bf16"),
    "alexcaps-plain": (1, "plain --model alexcaps --epochs 20"),
}
NEEDED = {"test_accuracy": float, "epochs": int, "seconds_per_epoch": float, "dataset": str, "device": str, "torch": str,
          "warmup": float}
GIVEN_HERE = {"seed", "out", "overwrite", "resume", "device", "check"}

Setting = collections.namedtuple("Setting", "name count command way processes words wanted")  # wanted: parsed words


def setting(text):
    """The Setting of NAME, one of SETTINGS, or of 'NAME=command'."""
    name, given, command = text.partition("=")
    count, command = (1, command) if given else SETTINGS.get(name, (0, ""))
    way, *words = command.split() or [""]
    if not count:
        raise argparse.ArgumentTypeError(f"no setting {name}; there are {', '.join(SETTINGS)}, or name one: "
                                         "'NAME=train --lr 0.002'")
    processes = int(words.pop(0)) if way == "ddp" and words and words[0].isdecimal() else 2 if way == "ddp" else 1
    if way not in ("train", "plain", "ddp") or processes < 1 or Path(name).name != name or name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=train, ddp N or plain, and options of caps.py train")
    try:
        with mock.patch.dict(os.environ, WORLD_SIZE=str(processes)):  # which the defaults depend on
            wanted = caps.parse(["train", *words])
    except caps.UserError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from error
    if clash := GIVEN_HERE & wanted.given:
        raise argparse.ArgumentTypeError(f"{name}: leave out {', '.join(f'--{option}' for option in sorted(clash))}, which "
                                         "bench.py gives itself")
    return Setting(name, count, command, way, processes, words, wanted)


def train_plain(words):
    """caps.py train with plain layers and routing, Adam as it comes and denormal numbers as they are."""
    def start(args, world, fast=None, start=caps.start_run):
        run = start(args, world)
        fused, run.optimizer = run.optimizer, torch.optim.Adam(plain_layers(run.model).parameters(), lr=run.args.lr)
        if run.steps:
            run.optimizer.load_state_dict(fused.state_dict())
            run.optimizer.param_groups[0]["fused"] = None
        return run

    def write(folder, what, facts, *more, write=results.write_results):
        write(folder, what, facts | {"layers": "plain"}, *more)
    with mock.patch("caps.start_run", start), mock.patch(
            "caps.extras.faster.prepare_process", faster.keep_freed_memory), mock.patch("caps.extras.results.write_results", write):
        return caps.main(["train", *words])


def held(folder, setting, seed):
    """What the folder of a run tells of it, the content of summary.json if all its epochs are over and of last.pt's
    recipe else; {} of none. A run of another setting or seed is refused."""
    facts, path = {}, folder / "summary.json"
    if (folder / "last.pt").exists():
        checkpoint = caps.read_checkpoint(folder / "last.pt")
        facts = checkpoint["config"] | {"epochs": len(checkpoint["history"])}
        if (folder / "begun.json").exists():
            facts |= json.loads((folder / "begun.json").read_text())
    if path.exists():
        try:
            told = caps.LATER | json.loads(path.read_text())
            told |= {key: kind(told[key]) for key, kind in NEEDED.items()}
            if not math.isfinite(told["test_accuracy"]):
                raise ValueError("no accuracy")
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise caps.UserError(f"{path}: damaged ({error}); remove it") from error
        facts = facts if facts and facts["epochs"] != told["epochs"] else told
    if not facts:
        return {}
    wanted = vars(setting.wanted) | way_of(setting) | {"seed": seed}
    # By default the data decide on two of them, the device on another.
    keys = [key for key in caps.RECIPE if key not in ("dataset", "warmup", "amp") or key in wanted["given"]]
    keys += ["world_size", "layers"] * ("world_size" in facts)  # of earlier versions' unfinished runs this is not known
    differing = [key for key in keys if facts.get(key) != wanted[key] and (key, wanted[key]) != ("dataset", "auto")]
    differing += ["warmup"] * ("warmup" not in keys and facts["warmup"] < wanted["warmup"])  # data only ever raise it
    if differing or facts["epochs"] > wanted["epochs"]:
        raise caps.UserError(f"{folder}: holds a run of another setting, it differs in {', '.join(differing or ['epochs'])}; "
                             "remove it, or name another folder by --runs")
    return facts


def way_of(setting):
    return {"world_size": setting.processes, "layers": "plain" if setting.way == "plain" else None}


def finished(facts, setting):
    return "test_accuracy" in facts and facts["epochs"] == setting.wanted.epochs


def finished_there(folder, setting, seed):
    """`held` of a run whose epochs are all over, else {}; what cannot be read is a line on stderr."""
    try:
        facts = held(folder, setting, seed)
    except caps.UserError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return {}
    return facts if finished(facts, setting) else {}


def trained(folder, setting, seed, device):
    """summary.json's content of a setting's run with one seed, which is begun, gone on with, or there already."""
    facts = held(folder, setting, seed)
    if not finished(facts, setting):
        start = {"train": [CAPS, "train"], "plain": [BENCH, "plain"],
                 "ddp": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.processes),
                         CAPS, "train"]}[setting.way]
        words = [*setting.words, "--epochs", str(setting.wanted.epochs), "--device", device, "--seed", str(seed), "--out",
                 str(folder), *["--resume"] * bool(facts)]
        threads = max(1, torch.get_num_threads() // setting.processes)
        if setting.way == "ddp":  # a mistake is refused once, without torchrun's account of it
            status = wait_for([sys.executable, CAPS, "train", *words, "--check"], threads, LOCAL_WORLD_SIZE=str(setting.processes))
            if status:
                raise caps.UserError(f"{folder}: nothing was trained, status {status}")
        if not facts:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "begun.json").write_text(json.dumps(way_of(setting)))  # a checkpoint does not tell
        status = wait_for([sys.executable, *start, *words], threads)
        if status:
            kept = "; the same command goes on from there" * (status != 2 and (folder / "last.pt").exists())
            raise caps.UserError(f"{folder}: stopped with status {status}{kept}")
        facts = held(folder, setting, seed)
        if not finished(facts, setting):
            raise caps.UserError(f"{folder}: not finished, though the training ended well")
    return facts


def wait_for(words, threads, **variables):
    """The exit status of a process, which is passed SIGINT and SIGTERM and then has the time to save."""
    process = subprocess.Popen(words, start_new_session=True, env=os.environ | variables | {
        "OMP_NUM_THREADS": str(threads), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})  # the latter as run.sh has it
    before = {number: signal.signal(number, lambda number, frame: process.send_signal(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def row_of(setting, found, runs):
    """A row of the table, of {seed: summary.json's content}."""
    sets, devices, versions = (sorted({facts[key] for facts in found.values()}) for key in ("dataset", "device", "torch"))
    if len(sets) > 1:
        raise caps.UserError(f"{runs / setting.name}: holds runs on {' and '.join(sets)}; add --dataset to the setting")
    accuracies = [round(100 * facts["test_accuracy"], 6) for facts in found.values()]
    return {"setting": setting.name, "command": setting.command, "seeds": list(found), "accuracies": accuracies, "n": len(found),
            "mean": statistics.mean(accuracies), "deviation": statistics.stdev(accuracies) if len(found) > 1 else None,
            "seconds_per_epoch": min(facts["seconds_per_epoch"] for facts in found.values()),
            "dataset": sets[0], "devices": devices, "torch": versions}


def accuracy(options):
    """Test accuracy after the last epoch of each setting: mean and standard deviation over seeds."""
    rows, get = [], finished_there if options.finished else functools.partial(trained, device=options.device)
    for each in options.settings or map(setting, SETTINGS):
        seeds = options.seeds or range(1, each.count + 1)
        told = {seed: get(options.runs / each.name / f"seed-{seed}", each, seed) for seed in dict.fromkeys(seeds)}
        found = {seed: facts for seed, facts in told.items() if facts}
        lacking = [str(seed) for seed in told if seed not in found]
        if lacking and (found or options.settings):
            print(f"bench.py: {each.name}: no finished run of seed {', '.join(lacking)}", file=sys.stderr)
        if not found:
            continue
        rows.append(row_of(each, found, options.runs))
        print("{0:<24}{1:>14} % of {dataset}  n = {n}  {seconds_per_epoch:>7.1f} s an epoch, {2}  {command}".format(
            each.name, spread(rows[-1]["accuracies"]), "; ".join(rows[-1]["devices"]), **rows[-1]), flush=True)
    if not rows:
        raise caps.UserError(f"{options.runs}: no finished run of these settings; leave out --finished to train them")
    return {"command": "accuracy", "rows": rows} | ({} if options.finished else {"machine": machine(options.device)})
