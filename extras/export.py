"""The mode `export`: a checkpoint as an ONNX file. Needs the packages of the extra: pip install -e '.[onnx]'."""

import contextlib
import io
import json
import pathlib
import warnings

import numpy as np
import torch
import torch.nn as nn

from caps import (EVALUATION_BATCH, UserError, file_name, lengths, load_model, package, read_checkpoint,
                  to_float)
from caps.extras.datasets import load_data_for
from caps.extras.runs import check_writable, write_atomically


def options(add):
    add("--checkpoint")
    add("--dataset")
    add("--data-dir")
    add("out", metavar="FILE", type=file_name, help="the file to write, model.onnx say")


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
    """A checkpoint as an ONNX file, kept only if onnxruntime computes the same over the test images. Its metadata hold
    the names of the classes."""
    onnxruntime, onnx, _ = (package(name, "export", "-e '.[onnx]'") for name in ("onnxruntime", "onnx", "onnxscript"))
    out = pathlib.Path(args.out)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name the file to write, {out / 'model.onnx'} say")
    check_writable(out.parent, "FILE")
    checkpoint = read_checkpoint(args.checkpoint)
    what = "test images"
    try:
        images = load_data_for(checkpoint, args.dataset, args.data_dir).test_images
    except UserError:
        if args.dataset:
            raise
        what = "images of noise, for want of the data set"
        images = torch.randint(256, (200, *checkpoint["traits"]["image"]), dtype=torch.uint8)
    model = WithLengths(load_model(checkpoint, torch.device("cpu"))).eval()
    outputs = ["lengths", "capsules"] + ["decoded"] * bool(model.model.decoder)

    def write(path):
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            torch.onnx.export(model, (to_float(images[:2]),), path, dynamo=True, external_data=False, verbose=False,
                              input_names=["images"], output_names=outputs,
                              dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
        content = onnx.load(path)
        onnx.helper.set_model_props(content, {"classes": json.dumps(checkpoint["traits"]["classes"])})
        onnx.save(content, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        worst = 0.0
        for part in map(to_float, images.split(EVALUATION_BATCH)):
            with torch.no_grad():
                expected = model(part)
            found = session.run(None, {"images": part.numpy()})
            if len(found) == 3:  # which of two capsules as long as each other is decoded may differ
                clear = np.ptp(np.sort(found[0])[:, -2:], axis=1) > 1e-5
                expected, found = ([lengths, capsules, decoded[clear]] for lengths, capsules, decoded in (expected, found))
            worst = max(worst, *(float(np.abs(a.numpy() - b).max(initial=0)) for a, b in zip(expected, found)))
        if not worst <= 1e-5:
            raise UserError(f"{args.out}: not written, onnxruntime differs by {worst:.1e}, expected at most 1e-5")
        shape, classes = (", ".join(map(str, checkpoint["traits"]["image"])), len(checkpoint["traits"]["classes"]))
        print(f"{args.out}: images [batch, {shape}] in [0, 1] -> lengths [batch, {classes}], {', '.join(outputs[1:])}; onnxruntime "
              f"differs by at most {worst:.1e} over {len(images):,} {what}")

    write_atomically(out, write)
    return 0
