"""Models, data, training, evaluation and the command line."""
import contextlib
import copy
import csv
import gzip
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import caps

report = caps.beside("docs", "report")

CAPS = str(Path(__file__).parent.parent / "caps.py")
FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
         "t10k": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}


def command(*words, cwd, **environment):
    """The real command line, finished: its status and what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "CAPS_DATA"} | environment
    return subprocess.run([sys.executable, CAPS, *map(str, words)], cwd=cwd, env=environment, capture_output=True,
                          text=True, timeout=400)


def refused(result, *expected):
    """Status 2, and one line that holds the expected words; no traceback."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("caps: native backend")]
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert len(lines) == 1 and lines[0].startswith("caps: ") and all(word in lines[0] for word in expected), lines


def write_idx(path, array):
    header = (0x0800 + array.ndim).to_bytes(4, "big") + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="session")
def embedded():
    return caps.load_data("mnist5k", "nowhere")


@pytest.fixture(scope="session")
def small(tmp_path_factory, embedded):
    """A data folder in torchvision's layout: 320 training and 100 test images out of the embedded ones."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, images, labels, count in (("train", embedded.train_images, embedded.train_labels, 320),
                                         ("t10k", embedded.test_images, embedded.test_labels, 100)):
        chosen = torch.arange(0, len(images), len(images) // count)[:count]
        for name, array in zip(FILES[split], (images[chosen], labels[chosen])):
            write_idx(raw / name, array.numpy())
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a two-epoch run on the embedded images, made by the command that a newcomer types."""
    cwd = tmp_path_factory.mktemp("trained")
    result = command("--model", "alexcaps", "--epochs", 2, "--dataset", "mnist5k", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd / "runs" / "alexcaps-mnist5k"


# ---- the mathematics, against numbers worked out by hand --------------------------------------------------------------


def test_squash_by_hand():
    # |(3, 4)| = 5 and 5 / (1 + 25) = 5/26
    torch.testing.assert_close(caps.squash(torch.tensor([3.0, 4.0])), torch.tensor([15 / 26, 20 / 26]))
    columns = caps.squash(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), dim=0)
    torch.testing.assert_close(columns, torch.tensor([[15 / 26, 0.0], [20 / 26, 0.5]]))


def test_lengths_and_their_gradient_at_zero():
    capsules = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], requires_grad=True)
    found = caps.lengths(capsules)
    assert found.tolist() == [[5.0, 0.0]]
    found.sum().backward()
    torch.testing.assert_close(capsules.grad, torch.tensor([[[0.6, 0.8], [0.0, 0.0]]]))


def test_margin_loss_by_hand():
    # class 0 present: (0.9 - 0.5)² = 0.16; class 1 absent: 0.5 (0.3 - 0.1)² = 0.02; class 2: below the margin
    # second sample: (0.9 - 0.95)+ = 0 and 0.5 (0.6 - 0.1)² = 0.125
    scores = torch.tensor([[0.5, 0.3, 0.05], [0.6, 0.95, 0.0]])
    assert caps.margin_loss(scores, torch.tensor([0, 1])).item() == pytest.approx((0.18 + 0.125) / 2)
    assert caps.margin_loss(scores[:1], torch.tensor([0]), 0.8, 0.2, 1.0).item() == pytest.approx(0.09 + 0.01)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_routing_by_hand(backend):
    # One input capsule with votes (1, 0): t = 1: c = 1/2, s = 1/2, v = 0.25 / 1.25 = 0.2; b = (0.2, 0)
    # t = 2: c = e^0.2 / (e^0.2 + 1) = s, v = s² / (1 + s²)
    s = math.exp(0.2) / (math.exp(0.2) + 1)
    votes = torch.tensor([[[[1.0], [0.0]]]])
    for iterations, expected in ((1, 0.2), (2, s * s / (1 + s * s))):
        found = caps.routing(votes, iterations, backend=backend)
        torch.testing.assert_close(found, torch.tensor([[[expected], [0.0]]]))
    weight, inputs = torch.tensor([[[[2.0]], [[0.0]]]]), torch.tensor([[[0.5]]])  # W·u gives the same votes
    torch.testing.assert_close(caps.capsule_linear(inputs, weight, 2, backend=backend), found)


def test_one_output_capsule_needs_no_agreement():
    votes = torch.randn(2, 5, 1, 4)
    torch.testing.assert_close(caps.routing(votes, 3), caps.squash(votes.sum(1)))


def test_gradients_of_the_plain_version():
    votes = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    for iterations in (1, 3):
        assert torch.autograd.gradcheck(lambda v: caps.routing(v, iterations, backend="torch"), votes)
        assert torch.autograd.gradcheck(lambda u, w: caps.capsule_linear(u, w, iterations, backend="torch"), (inputs, weight))


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, parameters", [(caps.AlexCapsNet, 2_683_840), (caps.ResCapsNet, 2_022_272)])
def test_shapes_parameters_and_independent_samples(model, parameters):
    torch.manual_seed(0)
    net = model().eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    images = torch.rand(3, 1, 28, 28)
    digits = net(images)
    assert digits.shape == (3, 10, 16) and (caps.lengths(digits) < 1).all()
    for i in range(3):
        torch.testing.assert_close(net(images[i:i + 1])[0], digits[i], rtol=1e-4, atol=1e-6)
    assert model(num_classes=7)(images).shape == (3, 7, 16)


def test_layer_table_totals():
    rows = caps.layer_table(caps.AlexCapsNet())
    assert sum(row[3] for row in rows) == 2_683_840
    first = next(row for row in rows if row[1] == "Conv2d")
    assert first[2] == (64, 6, 6) and first[4] == 64 * 121 * 36
    assert rows[-1][2] == (10, 16) and rows[-1][4] == 128 * 10 * 16 * (8 + 3 + 2)


def test_pixels_permute_capsules():
    primary = caps.PrimaryCapsules(types=2, dim=3)
    maps = torch.randn(1, 6, 2, 2)
    order = torch.tensor([2, 0, 3, 1])
    permuted = maps.flatten(2)[:, :, order].view_as(maps)
    by_type = primary(maps).view(2, 4, 3)
    torch.testing.assert_close(primary(permuted).view(2, 4, 3), by_type[:, order])
    torch.testing.assert_close(by_type[1, 0] / by_type[1, 0].norm(), maps[0, 3:, 0, 0] / maps[0, 3:, 0, 0].norm())


