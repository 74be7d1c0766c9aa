"""The mode `export`: a checkpoint as an ONNX file, or as a small one of the network alone.

    python caps.py export --checkpoint runs/alexcaps-mnist/last.pt model.onnx     needs pip install -e '.[onnx]'
    python caps.py export --checkpoint runs/alexcaps-mnist/last.pt small.pt
"""

import contextlib
import io
import json
import pathlib
import warnings

import numpy as np
import torch
import torch.nn as nn

from caps import (EVALUATION_BATCH, PARTS, STATE, UserError, World, class_scores, file_name, lengths, load_model, package, read_checkpoint,
                  to_float)
from caps.extras.datasets import load_data_for
from caps.extras.machine import choose_device
from caps.extras.runs import check_writable, tell_network, write_atomically, write_checkpoint


def options(add):
    add("--checkpoint")
    add("--dataset")
    add("--data-dir")
    add("out", metavar="FILE", type=file_name, help="the file to write: model.onnx, or small.pt, the network alone "
        "in half precision, which every mode but --resume takes")


class WithLengths(nn.Module):
    """images -> (lengths [B, J], capsules [B, J, 16]) and, of a model with a decoder, what this makes of the longest
    capsules, [B, C, H, W]: what an exported model gives."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        capsules = self.model(images)
        decoded = [self.model.decoder(capsules)] if self.model.decoder else []
        return lengths(capsules), capsules, *decoded


def run(args):
    """A checkpoint as another file, tried on the test images, or on noise for want of them."""
    out = pathlib.Path(args.out)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name the file to write, {out / 'model.onnx'} say")
    small = out.suffix.lower() == ".pt"
    if not small and out.suffix.lower() != ".onnx":
        raise UserError(f"{out}: expected a name that ends in .onnx, or in .pt for the network alone")
    if small and out.exists():
        raise UserError(f"{out}: is there already, and may be a run's checkpoint; name another file")
    packages = [] if small else [package(name, "export", "-e '.[onnx]'") for name in ("onnxruntime", "onnx", "onnxscript")]
    check_writable(out.parent, "FILE")
    choose_device("cpu")  # refuses a CAPS_BACKEND that is none, or not to be had
    tell_network(args)
    checkpoint = read_checkpoint(args.checkpoint)
    what = "test images"
    try:
        images = load_data_for(checkpoint, args.dataset, args.data_dir).test_images
    except UserError:
        if args.dataset:
            raise
        what = "images of noise, for want of the data set"
        images = torch.randint(256, (200, *checkpoint["traits"]["image"]), dtype=torch.uint8)
    said = (write_network if small else write_onnx)(out, checkpoint, images, *packages)
    print(f"{args.out}: {said} over {len(images):,} {what}")
    return 0


def write_network(out, checkpoint, images):
    """A checkpoint with the network alone, in half precision but for what BatchNorm has measured; what it differs by."""
    model = load_model(checkpoint, torch.device("cpu"))
    halves = {name for name, _ in model.named_parameters()}
    weights = {name: value.half() if name in halves else value for name, value in model.state_dict().items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"{out}: not written, half precision cannot hold these weights, they are too large")
    content = {key: checkpoint[key] for key in ("version", "format", "config", "traits", *STATE) if key in checkpoint}
    content |= dict.fromkeys(PARTS) | {"model": weights}
    world = World(0, 1, torch.device("cpu"))
    before, after = (class_scores(net, images, world) for net in (model, load_model(content | {"path": str(out)}, world.device)))
    write_atomically(out, lambda path: write_checkpoint(path, content))
    other = (before.argmax(1) != after.argmax(1)).sum()
    return f"{out.stat().st_size / 1e6:.1f} MB; {other} classes differ, lengths by at most {(before - after).abs().max():.1e},"


def write_onnx(out, checkpoint, images, onnxruntime, onnx, _):
    """An ONNX file with the names of the classes in its metadata, kept only if onnxruntime computes the same; what it
    holds and differs by."""
    model = WithLengths(load_model(checkpoint, torch.device("cpu"))).eval()
    outputs, worst = ["lengths", "capsules"] + ["decoded"] * bool(model.model.decoder), 0.0

    def write(path):
        nonlocal worst
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            torch.onnx.export(model, (to_float(images[:2]),), path, dynamo=True, external_data=False, verbose=False,
                              input_names=["images"], output_names=outputs,
                              dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
        content = onnx.load(path)
        onnx.helper.set_model_props(content, {"classes": json.dumps(checkpoint["traits"]["classes"])})
        onnx.save(content, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for part in map(to_float, images.split(EVALUATION_BATCH)):
            with torch.no_grad():
                expected = model(part)
            found = session.run(None, {"images": part.numpy()})
            if len(found) == 3:  # which of two capsules as long as each other is decoded may differ
                clear = np.ptp(np.sort(found[0])[:, -2:], axis=1) > 1e-5
                expected, found = ([lengths, capsules, decoded[clear]] for lengths, capsules, decoded in (expected, found))
            worst = max(worst, *(float(np.abs(a.numpy() - b).max(initial=0)) for a, b in zip(expected, found)))
        if not worst <= 1e-5:
            raise UserError(f"{out}: not written, onnxruntime differs by {worst:.1e}, expected at most 1e-5")
    write_atomically(out, write)
    shape, classes = (", ".join(map(str, checkpoint["traits"]["image"])), len(checkpoint["traits"]["classes"]))
    return (f"images [batch, {shape}] in [0, 1] -> lengths [batch, {classes}], {', '.join(outputs[1:])}; onnxruntime differs by "
            f"at most {worst:.1e}")
