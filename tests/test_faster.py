"""How a step is made faster: as a CUDA graph, here one without CUDA, compiled, with denormal numbers flushed."""
import contextlib
import copy
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import CAPS, start

import caps
from caps.extras import faster


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


@pytest.mark.parametrize("decoder", [[], ["--decoder"]])
def test_a_graph_takes_the_same_steps(small, tmp_path, monkeypatch, decoder):
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

    words = ["--batch-size", "30", "--accumulate", "2", "--ema", "0.9", "--warmup", "1.5", *decoder]
    plain = start(small, tmp_path / "plain", *words, fast=faster)
    graph = start(small, tmp_path / "graph", *words, "--graph", fast=faster)
    torch.testing.assert_close(epoch(plain), epoch(graph), rtol=0, atol=0)
    assert done == ["eager"] * 3 + ["capture"] + ["replay"] * 2 + ["eager"]
    crossed = [start(small, tmp_path / name, "--resume", str(tmp_path / name / "last.pt"), *words, fast=faster)
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
        caps.train_epoch(start(small, tmp_path, "--graph", fast=faster))


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


@pytest.mark.parametrize("decoder", [[], ["--decoder"]])
def test_compiled_training_is_the_training(small, tmp_path, monkeypatch, capsys, decoder):
    """Three steps of ResCapsNet, the last with fewer images, against those of the model as it is; then a resumed run."""
    def steps(run, first, last):
        order, motion = caps.epoch_plan(320, 1, 0, 10, 0)
        for part in [slice(0, 8), slice(8, 16), slice(16, 21)][first:last]:
            caps.train_step(run, order[part], motion[part], part.stop - part.start)
        return run

    def loss(net, images):
        digits, *made = net(images, labels) if decoder else [net(images)]
        return sum((0.001 * caps.squared_errors(each, images).sum() for each in made),
                   caps.margin_loss(caps.lengths(digits), labels))

    words = ["--model", "rescaps", "--batch-size", "8", *decoder]
    plain = start(small, tmp_path / "plain", *words, fast=faster)
    assert plain.net is plain.model  # 320 images are too few
    monkeypatch.setattr(faster, "pays_compiling", lambda *_: True)
    fast = start(small, tmp_path / "fast", *words, fast=faster)
    assert "compiling ResCapsNet" in capsys.readouterr().err
    assert fast.net is not fast.model and all(p.grad is None for p in fast.model.parameters())
    for (name, a), b in zip(plain.model.state_dict().items(), fast.model.state_dict().values()):
        assert torch.equal(a, b), name
    images, labels = caps.to_float(plain.data.train_images[:8]), plain.data.train_labels[:8]
    exact = copy.deepcopy(plain.model).double()
    gradients = [torch.autograd.grad(loss(net, x), model.parameters()) for net, model, x in (
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
    again = steps(start(small, tmp_path / "fast", *words, "--resume", fast=faster), 2, 3)
    for (name, a), b in zip(fast.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_model_that_cannot_be_compiled_is_trained_as_it_is(small, monkeypatch, capsys):
    model, images = caps.ResCapsNet(), caps.load_data("mnist", small).train_images[:4]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def compiler(model, dynamic, options):
        def net(images, labels):
            model(images, labels)
            raise error
        return net

    monkeypatch.setattr(torch, "compile", compiler)
    for error, said in (RuntimeError("no compiler\nand more"), "no compiler"), (AssertionError(), "AssertionError"):
        assert faster.compiled(model, images, "off") is model
        assert f"without torch.compile, {said}\n" in capsys.readouterr().err
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("words, images, expected", [
    ("--model rescaps", 60_000, True), ("--model rescaps", 3_199, False), ("--model alexcaps", 60_000, False)])
def test_compilation_where_it_pays(words, images, expected):
    args = caps.parse(["train", *words.split()])
    assert faster.pays_compiling(args, caps.World(0, 1, torch.device("cpu")), images) is expected
    assert not faster.pays_compiling(args, caps.World(0, 1, torch.device("cuda")), images)
