"""How the benchmarks measure: calls that take turns, peak memory, rates of the machine."""
import platform
import resource
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch


def machine(device):
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
        name += f", {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, {date.today()}"


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(calls, device, seconds, rounds=None, repeat=None):
    """{name: [milliseconds per round]}. In each round every call has its turn: once unmeasured, since what ran before it
    left its own data in the caches, then as often as fits some 20 ms."""
    repeats = {}
    for name, f in calls.items():
        f(), f(), synchronize(device)
        start = time.perf_counter()
        f(), synchronize(device)
        repeats[name] = repeat or max(1, int(20e-3 / (time.perf_counter() - start)))
    times, begun = {name: [] for name in calls}, time.perf_counter()
    while len(next(iter(times.values()))) < (rounds or 7) or (not rounds and time.perf_counter() - begun < seconds):
        for name, f in calls.items():
            f(), synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                f()
            synchronize(device)
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
    return times


def ratio(times, name, other="native"):
    """How many times longer `name` takes than `other`."""
    return statistics.median(a / b for a, b in zip(times[name], times[other]))


def high_water():
    """Bytes: the high-water mark of this process's memory."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def product_rate(device, dtype):
    """Operations per second of a square matrix product, two for each multiply-add."""
    torch.backends.cuda.matmul.allow_tf32 = False
    n = 4096 if device == "cuda" else 1024
    x, y = torch.randn(n, n, device=device, dtype=dtype), torch.empty(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / (min(interleave({"product": lambda: torch.mm(x, x, out=y)}, device, 1)["product"]) * 1e-3)
