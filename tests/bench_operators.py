"""The operators: plain PyTorch, torch.compile of it, and native; over sizes, and against batch size and capsules; the
convolution of small maps against PyTorch's."""
import ctypes
import functools
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import caps
from caps.extras import figures
from timing import high_water, interleave, machine, product_rate, ratio

K, J, D, T = 8, 10, 16, 3                       # the models' capsules
SIZES = [(32, 128), (32, 1296), (128, 1152), (128, 1296), (1, 1296)]  # B, N
VARIANTS = ("plain", "compiled", "native")
BATCHES, CAPSULES = [4 ** i for i in range(6)], [2 ** i for i in range(7, 14)]  # of `scale`


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
    code = (f"import sys; sys.path[:0] = {[str(p) for p in Path(__file__).parents[:2]]}; import bench_operators as bench; "
            f"bench.torch.set_num_threads({torch.get_num_threads()}); "
            f"print(bench.peak_here({variant!r}, {device!r}, {B}, {N}, {backward}))")
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def floor_rates():
    """(bytes per second of a device copy, float32 operations per second of a matrix product) of this GPU."""
    a, b = torch.empty(2 ** 28, device="cuda", dtype=torch.uint8), torch.empty(2 ** 28, device="cuda", dtype=torch.uint8)
    times = interleave({"copy": lambda: b.copy_(a)}, "cuda", 2)
    return 2 * 2 ** 28 / (min(times["copy"]) * 1e-3), product_rate("cuda", torch.float32)


def floor_milliseconds(rates, B, N, backward):
    """The larger of bytes over bandwidth and operations over rate; votes are made again in every pass."""
    small, votes = 4 * (B * N * K + N * J * D * K), B * N * J * D
    operations = T * 2 * votes * K + (T - 1) * 4 * votes
    if backward:
        operations += (T - 1) * (2 * votes * K + 6 * votes) + 3 * 2 * votes * K + (T - 1) * 8 * votes
    bytes_moved = small * (3 if backward else 1)
    return max(bytes_moved / rates[0], operations / rates[1]) * 1e3


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


def scale(options):
    """Forward and backward of the capsule layer against batch size B and number of capsules N."""
    print(f"capsule_linear, forward and backward, float32, K={K}, J={J}, D={D}, {T} iterations; {machine(options.device)}")
    print(f"{'B':>5} {'N':>5}{'plain ms':>12}{'native ms':>12}{'plain/':>9}{'plain MiB':>12}{'native MiB':>12}{'gradients MiB':>15}")
    rows = []
    for B, N in dict.fromkeys([(B, N) for N in (128, 1296) for B in BATCHES] + [(32, N) for N in CAPSULES]):
        too_large = 5 * 4 * B * N * J * D > 2 ** 31  # the plain version holds some 5 tensors of that size
        variants = ("native",) if too_large else ("plain", "native")
        times = interleave({v: call(*linear(v, options.device, B, N), True) for v in variants}, options.device,
                           options.seconds)
        row = {"B": B, "N": N, "ms": {v: statistics.median(times[v]) for v in variants},
               "ratio": None if too_large else ratio(times, "plain"),
               "peak_bytes": {v: peak_memory(v, options.device, B, N, True) for v in variants},
               "gradient_bytes": 4 * (B * N * K + N * J * D * K), "rounds": len(times["native"])}
        mebibytes = {v: f"{b / 2 ** 20:.1f}" for v, b in row["peak_bytes"].items()}
        print(f"{B:>5} {N:>5}" + ("      plain left out: > 2 GiB" if too_large else f"{row['ms']['plain']:>12.3f}")
              + f"{row['ms']['native']:>12.3f}" + ("" if too_large else f"{row['ratio']:>8.1f}x{mebibytes['plain']:>12}")
              + f"{mebibytes['native']:>12}{row['gradient_bytes'] / 2 ** 20:>15.1f}", flush=True)
        rows.append(row)
    if options.plot:
        plot_scale(rows, options.plot)
    return {"command": "scale", "machine": machine(options.device), "rows": rows}


def small_maps(options):
    """SmallMapConv2d and PyTorch's convolution with a ReLU, float32, as channels I -> O of S×S maps with k×k kernels."""
    print(f"convolutions of small maps with a ReLU, float32; {machine('cpu')}")
    middle = dict(B=32, I=256, O=256, S=2, k=3)
    sizes = [{**middle, "S": S, "B": B, "k": k} for S in (1, 2, 3) for k in (1, 3, 5) for B in (1, 8, 32, 200)]
    sizes += [{**middle, "S": S, "I": n, "O": n, "B": B} for S in (1, 2, 3) for n in (32, 512) for B in (1, 32, 256)]
    sizes += [{**middle, "I": i, "O": o, "k": k} for i, o, k in ((64, 192, 5), (192, 384, 3), (384, 256, 3))]
    rows = []
    for size in sizes:
        torch.manual_seed(0)
        layer = caps.SmallMapConv2d(size["I"], size["O"], size["k"], relu=True)
        maps = torch.randn(size["B"], size["I"], size["S"], size["S"])
        for backward in (False, True):
            def function(maps, weight, bias, way):
                return caps._run(layer.native, layer.plain, way, maps=maps, weight=weight, bias=bias)
            calls = {way: call(functools.partial(function, way=way), (maps, layer.weight.detach(), layer.bias.detach()), backward)
                     for way in ("torch", "native")}
            times = interleave(calls, "cpu", options.seconds, rounds=9)
            rows.append({**size, "pass": "fwd+bwd" if backward else "fwd",
                         "ms": {v: statistics.median(t) for v, t in times.items()}, "ratio": ratio(times, "torch")})
            print("S={S} k={k} B={B:<4} I={I:<4} O={O:<4} {pass:<8}".format(**rows[-1])
                  + "torch {torch:>8.3f} ms  native {native:>8.3f} ms".format(**rows[-1]["ms"])
                  + f"{rows[-1]['ratio']:>8.2f}x", flush=True)
    return {"command": "maps", "machine": machine("cpu"), "rows": rows}


def plot_scale(rows, path):
    """Milliseconds above and peak extra memory below; against batch size on the left, against capsules on the right."""
    figure, axes = figures.new_figure(10, 7.5, columns=2, rows=2)
    series = [(0, "B", f"N = {N}", style, [r for r in rows if r["N"] == N and r["B"] in BATCHES])
              for N, style in ((128, "--"), (1296, "-"))]
    series.append((1, "N", "B = 32", "-", [r for r in rows if r["B"] == 32]))
    for column, x, label, style, part in series:
        for color, v in enumerate(("plain", "native")):
            done = [r for r in part if v in r["ms"]]
            for axis, key, unit in ((axes[column], "ms", 1), (axes[column + 2], "peak_bytes", 2 ** 20)):
                axis.plot([r[x] for r in done], [r[key][v] / unit for r in done], style, color=f"C{color}", marker=".",
                          label=f"{v}, {label}")
        axes[column + 2].plot([r[x] for r in part], [r["gradient_bytes"] / 2 ** 20 for r in part], style, color="grey",
                              linewidth=0.8, label=f"gradients, {label}")
    for axis, y in zip(axes, ["time of forward and backward (ms)"] * 2 + ["peak extra memory (MiB)"] * 2):
        axis.set(xscale="log", yscale="log", ylabel=y)
        axis.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    for column, x in enumerate(("batch size B (images)", "primary capsules N")):
        axes[column + 2].set_xlabel(x)
    figure.savefig(path)
