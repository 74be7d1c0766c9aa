"""Training, and what is kept of a run: steps, checkpoints, resuming, refusals, the files of its folder, evaluation."""
import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from common import CAPS, command, refused, start
from PIL import Image

import caps
from caps.extras import runs


def test_64_images_are_learnt_by_heart(embedded):
    torch.manual_seed(0)
    images, labels = caps.to_float(embedded.train_images[::64][:64]), embedded.train_labels[::64][:64]
    model = caps.AlexCapsNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        caps.margin_loss(caps.lengths(model(images)), labels).backward()
        optimizer.step()
    assert (caps.lengths(model(images)).argmax(1) == labels).all()


def test_accumulation_equals_the_large_batch(small, tmp_path):
    weights = []
    for name, words in (("a", ["--batch-size", "48"]), ("b", ["--batch-size", "12", "--accumulate", "4"])):
        run = start(small, tmp_path / name, *words)
        run.model.double()  # 320 images in steps of 48: the last group has 32, whose last micro-step has 8
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.01)
        inner = run.model.forward
        run.model.forward = lambda images: inner(images.double())
        caps.train_epoch(run)
        assert run.steps == 7
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-8)


def test_learning_rate_follows_the_recipe():
    args = caps.parse(["train"])
    one = caps.World(0, 1, torch.device("cpu"))
    rates = [caps.learning_rate(args, one, epoch, 1) for epoch in range(5)]
    assert rates == pytest.approx([1e-3, 1e-3, 7e-4, 7e-4, 4.9e-4])
    args = caps.parse(["train", "--lr-scale", "sqrt", "--warmup", "2", "--accumulate", "4"])
    assert caps.learning_rate(args, caps.World(0, 4, one.device), 0, 0.5) == pytest.approx(4e-3 / 4)


def test_half_and_half_is_the_whole(small, tmp_path):
    words = ["--dataset", "mnist", "--data-dir", small, "--ema", "0.99"]
    assert command("--epochs", 4, "--out", "whole", *words, cwd=tmp_path).returncode == 0
    assert command("--epochs", 2, "--out", "halves", *words, cwd=tmp_path).returncode == 0
    assert command("--epochs", 4, "--out", "halves", "--resume", "--data-dir", small, cwd=tmp_path).returncode == 0
    whole, halves = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "halves"))
    for part in ("model", "average"):
        assert all(torch.equal(whole[part][k], halves[part][k]) for k in whole[part])
    keep = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")
    assert [[row[k] for k in keep] for row in whole["history"]] == [[row[k] for k in keep] for row in halves["history"]]


