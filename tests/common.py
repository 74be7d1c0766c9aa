"""What the tests share: the real command line, its refusals, and small data."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import caps

ROOT = Path(__file__).parent.parent
CAPS = str(ROOT / "caps.py")
RUN = ROOT / "run.sh"
SET_UP = (Path(sys.prefix) / ".caps-setup").exists()  # this environment was made by run.sh
FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
         "t10k": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}


def command(*words, cwd, **environment):
    """The real command line, finished: its status and what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "CAPS_DATA"} | environment
    return subprocess.run([sys.executable, CAPS, *map(str, words)], cwd=cwd, env=environment, capture_output=True,
                          text=True, timeout=400)


ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "CAPS_DATA"} | {
    "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # the latter as run.sh has it


def torchrun(processes, *words, cwd, program=CAPS, options=("--standalone",), **environment):
    """The real torchrun with `program`, finished."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *options, str(program),
         *map(str, words)], cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=600)


def refused(result, *expected):
    """Status 2, and one line that holds the expected words; no traceback."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("caps: native backend")]
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert len(lines) == 1 and lines[0].startswith("caps: ") and all(word in lines[0] for word in expected), lines


def write_idx(path, array):
    header = (0x0800 + array.ndim).to_bytes(4, "big") + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def no_download(monkeypatch):
    from torchvision import datasets

    def fail(*args, **kwargs):
        raise RuntimeError("Error downloading train-images")
    monkeypatch.setattr(datasets, "MNIST", fail)


def start(small, folder, *words, fast=None):
    """A run in this process, ready to train on the small set."""
    args = caps.parse(["train", "--dataset", "mnist", "--data-dir", str(small), "--device", "cpu", "--out", str(folder), *words])
    return caps.start_run(args, caps.World(0, 1, torch.device("cpu")), fast)
