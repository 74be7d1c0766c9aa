"""Measurements that the README quotes.

    python tests/bench.py ops [--device cuda] [--threads 2] [--json F]    operators: plain, torch.compile of plain, native
    python tests/bench.py ops --sweep                                     native against plain over plausible sizes
    python tests/bench.py scale [--plot F]                                the capsule layer against batch size and capsules
    python tests/bench.py train                                           whole steps against the straightforward pipeline
    python tests/bench.py ddp                                             one process against two, on the CPU
    python tests/bench.py accuracy [--epochs 20] [--seeds 1]              whole trainings, fast and plain layers
    python tests/bench.py all --json F                                    all of these but the sweep and accuracy

Times are medians over rounds in which the variants take turns; a ratio is the median of the rounds' ratios, so that a
busy machine harms both sides alike. Peak extra memory is what one call adds to memory that already holds arguments: on
the CPU the growth of the high-water mark of a fresh process (VmHWM, else ru_maxrss), on CUDA max_memory_allocated.
"""
import argparse
import contextlib
import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import caps  # noqa: E402

K, J, D, T = 8, 10, 16, 3                       # the models' capsules
SIZES = [(32, 128), (32, 1296), (128, 1152), (128, 1296), (1, 1296)]  # B, N
VARIANTS = ("plain", "compiled", "native")
BATCHES, CAPSULES = [4 ** i for i in range(6)], [2 ** i for i in range(7, 14)]  # of `scale`


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


def product_rate(device, dtype):
    """Operations per second of a square matrix product, two for each multiply-add."""
    torch.backends.cuda.matmul.allow_tf32 = False
    n = 4096 if device == "cuda" else 1024
    x, y = torch.randn(n, n, device=device, dtype=dtype), torch.empty(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / (min(interleave({"product": lambda: torch.mm(x, x, out=y)}, device, 1)["product"]) * 1e-3)


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


# ---- scale ----------------------------------------------------------------------------------------------------------


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


def plot_scale(rows, path):
    """Milliseconds above and peak extra memory below; against batch size on the left, against capsules on the right."""
    figure, axes = caps.new_figure(10, 7.5, columns=2, rows=2)
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


# ---- train and ddp: whole steps ---------------------------------------------------------------------------------------


def run_for(model, device, folder, *words):
    """A run of caps.py on the embedded images, ready to step; under torchrun one of its processes."""
    torch.set_flush_denormal(True)  # as caps.train does
    args = caps.parse(["train", "--model", model, "--dataset", "mnist5k", "--device", device, "--out", folder,
                       "--overwrite", "--accumulate", "1", *words])
    return caps.start_run(args, caps.start_world(device))


def step_of(run):
    """A call that trains on the next 32 images of this process: data, augmentation, forward, loss, backward, Adam."""
    order, motion = (t.to(run.world.device) for t in caps.epoch_plan(len(run.data.train_images), 1, 0, 10, 0))
    position = 0

    def step():
        nonlocal position
        group = 32 * run.world.size
        mine = slice(position + run.world.rank, position + group, run.world.size)
        caps.train_step(run, order[mine], motion[mine], group)
        position = (position + group) % (len(order) - group)
    return step


class PlainBlock(caps.ResidualBlock):
    def forward(self, x):
        return torch.relu(self.body(x) + x)


class PlainPrimary(caps.PrimaryCapsules):
    def forward(self, maps):
        capsules = maps.unflatten(1, (self.types, self.dim)).permute(0, 1, 3, 4, 2)
        return caps.squash(capsules.flatten(1, 3), backend="torch")


class PlainCapsules(caps.CapsuleLayer):
    def forward(self, inputs):
        return caps.capsule_linear(inputs, self.weight, self.iterations, backend="torch")


def plain_layers(net):
    """The network itself, its layers from now on as PyTorch has them: no small maps, in-place or native operators."""
    plain = {caps.SmallMapConv2d: torch.nn.Conv2d, caps.ResidualBlock: PlainBlock, caps.PrimaryCapsules: PlainPrimary,
             caps.CapsuleLayer: PlainCapsules}
    for layer in net.modules():
        layer.__class__ = plain.get(type(layer), type(layer))
        if isinstance(layer, torch.nn.ReLU):
            layer.inplace = False
    return net


def straightforward(model, device):
    """The usual program: a DataLoader with per-image transforms, plain routing, Adam as it comes, .item() every step."""
    from torchvision import transforms
    data = caps.load_data("mnist5k", "")
    transform = transforms.Compose([transforms.ToPILImage(), transforms.RandomRotation(10), transforms.ToTensor()])

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(data.train_images)

        def __getitem__(self, i):
            return transform(data.train_images[i]), data.train_labels[i]

    net = plain_layers(caps.MODELS[model]().to(device))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    batches = iter(())

    def step():
        nonlocal batches
        images, labels = next(batches, (None, None))
        if images is None:
            batches = iter(torch.utils.data.DataLoader(Images(), batch_size=32, shuffle=True, drop_last=True))
            images, labels = next(batches)
        optimizer.zero_grad()
        loss = caps.margin_loss(caps.lengths(net(images.to(device))), labels.to(device))
        loss.backward()
        optimizer.step()
        loss.item()
    return step


def caps_step(model, words, folder, device):
    """A step of caps.py."""
    return step_of(run_for(model, device, folder, *words))


def serve(pipe, threads, make, arguments):
    torch.set_num_threads(threads)
    f = make(*arguments)
    while pipe.recv():
        f()
        synchronize(arguments[-1])
        pipe.send(True)


@contextlib.contextmanager
def elsewhere(make, *arguments):
    """The call make(*arguments), in a process of its own, with its own memory and settings of it."""
    context = torch.multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=serve, args=(other, torch.get_num_threads(), make, arguments), daemon=True)
    process.start()
    other.close()  # an error there is an EOFError here
    yield lambda: (pipe.send(True), pipe.recv())
    pipe.send(False)
    process.join()


