"""ONNX files of checkpoints."""
import os
import subprocess
import sys

import pytest
import torch
from common import CAPS, command

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