def test_a_signal_in_mid_epoch_loses_nothing(small, tmp_path):
    words = ["--dataset", "mnist", "--data-dir", str(small), "--epochs", "3", "--batch-size", "4"]
    assert command("--out", "whole", *words, cwd=tmp_path).returncode == 0
    process = subprocess.Popen([sys.executable, CAPS, "--out", "cut", *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("epoch   1/3")
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM and "--resume cut/last.pt" in said
    cut = torch.load(tmp_path / "cut/last.pt", weights_only=True)
    assert len(cut["history"]) < 3
    assert command("--resume", "cut/last.pt", "--data-dir", small, cwd=tmp_path).returncode == 0
    whole, cut = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert all(torch.equal(whole["model"][k], cut["model"][k]) for k in whole["model"])
    assert whole["history"][-1]["train_loss"] == cut["history"][-1]["train_loss"]


def test_a_kill_while_the_checkpoint_is_written(small, tmp_path):
    words = ["--dataset", "mnist", "--data-dir", str(small), "--out", "run"]
    assert command("--epochs", 1, *words, cwd=tmp_path).returncode == 0
    killed = subprocess.run([sys.executable, "-c", f"""
import os, sys
sys.path.insert(0, {os.path.dirname(CAPS)!r})
import caps, torch
def half(content, path):
    path.write_bytes(b"half a checkpoint")
    os.kill(os.getpid(), 9)
torch.save = half
caps.main({["--epochs", "2", "--resume", *words[:4], "--out", "run"]!r})"""], cwd=tmp_path)
    assert killed.returncode == -9
    assert len(torch.load(tmp_path / "run/last.pt", weights_only=True)["history"]) == 1


def test_a_loss_that_is_not_finite_stops_the_run(small, tmp_path):
    result = command("--dataset", "mnist", "--data-dir", small, "--lr", "1e30", "--out", "run", "--epochs", 2, cwd=tmp_path)
    refused(result, "no longer finite", "epoch", "step", "last.pt")
    weights = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]
    assert all(w.isfinite().all() for w in weights.values())


def test_moments_of_another_memory_order_are_resumed(small, tmp_path):
    """Checkpoints of earlier versions hold ResCapsNet in channels-last order."""
    def step(run):
        caps.train_step(run, torch.arange(4), torch.zeros(4, 3), 4)
        return run

    words = ["--model", "rescaps", "--batch-size", "4"]
    run = step(start(small, tmp_path, *words))
    caps.save(run)
    checkpoint = torch.load(tmp_path / "last.pt", weights_only=True)
    for state in checkpoint["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].dim() == 4:
                state[name] = state[name].to(memory_format=torch.channels_last)
    torch.save(checkpoint, tmp_path / "last.pt")
    for a, b in zip(step(run).model.parameters(), step(start(small, tmp_path, *words, "--resume")).model.parameters()):
        assert torch.equal(a, b)


def test_resume_finds_the_newest_run_in_a_new_job(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("CAPS_JOB", "new")
    monkeypatch.setattr(runs, "JOB", "new")
    assert runs.find_resume(caps.parse(["train", "--resume", "--out", str(trained)])) == str(trained / "last.pt")
    assert runs.find_resume(caps.parse(["train", "--out", str(trained)])) is None
    monkeypatch.setattr(runs, "JOB", caps.read_checkpoint(trained / "last.pt")["job"])
    assert runs.find_resume(caps.parse(["train", "--out", str(trained)])) == str(trained / "last.pt")


def test_a_run_is_never_overwritten(small, tmp_path):
    words = ["--dataset", "mnist", "--data-dir", small, "--epochs", 1]
    for _ in range(2):
        assert command(*words, cwd=tmp_path).returncode == 0
    assert (tmp_path / "runs/alexcaps-mnist/last.pt").exists() and (tmp_path / "runs/alexcaps-mnist-2/last.pt").exists()
    before = (tmp_path / "runs/alexcaps-mnist/last.pt").read_bytes()
    refused(command(*words, "--out", "runs/alexcaps-mnist", cwd=tmp_path), "--resume", "--overwrite")
    refused(command("--resume", "runs/alexcaps-mnist/last.pt", "--lr", "0.5", "--data-dir", small, cwd=tmp_path), "--lr")
    assert (tmp_path / "runs/alexcaps-mnist/last.pt").read_bytes() == before
    assert command(*words, "--out", "runs/alexcaps-mnist", "--overwrite", "--seed", 2, cwd=tmp_path).returncode == 0
    assert (tmp_path / "runs/alexcaps-mnist/last.pt").read_bytes() != before


def test_one_epoch_on_the_embedded_images(trained):
    rows = list(csv.DictReader(open(trained / "metrics.csv")))
    assert list(rows[0]) == ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds",
                             "images_per_second", "dataset"]
    assert float(rows[0]["test_accuracy"]) > 0.6  # 0.77 was measured
    assert float(rows[1]["test_accuracy"]) > 0.8
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["test_accuracy"] == float(rows[1]["test_accuracy"]) and summary["dataset"] == "mnist5k"
    confusion = np.array(summary["confusion"])
    assert confusion.sum(1).tolist() == [100] * 10 and confusion.trace() == round(1000 * summary["test_accuracy"])
    assert summary["parameters"] == 2_683_840 and len(summary["auc"]) == 10 and 0.9 < summary["macro_auc"] <= 1
    for name in ("curves", "confusion", "roc", "misclassified"):
        with Image.open(trained / f"{name}.png") as picture:
            assert picture.width > 400
            picture.verify()


def test_eval_repeats_the_run(trained, tmp_path):
    result = command("eval", "--checkpoint", trained / "last.pt", "--out", "e", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (tmp_path / "e", trained))
    assert all(ours[k] == theirs[k] for k in ("test_accuracy", "test_loss", "confusion", "auc"))