@pytest.mark.parametrize("model", [caps.AlexCapsNet, caps.ResCapsNet])
def test_zero_input_has_finite_gradients(model):
    net = model()
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    caps.margin_loss(caps.lengths(net(torch.zeros(2, 1, 28, 28))), torch.tensor([0, 1])).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_small_map_convolution_is_the_convolution(kernel, dtype, tolerance):
    torch.manual_seed(kernel)
    layer = caps.SmallMapConv2d(6, 5, kernel).to(dtype)
    maps = torch.randn(4, 6, 2, 2, dtype=dtype, requires_grad=True)
    tensors = [maps, layer.weight, layer.bias]
    plain = torch.nn.Conv2d.forward(layer, maps)
    fast = layer(maps)
    gradient = torch.randn_like(plain)
    torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)
    for a, b in zip(*(torch.autograd.grad(y, tensors, gradient) for y in (fast, plain))):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    larger = torch.randn(1, 6, 4, 3, dtype=dtype)
    torch.testing.assert_close(layer(larger), torch.nn.Conv2d.forward(layer, larger))


# ---- data ------------------------------------------------------------------------------------------------------------


def test_embedded_split_is_stratified(embedded):
    assert embedded.train_labels.bincount().tolist() == [400] * 10
    assert embedded.test_labels.bincount().tolist() == [100] * 10
    train = {image.numpy().tobytes() for image in embedded.train_images}
    assert not any(image.numpy().tobytes() in train for image in embedded.test_images)


def test_gzipped_and_raw_files_read_alike(small, tmp_path):
    shutil.copytree(small, tmp_path / "gz")
    for path in (tmp_path / "gz/MNIST/raw").iterdir():
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    raw, zipped = (caps.load_data("mnist", folder) for folder in (small, tmp_path / "gz"))
    assert torch.equal(raw.train_images, zipped.train_images) and torch.equal(raw.test_labels, zipped.test_labels)
    assert raw.train_images.shape == (320, 28, 28)


def test_holdout_takes_the_place_of_the_test_set(small):
    whole, part = caps.load_data("mnist", small), caps.load_data("mnist", small, holdout=20)
    assert torch.equal(part.test_images, whole.train_images[-20:]) and len(part.train_images) == 300
    assert "held out" in part.note


def test_an_epoch_is_a_function_of_seed_and_epoch():
    order, motion = caps.epoch_plan(1000, 1, 0, rotate=10, shift=2)
    assert sorted(order.tolist()) == list(range(1000))
    assert torch.equal(order, caps.epoch_plan(1000, 1, 0, 10, 2)[0])
    assert not torch.equal(order, caps.epoch_plan(1000, 1, 1, 10, 2)[0])
    assert not torch.equal(order, caps.epoch_plan(1000, 2, 0, 10, 2)[0])
    angle = motion[:, 0].rad2deg().abs().max().item()
    assert 9 < angle <= 10 and 1.8 / 14 < motion[:, 1:].abs().max().item() <= 2 / 14


def test_move_rotates_and_shifts():
    images = torch.rand(3, 1, 28, 28)
    motion = torch.tensor([[0, 0, 0], [math.pi / 2, 0, 0], [0, 2 / 28, 0]])
    moved = caps.move(images, motion)
    torch.testing.assert_close(moved[0], images[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[1], images[1].rot90(1, (1, 2)), atol=1e-4, rtol=0)
    torch.testing.assert_close(moved[2, :, :, :-1], images[2, :, :, 1:], atol=1e-4, rtol=0)
    assert moved[2, :, :, -1].abs().max() < 1e-4


def damage(raw, kind):
    images, labels = raw / FILES["train"][0], raw / FILES["train"][1]
    if kind == "truncated":
        images.write_bytes(images.read_bytes()[:-1000])
    elif kind == "swapped":
        images.rename(raw / "x"), labels.rename(images), (raw / "x").rename(labels)
    elif kind == "empty":
        images.write_bytes(b"")
    elif kind == "foreign":
        images.write_bytes(b"<html>404 not found</html>")
    elif kind == "broken gzip":
        images.with_name(images.name + ".gz").write_bytes(gzip.compress(images.read_bytes())[:500])
        images.unlink()
    elif kind == "exchanged":
        for train, test in zip(FILES["train"], FILES["t10k"]):
            (raw / train).rename(raw / "x"), (raw / test).rename(raw / train), (raw / "x").rename(raw / test)
    elif kind == "mismatch":
        write_idx(labels, np.zeros(7))
    elif kind == "labels":
        write_idx(labels, np.full(320, 11))


@pytest.mark.parametrize("kind, words", [
    ("truncated", ("train-images", "bytes")), ("swapped", ("train-images", "00000803")), ("empty", ("train-images", "nothing")),
    ("foreign", ("train-images", "IDX")), ("broken gzip", ("train-images", ".gz")), ("exchanged", ("exchanged",)),
    ("mismatch", ("train-labels", "320", "7")), ("labels", ("train-labels", "11"))])
def test_damaged_files_are_named(small, tmp_path, kind, words):
    shutil.copytree(small, tmp_path / "d")
    damage(tmp_path / "d/MNIST/raw", kind)
    with pytest.raises(caps.UserError) as error:
        caps.load_data("auto", tmp_path / "d")
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)
    if kind in ("truncated", "swapped", "empty", "foreign"):
        refused(command("--data-dir", tmp_path / "d", cwd=tmp_path), *words)
        assert not (tmp_path / "runs").exists()


def no_download(monkeypatch):
    from torchvision import datasets

    def fail(*args, **kwargs):
        raise RuntimeError("Error downloading train-images")
    monkeypatch.setattr(datasets, "MNIST", fail)


def test_only_auto_falls_back(tmp_path, monkeypatch):
    no_download(monkeypatch)
    with pytest.raises(caps.UserError, match="train-images-idx3-ubyte.*CAPS_DATA.*mnist5k"):
        caps.load_data("mnist", tmp_path)
    data = caps.load_data("auto", tmp_path)
    assert data.name == "mnist5k" and "not the full MNIST" in data.note