def parts_of(run):
    """Calls of the parts of a step, each alone: data, backbone, capsule layer (from maps to loss), optimizer."""
    model, data, device = run.model.train(), run.data, run.world.device
    index, motion = torch.arange(32, device=device), torch.zeros(32, 3, device=device)
    images, labels = caps.to_float(data.train_images[index]), data.train_labels[index]

    def backward(part, x, finish, call=None):
        parameters = list(part.parameters())
        with caps.autocast(device, run.args.amp):
            y = finish((call or part)(x))
        leaves = parameters + [x] * x.requires_grad
        return torch.autograd.grad(y, leaves, torch.ones_like(y)) and y

    compiled = None if run.net is model else torch.compile(model.backbone, dynamic=False)
    maps = backward(model.backbone, images, lambda y: y, compiled).detach().requires_grad_()
    top = torch.nn.Sequential(model.primary, model.digits)
    step_of(run)()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return {"data": lambda: (caps.move(caps.to_float(data.train_images[index]), motion), data.train_labels[index]),
            "backbone": lambda: backward(model.backbone, images, lambda y: y, compiled),
            "capsule layer": lambda: backward(top, maps, lambda v: caps.margin_loss(caps.lengths(v).float(), labels)),
            "optimizer": run.optimizer.step}


def print_parts(row, run, rates, options):
    """Shares of the parts in their sum, and operations per second against the matrix product's, into `row`.

    Three times the forward pass's multiply-adds stand for forward and backward, layers as described, padding included.
    """
    times = {name: statistics.median(t) for name, t in interleave(parts_of(run), options.device, options.seconds).items()}
    row["share"] = {name: t / sum(times.values()) for name, t in times.items()}
    _, multiply_adds = caps.totals(caps.layer_table(run.model))
    row["flops"], row["product_flops"] = 3 * 2 * 32 * multiply_adds / (row["ms"] * 1e-3), rates[run.args.amp]
    print(f"{'':<10}" + ", ".join(f"{name} {share:.0%}" for name, share in row["share"].items())
          + f"; {row['flops'] / 1e9:.1f} Gflop/s, a matrix product {row['product_flops'] / 1e9:.1f}", flush=True)


