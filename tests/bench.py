"""Measurements that the README quotes.

    python tests/bench.py ops [--device cuda] [--threads 2] [--json F]    operators: plain, torch.compile of plain, native
    python tests/bench.py ops --sweep                                     native against plain over plausible sizes

Times are medians over rounds in which the variants take turns; a ratio is the median of the rounds' ratios, so that a
busy machine harms both sides alike. Peak extra memory is what one call adds to memory that already holds arguments: on
the CPU the growth of the high-water mark of a fresh process (VmHWM, else ru_maxrss), on CUDA max_memory_allocated.
"""
import argparse
import ctypes
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import caps  # noqa: E402

K, J, D, T = 8, 10, 16, 3                       # the models' capsules
SIZES = [(32, 128), (32, 1296), (128, 1152), (128, 1296), (1, 1296)]  # B, N
VARIANTS = ("plain", "compiled", "native")


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


# ---- What is measured ------------------------------------------------------------------------------------------------


def linear(variant, device, B, N, K=K, J=J, D=D):
    """(function, its tensors) for capsule_linear."""
    def function(inputs, weight):
        return caps.capsule_linear(inputs, weight, T, backend="native" if variant == "native" else "torch")

    torch.manual_seed(0)
    tensors = torch.randn(B, N, K, device=device), 0.05 * torch.randn(N, J, D, K, device=device)
    return torch.compile(function) if variant == "compiled" else function, tensors


def routed(variant, device, B, N, K, J, D):
    backend = "native" if variant == "native" else "torch"
    return lambda votes: caps.routing(votes, T, backend=backend), (0.3 * torch.randn(B, N, J, D, device=device),)


def squashed(variant, device, B, N, K, J, D):
    backend = "native" if variant == "native" else "torch"
    return lambda s: caps.squash(s, backend=backend), (torch.randn(B, N, K, device=device),)


def call(function, tensors, backward):
    """A call without arguments: forward alone, or forward and backward."""
    if not backward:
        def forward():
            with torch.no_grad():
                function(*tensors)
        return forward
    leaves = [t.clone().requires_grad_() for t in tensors]
    grad = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


# ---- How it is measured ----------------------------------------------------------------------------------------------


def interleave(calls, device, seconds, rounds=None):
    """{name: [milliseconds per round]}; each round runs every call, often enough to be well above the clock's grain."""
    repeats = {}
    for name, f in calls.items():
        f(), f(), synchronize(device)
        start = time.perf_counter()
        f(), synchronize(device)
        repeats[name] = max(1, int(2e-3 / (time.perf_counter() - start)))
    times, begun = {name: [] for name in calls}, time.perf_counter()
    while len(next(iter(times.values()))) < (rounds or 7) or (not rounds and time.perf_counter() - begun < seconds):
        for name, f in calls.items():
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


def peak_here(variant, device, B, N, backward):
    function, tensors = linear(variant, device, B, N)
    if device == "cuda":
        f = call(function, tensors, backward)
        f(), torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f(), torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    warm, small = linear(variant, device, B, 16)     # threads and code are there before
    call(warm, small, backward)()
    if variant == "compiled":                        # for these sizes
        call(function, tensors, backward)()
    f = call(function, tensors, backward)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)             # what was freed so far would hide what is taken next
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from what is in use
    before = high_water()
    f()
    return high_water() - before