@pytest.mark.skipif(not os.environ.get("CAPS_DATA"), reason="CAPS_DATA does not name the full MNIST set")
def test_the_full_set():
    data = caps.load_data("auto", os.environ["CAPS_DATA"])
    assert data.name == "mnist" and data.train_images.shape == (60_000, 28, 28) and len(data.test_labels) == 10_000


# ---- training --------------------------------------------------------------------------------------------------------


def start(small, folder, *words):
    """A run in this process, ready to train on the small set."""
    args = caps.parse(["train", "--dataset", "mnist", "--data-dir", str(small), "--device", "cpu", "--out", str(folder), *words])
    return caps.start_run(args, caps.World(0, 1, torch.device("cpu")))


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


def fake_graphs(monkeypatch, failing=False):
    """CUDA graphs without CUDA: a capture notes the call of update_weights and runs nothing; a replay runs it with the
    Python values of the capture and with what the tensors then hold. Returns the names of what is done, in order."""
    update, capturing, done = caps.update_weights, [], []

    def swap(run, steps, group):
        before = run.steps, dict(run.optimizer.param_groups[0])
        run.steps = steps
        run.optimizer.param_groups[0].update(group)
        return before

    def update_weights(run, *arguments):
        [group] = run.optimizer.param_groups
        if not capturing:
            done.append("eager")
            return update(run, *arguments)
        done.append("capture")
        assert group["capturable"] and all(p.grad is None for p in group["params"])
        if failing:
            raise RuntimeError("no such kernel\nin a graph")
        capturing[0].call = run, arguments, (run.steps, dict(group))

    class Graph:
        def replay(self):
            run, arguments, values = self.call
            now = swap(run, *values)
            done.append("replay")
            update(run, *arguments)
            swap(run, *now)

    class Stream:
        def __init__(self, device=None):
            self.wait_stream = lambda other: None

    @contextlib.contextmanager
    def capture(graph, stream):
        capturing.append(graph)
        try:
            yield
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        finally:
            capturing.clear()

    for name, fake in (("CUDAGraph", Graph), ("graph", capture), ("Stream", Stream), ("current_stream", Stream),
                       ("stream", lambda stream: contextlib.nullcontext())):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(caps, "update_weights", update_weights)
    return done


def test_a_graph_takes_the_same_steps(small, tmp_path, monkeypatch):
    rate, scaler = caps.learning_rate, torch.amp.GradScaler
    monkeypatch.setattr(caps, "learning_rate", lambda *args: float(np.float32(rate(*args))))  # a graph reads float32
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 1024.0, growth_interval=3))
    monkeypatch.setattr(caps, "lacks_gpu", lambda args: False)
    done = fake_graphs(monkeypatch)

    def epoch(run):  # of 320 images: 5 full groups, and one of 20
        done.clear()
        caps.train_epoch(run)
        run.history.append({})
        run.position = 0
        caps.save(run)
        checkpoint = caps.read_checkpoint(run.folder / "last.pt")
        return {name: checkpoint[name] for name in (*caps.PARTS, "totals", "steps")}

    words = ["--batch-size", "30", "--accumulate", "2", "--ema", "0.9", "--warmup", "1.5"]
    plain, graph = start(small, tmp_path / "plain", *words), start(small, tmp_path / "graph", *words, "--graph")
    torch.testing.assert_close(epoch(plain), epoch(graph), rtol=0, atol=0)
    assert done == ["eager"] * 3 + ["capture"] + ["replay"] * 2 + ["eager"]
    crossed = [start(small, tmp_path / name, "--resume", str(tmp_path / name / "last.pt"), *words)
               for name, *words in (("plain", "--graph"), ("graph",))]
    whole = epoch(plain)
    for run in (*crossed, graph):
        torch.testing.assert_close(epoch(run), whole, rtol=0, atol=0)
    assert done == ["replay"] * 5 + ["eager"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(caps.UserError, match="--graph: .* one process"):
        caps.parse(["--graph"])


def test_a_step_that_cannot_be_captured_ends_the_run(small, tmp_path, monkeypatch):
    monkeypatch.setattr(caps, "lacks_gpu", lambda args: False)
    fake_graphs(monkeypatch, failing=True)
    with pytest.raises(caps.UserError, match="--graph: .* leave the option out \\(no such kernel\\)"):
        caps.train_epoch(start(small, tmp_path, "--graph"))


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


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="denormals are flushed on x86 alone")
def test_denormal_numbers_do_not_slow_training(tmp_path):
    code = ("import torch, caps\n"
            "def look(run):\n"
            "    print((torch.full([2**22], 1e-38) * 0.1).count_nonzero().item())\n"
            "    run.signal = 2\n"
            "caps.train_epoch = look\n"
            "caps.main(['train', '--dataset', 'mnist5k', '--out', 'run'])")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": os.path.dirname(CAPS)})
    assert result.returncode == 0 and result.stdout.split()[0] == "0", result.stdout + result.stderr


