"""ONNX files of checkpoints, and small ones of a network alone."""
import json
import os
import subprocess
import sys

import pytest
import torch
from common import CAPS, command, refused

import caps


def test_export(trained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = command("export", "--checkpoint", trained / "last.pt", "model.onnx", cwd=tmp_path)
    assert result.returncode == 0 and "over 1,000 test images" in result.stdout, result.stderr
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    images = torch.rand(7, 1, 28, 28)
    lengths, capsules = session.run(["lengths", "capsules"], {"images": images.numpy()})
    model = caps.load_model(caps.read_checkpoint(trained / "last.pt"), torch.device("cpu")).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(capsules), model(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.from_numpy(lengths), torch.from_numpy(capsules).norm(dim=2), atol=1e-5, rtol=0)


def test_export_of_something_else_is_refused(trained, tmp_path):
    """Without the packages, and where onnxruntime computes something else than the model."""
    def export(first):
        code = f"import sys; sys.path.insert(0, {os.path.dirname(CAPS)!r}); {first}; sys.exit(caps.main(sys.argv[1:]))"
        return subprocess.run([sys.executable, "-c", code, "export", "--checkpoint", str(trained / "last.pt"), "model.onnx"],
                              cwd=tmp_path, capture_output=True, text=True)
    result = export("sys.modules['onnxscript'] = None; import caps")
    assert result.returncode == 2 and "caps: export needs the package onnxscript" in result.stderr
    pytest.importorskip("onnxscript")
    result = export("import caps; from caps.extras import export; export.WithLengths.forward = lambda self, images: "
                    "(caps.lengths(self.model(images)), self.model(images) + caps.torch.onnx.is_in_onnx_export())")
    assert result.returncode == 2 and "model.onnx: not written" in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


def test_a_network_alone(trained, tmp_path):
    """A sixth of the checkpoint's size, of the same use, and nothing that is there is overwritten."""
    last = trained / "last.pt"
    result = command("export", "--checkpoint", last, "small.pt", cwd=tmp_path)
    assert result.returncode == 0 and "over 1,000 test images" in result.stdout, result.stderr
    small = tmp_path / "small.pt"
    assert small.stat().st_size < last.stat().st_size / 5.5
    images = torch.rand(7, 1, 28, 28)
    with torch.no_grad():
        whole, alone = (caps.load_model(caps.read_checkpoint(path), torch.device("cpu")).eval()(images) for path in (last, small))
    assert alone.dtype == torch.float32 and 0 < (whole - alone).abs().max() < 5e-3
    facts = [json.loads((tmp_path / out / "summary.json").read_text()) for out in ("a", "b")
             if command("eval", "--checkpoint", last if out == "a" else small, "--out", out, cwd=tmp_path).returncode == 0]
    assert abs(facts[0]["test_accuracy"] - facts[1]["test_accuracy"]) <= 0.002
    refused(command("export", "--checkpoint", last, "small.pt", cwd=tmp_path), "small.pt", "there already")
    refused(command("--resume", "small.pt", cwd=tmp_path), "small.pt", "cannot be gone on with")


def test_weights_that_half_precision_cannot_hold_are_refused(trained, tmp_path):
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    checkpoint["model"]["digits.weight"][0, 0, 0, 0] = 1e6
    torch.save(checkpoint, tmp_path / "large.pt")
    refused(command("export", "--checkpoint", "large.pt", "small.pt", cwd=tmp_path), "half precision")
    assert not (tmp_path / "small.pt").exists()


def test_batchnorms_statistics_stay_in_single_precision(tmp_path):
    model, traits = caps.ResCapsNet(), caps.extra("datasets").earlier_traits("mnist5k")
    model.backbone[2].running_var.fill_(1e6)
    config = {key: vars(caps.parse(["train", "--model", "rescaps", "--dataset", "mnist5k"]))[key] for key in (*caps.RECIPE, "epochs")}
    content = {"version": "1", "format": 2, "config": config, "traits": traits, "history": [], "position": 0, "steps": 0,
               "seconds": 0.0} | dict.fromkeys(caps.PARTS) | {"model": model.state_dict()}
    torch.save(content, tmp_path / "whole.pt")
    assert command("export", "--checkpoint", "whole.pt", "small.pt", cwd=tmp_path).returncode == 0
    alone = caps.load_model(caps.read_checkpoint(tmp_path / "small.pt"), torch.device("cpu"))
    assert alone.backbone[2].running_var.eq(1e6).all()
