"""This machine and whoever started this process on it: devices, bf16, and the variables of a launcher."""

import contextlib
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import threading
import time

import torch

import caps
from caps import UserError, first_line

# What torchrun sets, other launchers partly; and what one process alone takes in their place.
ALONE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}


def launched():
    """(rank, processes, rank on this machine, processes on it), as a launcher's variables tell. UserError names what is
    wrong or lacking in them."""
    numbers = {name: os.environ.get(name) or str(alone) for name, alone in ALONE.items()}
    for name, text in (numbers | {"MASTER_PORT": os.environ.get("MASTER_PORT") or "0"}).items():
        if not re.fullmatch("[0-9]{1,5}", text):
            raise UserError(f"{name}={text}: expected a whole number, as torchrun sets it; to train alone unset it")
    rank, size, local, here = map(int, numbers.values())
    if size <= 1 and not rank:
        return 0, 1, 0, here  # run.sh's check is of LOCAL_WORLD_SIZE processes to come
    lacking = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if lacking or rank >= size:
        wrong = f"{', '.join(lacking)} not set" if lacking else f"RANK is not below WORLD_SIZE={size}"
        given = " ".join(f"{name}={os.environ[name]}" for name in ALONE if os.environ.get(name))
        raise UserError(f"{given}: {wrong}; start by torchrun or ./run.sh ddp, or, to train alone, unset "
                        f"{' '.join(ALONE)}")
    return rank, size, local, here


def torchrun_waits():
    """Whether torchrun started this process and waits for it; its variables alone may be left over."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        parent = pathlib.Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:  # not Linux
        parent, ps = "", ["ps", "-o", "command=", "-p", str(os.getppid())]
        with contextlib.suppress(OSError):  # nor macOS
            parent = subprocess.run(ps, capture_output=True, text=True).stdout
    return bool(re.match(r"\S*(torchrun|accelerate|python[\d.]*)\s", parent) and  # no script of another name
                re.search(r"(^|[\s/])(torchrun|accelerate|torch\.distributed\.(run|launch))\s", parent))


def choose_device(name, local=0, here=1):
    """The device for --device auto, cpu or cuda, of the process `local` of `here` on this machine; UserError where it,
    or the backend that CAPS_BACKEND names, is not to be had."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not gpus:
        raise UserError("--device cuda: torch sees no GPU here; expected one, or --device cpu")
    device = torch.device("cpu")
    if name != "cpu" and gpus:
        here = max(here, local + 1)
        if here > gpus:
            raise UserError(f"{here} processes but {gpus} GPU(s): start at most {gpus} here, or add --device cpu")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if caps._BACKEND != "auto":
        try:
            caps._native(caps._BACKEND, device.type)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"CAPS_BACKEND={caps._BACKEND}: {error}") from error
    return device


@contextlib.contextmanager
def patience(rank, size):
    """Around the meeting of all processes: after 20 seconds a line says what is waited for."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    said = f"caps: rank {rank} of {size} waits for the others at {place}; to train alone unset {' '.join(ALONE)}"
    timer = threading.Timer(20, print, [said], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if torchrun_waits():  # and starts them anew
            raise
        raise UserError(f"the {size} processes do not meet at {place} ({first_line(error)})") from error
    finally:
        timer.cancel()


def forgo_restarts():
    """The exit status of a mistake of all processes, which torchrun shall not repeat by starting this process again. run.sh's takes a
    job for finished, but for the file CAPS_RUNNING, without which run.sh ends with 2; another torchrun is stopped."""
    if torchrun_waits():
        if running := os.environ.get("CAPS_RUNNING"):
            pathlib.Path(running).unlink(missing_ok=True)
            return 0
        if os.environ.get("TORCHELASTIC_RESTART_COUNT") != os.environ.get("TORCHELASTIC_MAX_RESTARTS"):
            if os.environ.get("LOCAL_RANK") == "0":
                os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(5)  # until it stops this process
    return 2


def has_bf16(device):
    """Whether `device` has instructions for bfloat16; emulated it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() and "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def warn_of_bf16(world, amp):
    """A line of rank 0 where `amp` is emulated."""
    if amp == "bf16" and world.rank == 0 and not has_bf16(world.device):
        print(f"caps: --amp bf16: {world.device.type} without bf16 instructions, --amp off may be several times faster",
              file=sys.stderr)