def train(options):
    """Images per second of training steps with 32 images, against the straightforward pipeline."""
    torch.set_flush_denormal(True)  # before there are threads, which inherit it
    print(f"training, batch 32; {machine(options.device)}")
    dtypes = {"off": torch.float32, "bf16": torch.bfloat16} | ({"fp16": torch.float16} if options.device == "cuda" else {})
    rates = {amp: product_rate(options.device, dtype) for amp, dtype in dtypes.items()}
    rows = []
    ways = {"": [], ", graph": ["--graph"]} if options.device == "cuda" else {"": []}
    words = {f"caps.py, amp {amp}{way}": ["--amp", amp, *more] for amp in dtypes for way, more in ways.items()}
    for model in caps.MODELS:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            calls = {"straightforward": stack.enter_context(elsewhere(straightforward, model, options.device))}
            for name in words:
                made = elsewhere(caps_step, model, words[name], os.path.join(folder, name), options.device)
                calls[name] = stack.enter_context(made)
            times = interleave(calls, options.device, options.seconds)
            for name in calls:
                rows.append({"model": model, "pipeline": name, "ms": statistics.median(times[name]),
                             "images_per_second": 32e3 / statistics.median(times[name]),
                             "ratio": ratio(times, "straightforward", name), "rounds": len(times[name])})
                print("{model:<10}{pipeline:<24}{ms:>10.1f} ms {images_per_second:>10.0f} images/s {ratio:>8.1f}x".format(
                    **rows[-1]), flush=True)
                if name in words and "--graph" not in words[name]:
                    print_parts(rows[-1], run_for(model, options.device, os.path.join(folder, "parts"), *words[name]),
                                rates, options)
    return {"command": "train", "machine": machine(options.device), "rows": rows}


