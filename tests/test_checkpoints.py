"""Checkpoints: which one is meant, and those that are damaged, not finite or without what --resume needs."""
import shutil
from pathlib import Path

import pytest
import torch
from common import ROOT, start

import caps
from caps.extras import runs


def test_a_checkpoint_that_cannot_be_gone_on_with(main, finished):
    checkpoint, data = caps.read_checkpoint(finished / "last.pt"), ["--data-dir", finished.parent / "data"]
    torch.save({k: v for k, v in checkpoint.items() if k != "rng"}, "last.pt")
    status, line = main("--resume", "last.pt", *data)
    assert status == 2 and "last.pt" in line and "lacks rng" in line
    assert main("eval", "--checkpoint", "last.pt", *data)[0] == 0


@pytest.mark.parametrize("wrong", ["NaN", "another shape"])
def test_weights_that_cannot_be_used(main, finished, wrong):
    checkpoint, data = caps.read_checkpoint(finished / "last.pt"), ["--data-dir", finished.parent / "data"]
    weights = checkpoint["model"]["digits.weight"]
    checkpoint["model"]["digits.weight"] = weights * torch.nan if wrong == "NaN" else weights[:5]
    torch.save(checkpoint, "last.pt")
    for words in (["eval", "--checkpoint", "last.pt", *data], ["predict", "--checkpoint", "last.pt", ROOT / "docs/routing.png"],
                  ["--resume", "last.pt", "--epochs", 2, *data]):
        status, line = main(*words)
        assert status == 2 and ("not fit" in line or "finite" in line), line


def test_networks_that_come_along_have_names(main, finished, monkeypatch, tmp_path):
    """Whatever lies in the working directory, and their evaluations do not lie beside them."""
    data = ["--data-dir", finished.parent / "data"]
    shutil.copytree(finished, "alexcaps")
    for name, path in runs.NETWORKS.items():
        assert caps.parse(["eval", "--checkpoint", name]).checkpoint == str(path)
    monkeypatch.setitem(runs.NETWORKS, "alexcaps", tmp_path / "networks/alexcaps.pt")
    status, line = main("eval", *data)
    assert status == 2 and "networks/alexcaps.pt: no such checkpoint" in line
    status, line = main("eval", "--checkpoint", "rescap", *data)
    assert status == 2 and line.startswith("caps: rescap: ") and "alexcaps or rescaps" in line
    status, line = main("--resume", "rescaps", *data)
    assert status == 2 and "holds the network alone" in line
    shutil.copytree(finished, tmp_path / "networks")
    (tmp_path / "networks/last.pt").rename(tmp_path / "networks/alexcaps.pt")
    assert main("eval", *data)[0] == 0
    assert len(list(Path("runs/networks/alexcaps").glob("eval-*/summary.json"))) == 1
    assert main("eval", "--checkpoint", "./alexcaps", *data)[0] == 0 and list(Path("alexcaps").glob("eval-*"))


def test_a_runs_folder_stands_for_its_checkpoint(main, finished):
    data = ["--data-dir", finished.parent / "data"]
    assert main("eval", "--checkpoint", finished, "--out", "e", *data)[0] == 0
    assert main("--resume", finished, "--check", *data)[0] == 0


def test_a_checkpoint_of_other_bytes_is_refused(main, finished, tmp_path):
    """One weight's lowest bit, which torch.load takes as it comes."""
    whole = (finished / "last.pt").read_bytes()
    weight = caps.read_checkpoint(finished / "last.pt")["model"]["digits.weight"].numpy().tobytes()
    place = whole.index(weight) + 1000
    (tmp_path / "damaged.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
    assert torch.load(tmp_path / "damaged.pt")["steps"]
    status, line = main("eval", "--checkpoint", "damaged.pt", "--data-dir", finished.parent / "data")
    assert status == 2 and line.startswith("caps: damaged.pt: ") and "checksum" in line


def test_weights_that_are_not_finite_are_not_saved(few, tmp_path):
    run = start(few(tmp_path / "data"), tmp_path / "run")
    caps.save(run)
    with torch.no_grad():
        next(run.model.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(caps.UserError, match="no longer finite"):
        caps.save(run)
    assert all(w.isfinite().all() for w in caps.read_checkpoint(tmp_path / "run/last.pt")["model"].values())
