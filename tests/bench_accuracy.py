"""Accuracies that hold: settings of training, each with several seeds, one run after the other."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import unittest.mock
from pathlib import Path

import torch

import caps
from bench_training import plain_layers
from caps.extras import faster, results
from timing import machine

ROOT = Path(__file__).parent.parent
BENCH = str(ROOT / "tests/bench.py")

# Of each setting the number of seeds and a command of run.sh (train, ddp N) or of bench.py (plain), without --seed and
# --out. First what the study describes, then what its code did (docs/report), then what was chosen on held-out images.
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
    "alexcaps-bf16": (1, "train --model alexcaps --epochs 1 --amp bf16"),  # for times: ResCapsNet's amp
    "alexcaps-plain": (1, "plain --model alexcaps --epochs 20"),
}


def setting(text):
    """(name, number of seeds, command) of NAME, one of SETTINGS, or of 'NAME=command'."""
    name, given, command = text.partition("=")
    if given:
        return name, 1, command
    if name not in SETTINGS:
        raise argparse.ArgumentTypeError(f"no setting {name}; there are {', '.join(SETTINGS)}, or name one: 'NAME=train --lr 0.002'")
    return name, *SETTINGS[name]


def train_plain(words):
    """caps.py train with plain layers and routing, Adam as it comes and denormal numbers as they are."""
    def start(args, world, fast=None, start=caps.start_run):
        faster.keep_freed_memory()  # else as the fast one
        run = start(args, world)
        run.optimizer = torch.optim.Adam(plain_layers(run.model).parameters(), lr=run.args.lr)
        return run
    caps.start_run = start
    return caps.train(caps.parse(["train", *words]), results.write_results)


def launched(command, device):
    """(what starts a setting's command, number of processes, words for caps.py train)."""
    way, *words = command.split()
    count = int(words.pop(0)) if way == "ddp" else 1
    starts = {"train": [sys.executable, str(ROOT / "caps.py"), "train"], "plain": [sys.executable, BENCH, "plain"],
              "ddp": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
                      str(ROOT / "caps.py"), "train"]}
    return starts[way], count, [*words, "--device", device]


def finished(folder, count, words):
    """summary.json's content of a run that has all its epochs, or None. SystemExit where the folder holds another."""
    if not (folder / "summary.json").exists():
        return None
    with unittest.mock.patch.dict(os.environ, WORLD_SIZE=str(count)):
        wanted = vars(caps.parse(["train", *words]))
    facts = caps.LATER | json.loads((folder / "summary.json").read_text())
    differing = [key for key in caps.RECIPE if key != "dataset" and facts[key] != wanted[key]]
    differing += ["world_size"] * (facts["world_size"] != count) + ["epochs"] * (facts["epochs"] > wanted["epochs"])
    if differing:
        sys.exit(f"{folder}: holds a run of another setting, it differs in {', '.join(differing)}; remove it, or name "
                 "another folder by --runs")
    return facts if facts["epochs"] == wanted["epochs"] else None


def trained(folder, command, seed, device):
    """summary.json's content of a setting's run with one seed, which is begun, gone on with, or there already."""
    start, count, words = launched(command, device)
    words += ["--seed", str(seed)]
    if not (facts := finished(folder, count, words)):
        threads = str(max(1, torch.get_num_threads() // count))
        again = ["--resume"] if (folder / "last.pt").exists() else []
        done = subprocess.run([*start, *words, "--out", str(folder), *again], env=os.environ | {
            "OMP_NUM_THREADS": threads, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})  # the latter as run.sh has it
        if done.returncode:
            sys.exit(f"{folder}: stopped with status {done.returncode}; the same command goes on from there")
        facts = finished(folder, count, words)
    return facts


def spread(values, form="{:.2f}"):
    """Mean ± standard deviation of a sample, of one value itself."""
    return " ± ".join(form.format(f(values)) for f in (statistics.mean, statistics.stdev)[:len(values)])


def accuracy(options):
    """Test accuracy after the last epoch of each setting: mean and standard deviation over seeds."""
    rows = []
    for name, count, command in options.settings or map(setting, SETTINGS):
        seeds = options.seeds or range(1, count + 1)
        found = [trained(options.runs / name / f"seed-{seed}", command, seed, options.device) for seed in seeds]
        accuracies = [round(100 * facts["test_accuracy"], 6) for facts in found]
        rows.append({"setting": name, "command": command, "seeds": [*seeds], "accuracies": accuracies, "n": len(found),
                     "mean": statistics.mean(accuracies),
                     "deviation": statistics.stdev(accuracies) if len(found) > 1 else None,
                     "seconds_per_epoch": min(facts["seconds_per_epoch"] for facts in found),
                     **{key: sorted({facts[key] for facts in found}) for key in ("dataset", "device", "torch")}})
        print("{0:<24}{1:>14} %  n = {n}  {seconds_per_epoch:>7.1f} s an epoch  {command}".format(
            name, spread(accuracies), **rows[-1]), flush=True)
    return {"command": "accuracy", "machine": machine(options.device), "rows": rows}
