"""The command line: mistakes are one line, and nothing of a foreign file is run."""
import os
import pickle

import pytest
import torch
from common import command, refused

import caps


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "plain.pt"):
        refused(command("eval", "--checkpoint", name, cwd=tmp_path), name, "nothing of it was run")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("words, expected", [
    (["--epochs", "0"], ("--epochs", "'0'")), (["--lr", "nan"], ("--lr", "'nan'")), (["--batch-size", "1.5"], ("--batch-size",)),
    (["--model", "lenet"], ("--model", "alexcaps")), (["--nonsense"], ("--nonsense", "train --help")), (["--amp", "fp16", "--device", "cpu"], ("fp16",)),
    (["pedict", "x.png"], ("pedict", "predict")), (["eval", "--epoch", "1"], ("--epoch", "eval --help")),
    (["--graph", "--device", "cpu"], ("--graph", "GPU")),
    (["eval", "--checkpoint", "none.pt"], ("none.pt",)), (["report", "none"], ("none", "last.pt")), (["report"], ("no run",)), (["--resume", "none.pt"], ("none.pt",)), (["--resume"], ("--resume",)),
    (["--dataset", "mnist5k", "--holdout", "4000"], ("--holdout", "4000")), (["--out", "/dev/null/x", "--dataset", "mnist5k"], ("--out",)),
])
def test_bad_input_is_one_line(tmp_path, words, expected, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert caps.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("caps: ") and all(word in lines[0] for word in expected), lines
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["summary"], ["diagram"], ["export", "x.onnx"], ["--dataset", "mnist5k"], ["predict", "x.png"]])
def test_a_backend_that_is_none_is_refused(tmp_path, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caps, "_BACKEND", "fast")
    assert caps.main(words) == 2 and not list(tmp_path.iterdir())
    line, = capsys.readouterr().err.splitlines()
    assert line == "caps: CAPS_BACKEND=fast: backend is 'fast', expected 'auto', 'native' or 'torch'"


def test_help_and_summary(tmp_path):
    assert "default: 0.001" in command("train", "--help", cwd=tmp_path).stdout
    assert "predict" in command("--help", cwd=tmp_path).stdout
    said = command("summary", "--model", "rescaps", cwd=tmp_path).stdout
    assert "2,022,272" in said and "1296×8" in said


def test_extras_use_the_program_itself(tmp_path):
    """Not a second copy of its file, of which a UserError would not be recognised."""
    refused(command("report", "nowhere", cwd=tmp_path), "nowhere", "last.pt")
