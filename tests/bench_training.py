"""Training: whole steps against the straightforward pipeline, two processes against one."""
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import caps
from caps.extras import faster, summary
from timing import interleave, machine, product_rate, ratio, synchronize

BENCH = str(Path(__file__).with_name("bench.py"))


def run_for(model, device, folder, *words):
    """A run of caps.py on the embedded images, ready to step; under torchrun one of its processes."""
    faster.prepare_process()  # as the command line does
    args = caps.parse(["train", "--model", model, "--dataset", "mnist5k", "--device", device, "--out", folder,
                       "--overwrite", "--accumulate", "1", *words])
    return caps.start_run(args, caps.start_world(device), faster)


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
    plain = {caps.PatchConv2d: torch.nn.Conv2d, caps.SmallMapConv2d: torch.nn.Conv2d, caps.FusedReLU: torch.nn.ReLU,
             caps.ResidualBlock: PlainBlock, caps.PrimaryCapsules: PlainPrimary, caps.CapsuleLayer: PlainCapsules}
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
    _, multiply_adds = summary.totals(summary.layer_table(run.model))
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
                     BENCH, "ddp", "--process", model], check=True, capture_output=True, text=True,
                    env=os.environ | {"OMP_NUM_THREADS": str(2 // processes)}).stdout
                found[processes].append(json.loads(output.splitlines()[-1]))
        for processes, times in found.items():
            step, alone = (statistics.median(t[name] for t in times) for name in ("step", "alone"))
            rows.append({"model": model, "processes": processes, "threads": 2 // processes, "ms": step,
                         "images_per_second": 32e3 * processes / step, "communication": max(0, 1 - alone / step)})
            print("{model:<10}{processes} process(es), {threads} thread(s) each {ms:>8.1f} ms {images_per_second:>8.0f} images/s"
                  "  communication {communication:>5.1%}".format(**rows[-1]), flush=True)
    return {"command": "ddp", "machine": machine("cpu"), "rows": rows}