def peak_memory(variant, device, B, N, backward):
    """Peak extra bytes of one call; on the CPU in a fresh process."""
    if device == "cuda":
        return peak_here(variant, device, B, N, backward)
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench; "
            f"bench.torch.set_num_threads({torch.get_num_threads()}); "
            f"print(bench.peak_here({variant!r}, {device!r}, {B}, {N}, {backward}))")
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def floor_rates():
    """(bytes per second of a device copy, float32 operations per second of a matrix product) of this GPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    a, b = torch.empty(2 ** 28, device="cuda", dtype=torch.uint8), torch.empty(2 ** 28, device="cuda", dtype=torch.uint8)
    x, y = torch.randn(4096, 4096, device="cuda"), torch.empty(4096, 4096, device="cuda")
    times = interleave({"copy": lambda: b.copy_(a), "product": lambda: torch.mm(x, x, out=y)}, "cuda", 2)
    return 2 * 2 ** 28 / (min(times["copy"]) * 1e-3), 2 * 4096 ** 3 / (min(times["product"]) * 1e-3)


def floor_milliseconds(rates, B, N, backward):
    """The larger of bytes over bandwidth and operations over rate; votes are made again in every pass."""
    small, votes = 4 * (B * N * K + N * J * D * K), B * N * J * D
    operations = T * 2 * votes * K + (T - 1) * 4 * votes
    if backward:
        operations += (T - 1) * (2 * votes * K + 6 * votes) + 3 * 2 * votes * K + (T - 1) * 8 * votes
    bytes_moved = small * (3 if backward else 1)
    return max(bytes_moved / rates[0], operations / rates[1]) * 1e3


# ---- ops ------------------------------------------------------------------------------------------------------------


def ops(options):
    print(f"capsule_linear, float32, K={K}, J={J}, D={D}, {T} iterations; {machine(options.device)}")
    rates = floor_rates() if options.device == "cuda" else None
    if rates:
        print(f"measured: copy {rates[0] / 1e9:.0f} GB/s, float32 product {rates[1] / 1e12:.1f} Tflop/s")
    print(f"{'B':>4} {'N':>5} {'pass':<8}" + "".join(f"{name + ' ms':>13}" for name in VARIANTS)
          + f"{'plain/':>9}{'compiled/':>10}" + "".join(f"{name + ' MiB':>14}" for name in VARIANTS)
          + (f"{'floor ms':>10}{'of floor':>9}" if rates else ""))
    rows = []
    for B, N in options.sizes or SIZES:
        for backward in (False, True):
            calls = {v: call(*linear(v, options.device, B, N), backward) for v in VARIANTS}
            times = interleave(calls, options.device, options.seconds)
            row = {"B": B, "N": N, "pass": "fwd+bwd" if backward else "fwd",
                   "ms": {v: statistics.median(times[v]) for v in VARIANTS},
                   "ratio": {v: ratio(times, v) for v in VARIANTS[:2]},
                   "peak_bytes": {v: peak_memory(v, options.device, B, N, backward) for v in VARIANTS},
                   "rounds": len(times["native"])}
            line = (f"{B:>4} {N:>5} {row['pass']:<8}" + "".join(f"{row['ms'][v]:>13.3f}" for v in VARIANTS)
                    + f"{row['ratio']['plain']:>8.1f}x{row['ratio']['compiled']:>9.1f}x"
                    + "".join(f"{row['peak_bytes'][v] / 2 ** 20:>14.1f}" for v in VARIANTS))
            if rates:
                row["floor_ms"] = floor_milliseconds(rates, B, N, backward)
                line += f"{row['floor_ms']:>10.4f}{row['ms']['native'] / row['floor_ms']:>8.1f}x"
            print(line, flush=True)
            rows.append(row)
            torch.compiler.reset()
    return {"command": "ops", "machine": machine(options.device), "rows": rows}


def sweep_sizes():
    """(operator, B, N, K, J, D): every axis from small to large around the models' sizes, and the corners."""
    middle = dict(B=32, N=256, K=8, J=10, D=16)
    axes = dict(B=(1, 2, 3, 4, 8, 16, 17, 128, 1024), N=(8, 32, 100, 1296, 4096), K=(4, 5, 12, 16, 32),
                J=(2, 3, 5, 20, 100), D=(4, 6, 8, 12, 24, 32))
    sizes = [middle] + [{**middle, axis: value} for axis, values in axes.items() for value in values]
    sizes += [{**middle, "B": B, axis: value} for B in (1, 4) for axis in "NKJD" for value in (axes[axis][0], axes[axis][-1])]
    sizes += [dict(B=B, N=N, K=k, J=j, D=d) for B in (1, 4, 64) for N in (8, 512) for j in (2, 100) for k, d in ((4, 4), (32, 32))]
    operators = {"capsule_linear": linear, "routing": routed, "squash": squashed}
    seen = set()
    for name in operators:
        for size in sizes:
            used = tuple(size[axis] for axis in ("BNK" if name == "squash" else "BNJD" if name == "routing" else "BNKJD"))
            if (name, used) not in seen and size["B"] * size["N"] * size["J"] * size["D"] < 3e7:
                seen.add((name, used))
                yield name, operators[name], size


def sweep(options):
    print(f"native against plain, float32, {T} iterations; {machine(options.device)}")
    rows = []
    for name, operator, size in sweep_sizes():
        for backward in (False, True):
            calls = {v: call(*operator(v, options.device, **size), backward) for v in ("plain", "native")}
            times = interleave(calls, options.device, options.seconds, rounds=9)
            rows.append({"operator": name, **size, "pass": "fwd+bwd" if backward else "fwd",
                         "ms": {v: statistics.median(t) for v, t in times.items()}, "ratio": ratio(times, "plain")})
            print("{operator:<15} B={B:<5} N={N:<5} K={K:<3} J={J:<4} D={D:<3} {pass:<8}".format(**rows[-1])
                  + "plain {plain:>9.3f} ms  native {native:>9.3f} ms".format(**rows[-1]["ms"])
                  + f"{rows[-1]['ratio']:>8.1f}x", flush=True)
    for name in ("capsule_linear", "routing", "squash"):
        worst = min((row for row in rows if row["operator"] == name), key=lambda row: row["ratio"])
        print(f"worst of {name}: {worst['ratio']:.2f}x at", {k: worst[k] for k in ("B", "N", "K", "J", "D", "pass")})
    return {"command": "ops --sweep", "machine": machine(options.device), "rows": rows}


# ---- Command line ----------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("ops", help="the operators")
    command.add_argument("--sweep", action="store_true", help="native against plain over plausible sizes")
    command.add_argument("--sizes", type=lambda text: [tuple(map(int, s.split("x"))) for s in text.split(",")],
                         help="BxN,BxN,... in place of the listed sizes")
    command.set_defaults(run=lambda options: sweep(options) if options.sweep else ops(options))
    for command in commands.choices.values():
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--threads", type=int, help="of the CPU")
        command.add_argument("--seconds", type=float, default=5, help="of rounds per measurement")
        command.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    result = options.run(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
