"""The mode `summary`, and the layer table that diagram, report and the benchmarks share."""

import functools

import torch
import torch.nn as nn

from caps import CapsuleLayer, UserError, extra, load_model, new_model, read_checkpoint
from caps.extras.machine import choose_device


def options(add):
    add("--model")
    add("--iterations")
    add("--decoder", action="store_true", help="with a decoder of images from capsules")
    add("--checkpoint", default=None, help="the network of a run, in the place of --model's for MNIST")


def described(args):
    """(the network that options name, its name in MODELS, the traits of its data set)."""
    device = choose_device("cpu")
    if not args.checkpoint:
        traits = extra("datasets").earlier_traits("mnist")
        return new_model(vars(args), traits), args.model, traits
    if told := {"model", "iterations", "decoder"} & args.given:
        raise UserError(f"--{min(told)}: the checkpoint tells it; leave one of them out")
    checkpoint = read_checkpoint(args.checkpoint)
    return load_model(checkpoint, device), checkpoint["config"]["model"], checkpoint["traits"]


def run(args):
    """The layer table of a model, with totals."""
    model, _, traits = described(args)
    rows = layer_table(model)
    print(f"{type(model).__name__}, for one image {traits['image']} and {len(traits['classes'])} classes\n")
    print(f"{'layer':<20}{'kind':<18}{'output':<16}{'parameters':>12}{'multiply-adds':>16}")
    for name, kind, shape, parameters, multiply_adds in rows:
        print(f"{name:<20}{kind:<18}{'×'.join(map(str, shape)):<16}{parameters:>12,}{multiply_adds:>16,}")
    parameters, multiply_adds = totals(rows)
    print(f"{'total':<54}{parameters:>12,}{multiply_adds:>16,}")
    return 0


def layer_table(model):
    """Rows (name, kind, output shape, parameters, multiply-adds) for one image, in the order of computation.

    Multiply-adds count convolutions, fully connected layers, and for a capsule layer the votes (N·J·D·K) and each
    iteration's weighted sum and agreement (N·J·D each, no agreement after the last); elementwise work is not counted.
    """
    rows = []

    def record(name, module, inputs, output):
        multiply_adds = 0
        if isinstance(module, nn.Conv2d):
            multiply_adds = module.weight.numel() * output.shape[2] * output.shape[3]
        elif isinstance(module, CapsuleLayer):
            n, j, d, k = module.weight.shape
            multiply_adds = n * j * d * (k + 2 * module.iterations - 1)
        elif isinstance(module, nn.Linear):
            multiply_adds = module.weight.numel()
        parameters = sum(p.numel() for p in module.parameters())
        rows.append((name, type(module).__name__, tuple(output.shape[1:]), parameters, multiply_adds))

    hooks = [module.register_forward_hook(functools.partial(record, name)) for name, module in model.named_modules()
             if not list(module.children())]
    image = torch.zeros(1, *model.image, device=next(model.parameters()).device)
    with torch.no_grad():
        model.eval()(image, image[:, 0, 0, 0].long() if model.decoder else None)
    for hook in hooks:
        hook.remove()
    return rows


def totals(rows):
    """Parameters, and multiply-adds for one image, of layer_table's rows."""
    return [sum(row[i] for row in rows) for i in (3, 4)]