def ddp_process(model):
    """What each process of `ddp` runs: medians of a step, and of one without communication; rank 0 prints them."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_for(model, "cpu", folder, "--amp", "off")
        step = step_of(run)
        silent = run.net.no_sync if run.world.size > 1 else contextlib.nullcontext

        def step_alone():
            with silent():
                step()
        # Once a round: processes that repeat by their own clocks would wait for each other's all-reduces for ever.
        times = interleave({"step": step, "alone": step_alone}, "cpu", 0, rounds=25, repeat=1)
        if run.world.rank == 0:
            print(json.dumps({name: statistics.median(t) for name, t in times.items()}))


def ddp(options):
    """One process with 2 threads against two processes with 1 thread each, in turn, on the CPU."""
    print(f"training, 32 images a process, gloo; {machine('cpu')}")
    rows = []
    for model in caps.MODELS:
        found = {1: [], 2: []}
        for _ in range(3):
            for processes in found:
                output = subprocess.run(
                    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                     __file__, "ddp", "--process", model], check=True, capture_output=True, text=True,
                    env=os.environ | {"OMP_NUM_THREADS": str(2 // processes)}).stdout
                found[processes].append(json.loads(output.splitlines()[-1]))
        for processes, times in found.items():
            step, alone = (statistics.median(t[name] for t in times) for name in ("step", "alone"))
            rows.append({"model": model, "processes": processes, "threads": 2 // processes, "ms": step,
                         "images_per_second": 32e3 * processes / step, "communication": max(0, 1 - alone / step)})
            print("{model:<10}{processes} process(es), {threads} thread(s) each {ms:>8.1f} ms {images_per_second:>8.0f} images/s"
                  "  communication {communication:>5.1%}".format(**rows[-1]), flush=True)
    return {"command": "ddp", "machine": machine("cpu"), "rows": rows}


# ---- accuracy ---------------------------------------------------------------------------------------------------------


def train_plain(args):
    """caps.train with plain layers and routing, Adam as it comes and denormal numbers as they are."""
    def start(args, world, start=caps.start_run):
        torch.set_flush_denormal(False)
        run = start(args, world)
        run.optimizer = torch.optim.Adam(plain_layers(run.model).parameters(), lr=run.args.lr)
        return run
    caps.start_run = start
    return caps.train(args)


def accuracy_process(layers, epochs, seed, device, folder):
    """What each process of `accuracy` runs, a training of AlexCapsNet."""
    args = caps.parse(["train", "--epochs", epochs, "--seed", seed, "--device", device, "--out", folder])
    return train_plain(args) if layers == "plain" else caps.train(args)


def accuracy(options):
    """AlexCapsNet trained with the same recipe and seeds in caps.py's fastest way and in plain PyTorch."""
    print(f"AlexCapsNet, {options.epochs} epochs; {machine(options.device)}")
    rows = []
    for seed in range(1, options.seeds + 1):
        row = {"seed": seed}
        for layers in ("fast", "plain"):
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([sys.executable, __file__, "accuracy", "--process", layers, str(options.epochs), str(seed),
                                options.device, folder], check=True, env=os.environ | {
                                    "OMP_NUM_THREADS": str(torch.get_num_threads())})
                facts = json.loads(Path(folder, "summary.json").read_text())
                row[layers] = {key: facts[key] for key in ("test_accuracy", "seconds_per_epoch", "dataset")}
        rows.append(row)
        print("seed {}: fast {:.2%}, {:.1f} s an epoch; plain {:.2%}, {:.1f} s an epoch".format(seed, *(
            row[layers][key] for layers in ("fast", "plain") for key in ("test_accuracy", "seconds_per_epoch"))), flush=True)
    difference = statistics.mean(row["fast"]["test_accuracy"] - row["plain"]["test_accuracy"] for row in rows)
    print(f"fast - plain: {100 * difference:+.2f} points on {rows[0]['fast']['dataset']}, mean of {len(rows)} seed(s)")
    return {"command": "accuracy", "machine": machine(options.device), "difference": difference, "rows": rows}


def everything(options):
    return {"command": "all", "results": [part(options) for part in (ops, scale, train, ddp)]}


# ---- Command line ----------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("ops", help="the operators")
    command.add_argument("--sweep", action="store_true", help="native against plain over plausible sizes")
    command.add_argument("--sizes", type=lambda text: [tuple(map(int, s.split("x"))) for s in text.split(",")],
                         help="BxN,BxN,... in place of the listed sizes")
    command.set_defaults(run=lambda options: sweep(options) if options.sweep else ops(options))
    command = commands.add_parser("scale", help="the capsule layer against batch size and number of capsules")
    command.set_defaults(run=scale)
    command = commands.add_parser("train", help="whole training steps against the straightforward pipeline")
    command.set_defaults(run=train)
    command = commands.add_parser("ddp", help="one process against two, on the CPU")
    command.add_argument("--process", choices=list(caps.MODELS), help=argparse.SUPPRESS)
    command.set_defaults(run=lambda options: ddp_process(options.process) if options.process else ddp(options))
    command = commands.add_parser("accuracy", help="whole trainings of AlexCapsNet, fast and plain")
    command.add_argument("--epochs", type=int, default=20)
    command.add_argument("--seeds", type=int, default=1)
    command.add_argument("--process", nargs=5, help=argparse.SUPPRESS)
    command.set_defaults(run=lambda options: accuracy_process(*options.process) if options.process else accuracy(options))
    command = commands.add_parser("all", help="ops, scale, train and ddp")
    command.set_defaults(run=everything, sizes=None)
    for name in ("scale", "all"):
        commands.choices[name].add_argument("--plot", type=Path, help="also draw the scaling into this PNG file")
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