def test_compiled_training_is_the_training(small, tmp_path, monkeypatch, capsys):
    """Three steps of ResCapsNet, the last with fewer images, against those of the model as it is; then a resumed run."""
    def steps(run, first, last):
        order, motion = caps.epoch_plan(320, 1, 0, 10, 0)
        for part in [slice(0, 8), slice(8, 16), slice(16, 21)][first:last]:
            caps.train_step(run, order[part], motion[part], part.stop - part.start)
        return run

    words = ["--model", "rescaps", "--batch-size", "8"]
    plain = start(small, tmp_path / "plain", *words)
    assert plain.net is plain.model
    monkeypatch.setattr(caps, "pays_compiling", lambda *_: True)
    fast = start(small, tmp_path / "fast", *words)
    assert "compiling ResCapsNet" in capsys.readouterr().err
    assert fast.net is not fast.model and all(p.grad is None for p in fast.model.parameters())
    for (name, a), b in zip(plain.model.state_dict().items(), fast.model.state_dict().values()):
        assert torch.equal(a, b), name
    images, labels = caps.to_float(plain.data.train_images[:8]), plain.data.train_labels[:8]
    exact = copy.deepcopy(plain.model).double()
    gradients = [torch.autograd.grad(caps.margin_loss(caps.lengths(net(x)), labels), model.parameters()) for net, model, x in (
        (fast.net, fast.model, images), (plain.net, plain.model, images), (exact, exact, images.double()))]
    for (name, _), a, b, c in zip(plain.model.named_parameters(), *gradients):
        if name != "backbone.1.bias":  # BatchNorm takes it away again
            assert (a - c).norm() <= 5e-3 * c.norm() and (b - c).norm() <= 5e-3 * c.norm(), name
    steps(plain, 0, 3), steps(fast, 0, 2)
    caps.save(fast)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    steps(fast, 2, 3)
    assert graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # the last group is not compiled for
    torch.testing.assert_close(fast.totals, plain.totals, rtol=1e-3, atol=0)  # Adam's first step is a sign
    again = steps(start(small, tmp_path / "fast", *words, "--resume"), 2, 3)
    for (name, a), b in zip(fast.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_model_that_cannot_be_compiled_is_trained_as_it_is(small, monkeypatch, capsys):
    model, images = caps.ResCapsNet(), caps.load_data("mnist", small).train_images[:4]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def compiler(model, dynamic, options):
        def net(images):
            model(images)
            raise error
        return net

    monkeypatch.setattr(torch, "compile", compiler)
    for error, said in (RuntimeError("no compiler\nand more"), "no compiler"), (AssertionError(), "AssertionError"):
        assert caps.compiled(model, images, "off") is model
        assert f"without torch.compile, {said}\n" in capsys.readouterr().err
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("words, images, expected", [
    ("--model rescaps", 60_000, True), ("--model rescaps", 3_199, False), ("--model alexcaps", 60_000, False)])
def test_compilation_where_it_pays(words, images, expected):
    args = caps.parse(["train", *words.split()])
    assert caps.pays_compiling(args, caps.World(0, 1, torch.device("cpu")), images) is expected
    assert not caps.pays_compiling(args, caps.World(0, 1, torch.device("cuda")), images)


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
    monkeypatch.setattr(caps, "JOB", "new")
    assert caps.find_resume(caps.parse(["train", "--resume", "--out", str(trained)])) == str(trained / "last.pt")
    assert caps.find_resume(caps.parse(["train", "--out", str(trained)])) is None
    monkeypatch.setattr(caps, "JOB", caps.read_checkpoint(trained / "last.pt")["job"])
    assert caps.find_resume(caps.parse(["train", "--out", str(trained)])) == str(trained / "last.pt")


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


# ---- use -------------------------------------------------------------------------------------------------------------


def test_eval_repeats_the_run(trained, tmp_path):
    result = command("eval", "--checkpoint", trained / "last.pt", "--out", "e", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (tmp_path / "e", trained))
    assert all(ours[k] == theirs[k] for k in ("test_accuracy", "test_loss", "confusion", "auc"))


def test_predict(trained, embedded, tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    scores = caps.class_scores(caps.load_model(caps.read_checkpoint(trained / "last.pt"), torch.device("cpu")),
                               embedded.test_images, caps.World(0, 1, torch.device("cpu")))
    sure = scores.argmax(0)  # the image with the longest capsule of each class
    for digit in (0, 1):
        picture = Image.fromarray(embedded.test_images[sure[digit]].numpy())
        picture.save(folder / f"{digit}.png")
        Image.fromarray(255 - np.asarray(picture)).resize((200, 200)).save(folder / f"{digit}-inverted.jpg")
    (folder / "broken.png").write_bytes(b"no image")
    result = command("predict", "--checkpoint", trained / "last.pt", folder / "0.png", folder / "1.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for digit, line in enumerate(result.stdout.splitlines()):
        assert line.startswith(f"{folder}/{digit}.png: {digit}  lengths {digit} (") and line.count("(") >= 3
    result = command("predict", "--checkpoint", trained / "last.pt", folder, "missing.png", cwd=tmp_path)
    assert result.returncode == 1 and len(result.stdout.splitlines()) == 4
    assert "broken.png: cannot be read" in result.stderr and "missing.png: cannot be read" in result.stderr
    result = command("predict", "--checkpoint", trained / "last.pt", "--invert", "digits/*.jpg", cwd=tmp_path)
    assert [line.split(": ")[1][0] for line in result.stdout.splitlines()] == ["0", "1"]


def test_predict_explains(trained, embedded, tmp_path):
    Image.fromarray(embedded.test_images[0].numpy()).save(tmp_path / "digit.png")
    result = command("predict", "--checkpoint", trained / "last.pt", "digit.png", "--explain", "why", cwd=tmp_path)
    assert result.returncode == 0 and Image.open(tmp_path / "why/digit.png-routing.png").size[0] > 800, result.stderr
    votes, trace = torch.randn(2, 30, 5, 4, dtype=torch.float64), []
    v = caps._routing(votes, 3, trace)
    assert len(trace) == 3 and trace[-1][1] is v and (trace[0][0] == 0.2).all()
    for c, after in trace:
        torch.testing.assert_close(c.sum(2), torch.ones(2, 30, dtype=torch.float64))
        torch.testing.assert_close(after, caps.squash(torch.einsum("bnj,bnjd->bjd", c, votes), backend="torch"))
    assert not torch.allclose(trace[1][0], trace[0][0])


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
    result = export("import caps; caps.WithLengths.forward = lambda self, images: "
                    "(caps.lengths(self.model(images)), self.model(images) + caps.torch.onnx.is_in_onnx_export())")
    assert result.returncode == 2 and "model.onnx: not written" in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


def test_a_digit_is_framed_as_in_mnist(tmp_path, embedded):
    Image.fromarray(embedded.test_images[0].numpy()).save(tmp_path / "as-it-is.png")
    torch.testing.assert_close(caps.read_digit(tmp_path / "as-it-is.png"), caps.to_float(embedded.test_images[:1])[0])
    ink = np.zeros((300, 500), np.uint16)
    ink[20:220, 30:80] = 65535
    Image.fromarray(ink).save(tmp_path / "bar.png")  # 16-bit, off centre
    bar = caps.read_digit(tmp_path / "bar.png")[0]
    rows, columns = bar.sum(1).nonzero().flatten(), bar.sum(0).nonzero().flatten()
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (4, 23, 11, 15) or (columns[0], columns[-1]) == (12, 16)
    clear = np.zeros((28, 28, 4), np.uint8)
    clear[10:20, 10:20, 3] = 255  # opaque black on a transparent ground
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert caps.read_digit(tmp_path / "clear.png", invert=True)[0, 15, 15] == 1
    blank = Image.new("L", (40, 40))
    blank.save(tmp_path / "blank.png")
    assert caps.read_digit(tmp_path / "blank.png").abs().max() == 0


def test_a_blank_image_is_uncertain(trained, tmp_path):
    Image.new("L", (28, 28), 255).save(tmp_path / "white.png")
    Image.new("L", (28, 28)).save(tmp_path / "black.png")
    result = command("predict", "--checkpoint", trained / "last.pt", tmp_path, cwd=tmp_path)
    assert result.returncode == 0 and "no capsule is longer than 0.5" in result.stdout


# ---- report ----------------------------------------------------------------------------------------------------------


def hand_made(folder, model="alexcaps", accuracies=(0.95, 0.97), losses=None, **changes):
    """A run's folder with the two text files that training leaves there."""
    folder.mkdir(parents=True)
    losses = losses or [0.1 * 0.9 ** epoch for epoch in range(len(accuracies))]
    rows = [dict(zip(caps.COLUMNS, (epoch, loss, accuracy, loss, accuracy, 1e-3, 100.0, 600.0, "mnist")))
            for epoch, (loss, accuracy) in enumerate(zip(losses, accuracies), 1)]
    caps.write_metrics(folder / "metrics.csv", rows)
    recipe = vars(caps.parse(["train"]))
    caps.write_json(folder / "summary.json", {k: recipe[k] for k in caps.RECIPE} | {
        "model": model, "dataset": "mnist", "train_images": 60_000, "epochs": len(rows), "parameters": 2_683_840,
        "seconds_per_epoch": 100.0, "test_accuracy": accuracies[-1], "macro_auc": 0.999, "device": "cpu, 1 threads",
        "confusion": (1000 * np.eye(10, dtype=int)).tolist(), "world_size": 1, "peak_memory_bytes": 2**30} | changes)
    return folder


def read_runs(*folders):
    return [report.read_run(folder) for folder in folders]


def res(accuracies=(0.95, 0.97), **changes):
    return {"model": "rescaps", "parameters": 2_022_272, "accuracies": accuracies} | changes


def alex(accuracies=(0.95, 0.97), **changes):
    return {"accuracies": accuracies} | changes


HOLDS, FAILS, UNKNOWN = "holds", "**does not hold**", "not measured"
R2 = {"both": ((0.6, 0.1), (0.5, 0.2)), "short": ((0.6, 0.1), (0.4, 0.2)), "length": ((0.6, 0.1), (0.6, 0.7))}


@pytest.mark.parametrize("claim, specs, verdict, words", [
    ("AlexCapsNet: 98.06", [alex([0.9] * 9 + [0.9806] + [0.1] * 10)], HOLDS, ["98.06 % after 10 of 10"]),
    ("AlexCapsNet: 98.06", [alex([0.99] * 9 + [0.9805] + [0.99] * 10)], FAILS, ["98.05 % after 10 of 10"]),
    ("AlexCapsNet: 98.06", [alex([0.9, 0.98])], UNKNOWN, ["98.00 % after 2 of 10"]),
    ("AlexCapsNet: 98.06", [alex([0.9, 0.981])], HOLDS, ["98.10 % after 2 of 10"]),
    ("AlexCapsNet: 98.06", [alex([0.99] * 20, world_size=4)], UNKNOWN, ["no finished run", "1 process"]),
    ("AlexCapsNet: 98.06", [alex([0.99] * 20, dataset="mnist5k", train_images=4000)], UNKNOWN, ["no finished run"]),
    ("AlexCapsNet: 98.06", [alex([0.99] * 20, holdout=5000, train_images=55_000)], UNKNOWN, ["no finished run"]),
    ("AlexCapsNet: 96.28", [alex([0.9] * 19 + [0.9628], world_size=4)], HOLDS, ["96.28 % after 20 of 20"]),
    ("AlexCapsNet: 96.28", [alex([0.99] * 19 + [0.9627], world_size=4)], FAILS, ["96.27"]),
    ("AlexCapsNet: 96.28", [alex([0.99] * 20)], UNKNOWN, ["several processes"]),
    ("ResCapsNet: 98.70", [res([0.9] * 19 + [0.987])], HOLDS, ["98.70"]),
    ("ResCapsNet: 98.70", [res([0.99] * 19 + [0.9869])], FAILS, ["98.69"]),
    ("ResCapsNet: 98.70", [res([0.9, 0.9865])], UNKNOWN, ["after 2 of 20"]),
    ("ResCapsNet: 97.86", [res([0.9] * 9 + [0.9786], world_size=2)], HOLDS, ["97.86"]),
    ("ResCapsNet: 97.86", [res([0.99] * 9 + [0.9785], world_size=2)], FAILS, ["97.85"]),
    ("ResCapsNet: 97.86", [res([0.9, 0.9], world_size=2)], UNKNOWN, ["after 2 of 10"]),
    ("ResCapsNet ends", [alex([0.9, 0.97]), res([0.9, 0.98])], HOLDS, ["98.00", "97.00", "0.22 points"]),
    ("ResCapsNet ends", [alex([0.9, 0.98]), res([0.9, 0.97])], FAILS, []),
    ("ResCapsNet ends", [alex([0.9, 0.97]), res([0.9, 0.974])], UNKNOWN, ["0.23 points"]),
    ("ResCapsNet ends", [alex([0.97]), res([0.9, 0.98])], UNKNOWN, []),
    ("ResCapsNet ends", [alex([0.9, 0.98]), res([0.97])], UNKNOWN, []),
    ("ResCapsNet ends", [alex([0.9, 0.97]), res([0.98])], HOLDS, []),
    ("ResCapsNet ends", [alex([0.98]), res([0.9, 0.97])], FAILS, []),
    ("ResCapsNet ends", [alex()], UNKNOWN, ["ResCapsNet"]),
    ("AlexCapsNet reaches", [alex([0.9, 0.9, 0.9]), res([0.8, 0.89, 0.9])], HOLDS, ["epoch 1 against epoch 3"]),
    ("AlexCapsNet reaches", [alex([0.9, 0.9]), res([0.8, 0.9])], FAILS, ["epoch 1 against epoch 2"]),
    ("AlexCapsNet reaches", [alex([0.9, 0.9]), res([0.8, 0.8])], HOLDS, ["not within 2 epochs"]),
    ("AlexCapsNet reaches", [alex([0.9, 0.9]), res([0.8])], UNKNOWN, ["not within 1 epochs"]),
    ("AlexCapsNet reaches", [alex([0.8, 0.8]), res([0.8, 0.9])], FAILS, []),
    ("ROC", [alex(macro_auc=0.99), res(macro_auc=0.995)], HOLDS, ["AlexCapsNet 0.99000, ResCapsNet 0.99500"]),
    ("ROC", [alex(macro_auc=0.999), res(macro_auc=0.9899)], FAILS, []),
    ("ROC", [alex(macro_auc=0.999)], UNKNOWN, []),
    ("AlexCapsNet has", [alex(), res()], FAILS, ["2.68 million", "2.02 million"]),
    ("AlexCapsNet has", [alex(parameters=30_000_000), res()], HOLDS, ["30.00 million"]),
    ("AlexCapsNet has", [alex(parameters=30_000_000)], UNKNOWN, []),
    ("AlexCapsNet has", [alex(parameters=30_000_000), res(parameters=10_000_000)], FAILS, []),
    ("An AlexCapsNet epoch", [alex(seconds_per_epoch=150.0), res()], HOLDS, ["1.50 times", "0.049 times the multiply-adds"]),
    ("An AlexCapsNet epoch", [alex(seconds_per_epoch=149.0), res()], FAILS, ["1.49 times"]),
    ("An AlexCapsNet epoch", [alex(seconds_per_epoch=150.0), res(device="cpu, 2 threads")], UNKNOWN, ["not the same"]),
    ("Several", [alex(), alex(seconds_per_epoch=50.0, world_size=4)], HOLDS, ["2.00 times"]),
    ("Several", [alex(), alex(seconds_per_epoch=80.0, world_size=4)], FAILS, ["1.25 times"]),
    ("Several", [alex(), alex(seconds_per_epoch=50.0, world_size=4, amp="bf16")], UNKNOWN, ["not the same device and amp"]),
    ("Several", [alex()], UNKNOWN, []),
    ("The loss", [alex([0.9] * 3, losses=[3.0, 2.0, 1.0])], HOLDS, ["fell in 2 of 2"]),
    ("The loss", [alex([0.9] * 3, losses=[1.0, 2.0, 1.0])], FAILS, ["fell in 1 of 2", "100.0 %"]),
    ("The loss", [alex([0.9] * 12, losses=[1 - i / 20 for i in range(11)] + [0.6])], FAILS, ["fell in 10 of 11", "20.0 %"]),
    ("The loss", [alex([0.9])], UNKNOWN, []),
    ("The loss", [alex(dataset="mnist5k")], UNKNOWN, []),
    ("No instability", [alex([0.95, 0.935, 0.95])], HOLDS, ["1.50 points"]),
    ("No instability", [alex([0.95, 0.929, 0.95])], FAILS, ["2.10 points"]),
    ("No instability", [alex(losses=[0.1, float("nan")])], FAILS, ["not finite"]),
    ("No instability", [alex(iterations=1)], UNKNOWN, []),
    ("Capsules", [alex(), res(), R2["both"]], HOLDS, ["0.60", "0.50"]),
    ("Capsules", [alex(), res(), R2["short"]], FAILS, ["0.40"]),
    ("Capsules", [alex(), res(), R2["length"]], FAILS, ["0.70"]),
    ("Capsules", [alex(), R2["both"]], UNKNOWN, ["no ResCapsNet"]),
    ("Capsules", [alex(), R2["short"][::-1]], FAILS, ["no ResCapsNet"]),
    ("Capsules", [alex(), res()], UNKNOWN, []),
])
def test_claims(tmp_path, claim, specs, verdict, words):
    r2 = [spec for spec in specs if isinstance(spec, tuple)]
    runs = read_runs(*(hand_made(tmp_path / str(i), **spec) for i, spec in enumerate(specs) if isinstance(spec, dict)))
    fits = {run.title: {kind: (np.full(10, x), np.zeros(10)) for kind, x in zip("clp", (*pair, 0.9))}
            for run, pair in zip(runs, r2[0] if r2 else ())}
    row, = [row for row in report.claims(runs, fits) if row["the study"].startswith(claim)]
    assert row["verdict"] == verdict and all(word in row["measured here"] for word in words), row


def test_the_run_that_judges_is_not_chosen_by_its_accuracy(tmp_path):
    better = hand_made(tmp_path / "a", accuracies=[0.99] * 10, ema=0.999)
    plain = hand_made(tmp_path / "b", accuracies=[0.97] * 10)
    short = hand_made(tmp_path / "c", accuracies=[0.995] * 4)
    assert report.reference(read_runs(better, plain, short), "alexcaps", False).folder == plain
    assert report.reference(read_runs(better, short), "alexcaps", False).folder == better


def test_results_row_by_hand(tmp_path):
    run, = read_runs(hand_made(tmp_path / "run", accuracies=[0.95, 0.9712], lr=0.002, world_size=4))
    row = report.results_row(run)
    assert list(row.values())[:-1] == [
        "AlexCapsNet, 4 processes", "lr 0.002", "97.12 %", 2, "2,683,840", "10,588,416", "100", "600",
        "1,024 MiB", "0.99900", 4, "cpu, 1 threads"]
    table = report.markdown([{"a": 1, "b": None}, {"a": 2, "b": "x"}])
    assert table == "| a | b |\n| --- | --- |\n| 1 | – |\n| 2 | x |"


def test_damaged_run_folders_are_read_as_far_as_they_go(trained, tmp_path):
    def damaged(name, **files):
        shutil.copytree(trained, tmp_path / name)
        for file, content in files.items():
            path = next((tmp_path / name).glob(f"{file}.*"))
            path.unlink() if content is None else path.write_text(content)
        return read_runs(tmp_path / name)[0]

    whole, = read_runs(trained)
    assert whole.missing == [] and whole.model and len(whole.rows) == 2 and whole.title == "AlexCapsNet, 1 process, mnist5k"
    run = damaged("unfinished", summary=None)
    assert run.missing == ["summary.json is not there"] and "unfinished" in run.title
    assert run.facts["test_accuracy"] == whole.facts["test_accuracy"] and run.rows == whole.rows
    assert report.results_row(run)["processes"] is None
    assert report.test_again(run, "nowhere", torch.device("cpu"))[3]["test_accuracy"] == whole.facts["test_accuracy"]
    assert len(run.missing) == 1
    run.facts["test_accuracy"] -= 0.1
    report.test_again(run, "nowhere", torch.device("cpu"))
    assert "not the run's" in run.missing[1]
    run = damaged("no rows", metrics="epoch,train_loss\n1,x\n")
    assert run.rows == whole.rows and "metrics.csv is damaged" in run.missing[0]  # last.pt has them too
    run = damaged("no model", last="not a checkpoint")
    assert run.model is None and "last.pt is damaged" in run.missing[0] and run.facts == whole.facts
    for number, change in enumerate(({"test_accuracy": "high"}, {"model": "lenet"}, {"confusion": [[1], [1, 2]]}, {"lr": None})):
        facts = {k: v for k, v in (whole.facts | change).items() if v is not None}
        run = damaged(f"summary {number}", summary=json.dumps(facts))
        assert "summary.json is damaged" in run.missing[0] and "world_size" not in run.facts
    assert damaged("header", metrics=",".join(caps.COLUMNS)).rows == whole.rows
    assert "damaged" in damaged("half", summary='{"model": "alex').missing[0]
    header = (trained / "metrics.csv").read_text().splitlines()[:2]
    assert "2 epochs, metrics.csv of 1" in damaged("short", metrics="\n".join(header)).missing[0]
    run = damaged("empty", last=None, summary=None, metrics=None)
    assert run.facts == {} and len(run.missing) == 3


def test_report(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "runs" / "whole")
    hand_made(tmp_path / "runs" / "text", "rescaps", [0.9, 0.9812])
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "last.pt").write_text("no checkpoint")
    shown = {"orientation": [], "class_scores": []}
    for name, images in shown.items():  # all images are rotated for the fit, and none is evaluated twice
        monkeypatch.setattr(report, name, lambda model, x, *more, f=getattr(report, name), n=images: n.append(
            len(x)) or f(model, x, *more))
    assert caps.main(["report", "--images", "60"]) == 0
    assert shown["orientation"] == [1000] and shown["class_scores"] == [1000] + 17 * [59]
    said = capsys.readouterr().err
    page = (tmp_path / "report/report.md").read_text()
    accuracy = json.loads((trained / "summary.json").read_text())["test_accuracy"]
    assert f"| {100 * accuracy:.2f} % |" in page and "| 98.12 % |" in page and "16 numbers of the winning capsule" in page
    for line in ("`runs/damaged`: last.pt is damaged", "`runs/text`: last.pt is not there"):
        assert line in page and line.replace("`", "") in said
    assert page.count("\n![") == 7 and "Not drawn" not in page
    for name in ("curves", "confusion", "roc", "orientation", "robustness", "diagram-alexcaps", "diagram-rescaps"):
        with Image.open(tmp_path / f"report/{name}.png") as picture:
            assert picture.width > 400
    assert sum(path.stat().st_size for path in (tmp_path / "report").iterdir()) < 2**20
    assert caps.main(["report", "runs/text"]) == 0
    assert not (tmp_path / "report/roc.png").exists()  # no picture stays that is not of these runs
    assert (tmp_path / "report/report.md").read_text().count("Not drawn") == 3
    refused(command("report", "runs/damaged", "nowhere", cwd=tmp_path), "runs/damaged", "last.pt", "nowhere")


def test_data_that_are_gone_are_named(trained, tmp_path, monkeypatch, capsys):
    no_download(monkeypatch)
    shutil.copytree(trained, tmp_path / "run")
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    checkpoint["config"]["dataset"] = "mnist"
    torch.save(checkpoint, tmp_path / "run/last.pt")
    caps.write_json(tmp_path / "run/summary.json", json.loads((trained / "summary.json").read_text()) | {"dataset": "mnist"})
    assert caps.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r"), "--data-dir", str(tmp_path)]) == 0
    assert "without ROC" in capsys.readouterr().err and "curves.png" in (tmp_path / "r/report.md").read_text()


def test_distortions(embedded):
    images = embedded.test_images[::50]
    for kind in report.DISTORTIONS:
        assert torch.equal(report.distort(images, kind, 0), images)
    shifted = report.distort(images, "shift", 2)
    assert torch.equal(shifted[:, :, :-2], images[:, :, 2:]) and not shifted[:, :, -2:].any()
    assert torch.equal(report.distort(images, "rotation", 90), images.rot90(1, (1, 2)))
    each = report.distort(images[:2], "rotation", torch.tensor([0.0, 90.0]))
    assert torch.equal(each[0], images[0]) and torch.equal(each[1], images[1].rot90())
    grey = torch.full((50, 28, 28), 127, dtype=torch.uint8)
    assert report.distort(grey, "noise", 0.1).float().std().item() == pytest.approx(25.5, rel=0.02)


def test_robustness_starts_at_the_plain_accuracy(trained, embedded):
    run, = read_runs(trained)
    images, labels = embedded.test_images[::10], embedded.test_labels[::10]
    scores = caps.class_scores(run.model, images, caps.World(0, 1, images.device))
    plain = (scores.argmax(1) == labels).double().mean().item()
    curves = report.robustness(run.model, images, scores, labels, "off")
    assert [curve[0] for curve in curves.values()] == [plain] * 3
    assert [len(curve) for curve in curves.values()] == [7, 7, 6] and all(curve[-1] < plain for curve in curves.values())


def test_angles_are_fitted_and_scored_on_different_images():
    angles, labels = np.random.default_rng(0).uniform(-30, 30, 400), np.repeat([0, 3], 200)
    told = np.stack([angles * (labels == 0), np.ones(400)], 1)  # of the class 0 alone
    r2, error = report.fit_angles(told, angles, labels)
    assert r2[0] > 0.999 and error[0] < 0.5 and abs(r2[3]) < 0.05 and 13 < error[3] < 17
    assert np.isnan(r2[[1, 2, 4, 5, 6, 7, 8, 9]]).all()
    by_heart = report.fit_angles(np.eye(400), angles, labels)[0]  # tells each fitted image, and none of the others
    assert by_heart[0] < 0.05 and by_heart[3] < 0.05


class Toy(torch.nn.Module):
    """Calls everything a 0; its primary capsule is the tilt of a bar, which the digit capsule holds unless `deaf`."""

    def __init__(self, deaf):
        super().__init__()
        self.deaf, self.backbone = deaf, torch.nn.Identity()

    def primary(self, images):
        x = torch.arange(28.0) - 13.5
        return (images * x * x[:, None]).sum((2, 3)).div(images.sum((2, 3)) * 60)[:, :, None]

    def digits(self, primary):
        capsules = torch.zeros(len(primary), 10, 16)
        capsules[:, 0, 0] = 0.9
        capsules[:, 0, 1] = 0 if self.deaf else primary[:, 0, 0]
        return capsules


def test_each_model_has_its_own_row_of_orientation(tmp_path, monkeypatch):
    drawn, new_figure = [], caps.new_figure
    monkeypatch.setattr(report, "new_figure", lambda *a, **k: drawn.append(new_figure(*a, **k)) or drawn[-1])
    angles, capsules = np.linspace(-30, 30, 20), np.random.default_rng(0).normal(size=(20, 16))
    for factor, dimension in ((3.0, 5), (-2.0, 7)):
        capsules[:, dimension] += factor * angles / 30
    report.plot_orientation({name: (angles, capsules, np.full(20, 2), {}) for name in "ab"}, tmp_path / "x.png")
    axes = drawn[0][1]
    assert len(axes) == 6 and all(len(axis.collections) == 1 for axis in axes)
    assert [axis.get_title()[0] for axis in axes] == list("aaabbb") and axes[3].get_ylabel().endswith(" 5")


@pytest.mark.parametrize("deaf", [False, True])
def test_orientation_of_a_bar(deaf):
    images = torch.zeros(80, 28, 28, dtype=torch.uint8)
    images[:, 4:24, 13:15] = 255
    labels = torch.arange(80) // 60  # the last 20 are not recognised, and left out
    angles, capsules, kept, fits = report.orientation(Toy(deaf), images, labels, "off")
    assert len(angles) == len(capsules) == 60 and not kept.any() and abs(angles).max() <= 30 and angles.std() > 12
    capsule, length, primary = (r2[0] for r2, _ in fits.values())
    assert primary > 0.9 and (capsule < 0.1 if deaf else capsule > 0.9) and length < 0.3


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
    (["--model", "lenet"], ("--model", "alexcaps")), (["--nonsense"], ("--nonsense",)), (["--amp", "fp16", "--device", "cpu"], ("fp16",)),
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


def test_help_and_summary(tmp_path):
    assert "default: 0.001" in command("train", "--help", cwd=tmp_path).stdout
    assert "predict" in command("--help", cwd=tmp_path).stdout
    said = command("summary", "--model", "rescaps", cwd=tmp_path).stdout
    assert "2,022,272" in said and "1296×8" in said


# ---- the diagram ------------------------------------------------------------------------------------------------------


def texts(figure):
    """The lines of a figure and their boxes in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    renderer = FigureCanvasAgg(figure).get_renderer()
    return [(text.get_text(), text.get_window_extent(renderer)) for text in figure.axes[0].texts]


@pytest.mark.parametrize("model", list(caps.MODELS))
def test_the_diagram_tells_of_every_layer(model, tmp_path):
    result = command("diagram", "--model", model, "--iterations", 2, "--out", "d", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [f"d/diagram-{model}.svg", f"d/diagram-{model}.png"]
    with Image.open(tmp_path / "d" / f"diagram-{model}.png") as png:
        assert png.width > 1500
    assert (tmp_path / "d" / f"diagram-{model}.png").stat().st_size < 150_000
    words = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "d" / f"diagram-{model}.svg").read_text())
    rows = caps.layer_table(caps.MODELS[model](iterations=2))
    assert {"×".join(map(str, row[2])) for row in rows} <= set(words) and "routing, 2 iterations" in words
    counts = [int(n.replace(",", "")) for word in words if re.fullmatch(r"[\d,]+( \+ [\d,]+)*", word)
              for n in word.split(" + ")]
    for count in {row[3] for row in rows} - {0}:
        assert counts.count(count) == sum(row[3] == count for row in rows), count
    totals = f"{sum(row[3] for row in rows):,} parameters, {sum(row[4] for row in rows):,} multiply-adds"
    assert any(totals in word for word in words)


def changed(change):
    """A model of which one layer is not as it was, or there are more of them."""
    if change == "classes":
        return caps.ResCapsNet(num_classes=47, iterations=1)
    model = caps.AlexCapsNet() if change == "convolution" else caps.ResCapsNet()
    model.backbone.insert(4, torch.nn.Conv2d(64, 64, (3, 1), padding=(1, 0)) if change == "convolution"
                          else caps.ResidualBlock(32))
    return model


@pytest.mark.parametrize("change, words", [
    ("convolution", {"Conv 3×1": 1, "12,352": 1}),
    ("block", {"Residual block": 4, "1,024 + 64": 4}),
    ("classes", {"46": 1, "47×16": 1, "7,796,736": 1, "routing, 1 iteration": 1, "⋮": 2}),
])
def test_a_changed_layer_changes_the_diagram(change, words, tmp_path):
    said = [text for text, _ in texts(report.plot_diagram(changed(change), tmp_path / "d.svg"))]
    assert {word: said.count(word) for word in words} == words


@pytest.mark.parametrize("model", [caps.AlexCapsNet, caps.ResCapsNet, lambda: changed("block"),
                                   lambda: changed("classes")])
def test_no_label_of_the_diagram_overlaps_or_is_cut(model, tmp_path):
    figure = report.plot_diagram(model(), tmp_path / "d.svg")
    boxes = texts(figure)
    for i, (text, box) in enumerate(boxes):
        assert 0 <= box.x0 and 0 <= box.y0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        assert not [other for other, around in boxes[:i] if box.overlaps(around)], text
