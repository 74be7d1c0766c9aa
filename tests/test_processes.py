"""Several processes through the real torchrun, gloo on CPUs, on the embedded images."""
import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from common import CAPS, ENVIRONMENT, RUN, SET_UP, command, torchrun

import caps

def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def program(folder, body):
    """caps.py with `body` run before its main."""
    path = folder / "program.py"
    path.write_text(f"import os, sys\nsys.path.insert(0, {os.path.dirname(CAPS)!r})\nimport caps, torch\n{body}\n"
                    "caps.program()\n")
    return path


DOUBLE = """
caps.to_float = lambda images: images.double() / 255
caps.move = lambda images, motion: images
caps.MODELS["alexcaps"] = lambda **k: caps.AlexCapsNet(**k).double()
class Rescaps(caps.ResCapsNet):
    def train(self, mode=True):
        return super().train(False)
caps.MODELS["rescaps"] = lambda **k: Rescaps(**k).double()
"""


@pytest.mark.parametrize("model, splits, more", [("alexcaps", [(1, 24, 1), (4, 6, 1), (2, 4, 3)], ()),
                                                 ("alexcaps", [(1, 24, 1), (2, 4, 3)], ("--decoder", 0.01)),
                                                 ("rescaps", [(1, 4, 1), (2, 1, 2)], ())])
def test_the_same_mathematics_in_float64(small, tmp_path, model, splits, more):
    """Processes × micro-batch × accumulation with the same product give the same weights; BN's statistics frozen."""
    double = program(tmp_path, DOUBLE + ("" if model == "alexcaps" else """
import dataclasses
load = caps.load_data
def few(*words):
    data = load(*words)
    return dataclasses.replace(data, train_images=data.train_images[:8], train_labels=data.train_labels[:8],
                               test_images=data.test_images[:4], test_labels=data.test_labels[:4])
caps.load_data = few"""))
    results = []
    for processes, batch, accumulate in splits:
        out = tmp_path / f"{processes}x{batch}x{accumulate}"
        result = torchrun(processes, "--model", model, "--dataset", "mnist", "--data-dir", small, "--epochs", 1, "--out", out,
                          "--batch-size", batch, "--accumulate", accumulate, "--amp", "off", "--lr-scale", "none",
                          "--warmup", 0, *more, cwd=tmp_path, program=double)
        assert result.returncode == 0, result.stderr[-3000:]
        results.append(weights(out))
    for other in results[1:]:
        for key, value in results[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("lacking", [[], [1]])
def test_compiled_processes(small, tmp_path, lacking):
    """In groups of 2 × 2 × 6 images and a last one of 8; also where one process has no compiler."""
    body = program(tmp_path, f"""
if int(os.environ["RANK"]) in {lacking}:
    def compiler(*_, **__):
        raise RuntimeError("there is no compiler")
    torch.compile = compiler
from caps.extras import faster
faster.pays_compiling = lambda *_: True
import dataclasses
load = caps.load_data
def few(*words):
    data = load(*words)
    return dataclasses.replace(data, train_images=data.train_images[:32], train_labels=data.train_labels[:32])
caps.load_data = few
start = caps.start_run
def started(*words):
    run = start(*words)
    open(f"net{{run.world.rank}}", "w").write(type(run.net.module).__name__)
    return run
caps.start_run = started""")
    result = torchrun(2, "--model", "rescaps", "--dataset", "mnist", "--data-dir", small, "--epochs", 1, "--out", "out",
                      "--batch-size", 6, "--accumulate", 2, cwd=tmp_path, program=body)
    assert result.returncode == 0 and "Warning" not in result.stderr, result.stderr[-3000:]
    for rank in (0, 1):
        assert (tmp_path / f"net{rank}").read_text() == ("ResCapsNet" if rank in lacking else "OptimizedModule")
    assert result.stderr.count("without torch.compile, there is no compiler") == len(lacking)
    assert weights(tmp_path / "out").keys() == caps.ResCapsNet().state_dict().keys()


def test_three_processes_measure_what_one_does(small, tmp_path):
    assert command("--dataset", "mnist", "--data-dir", small, "--epochs", 1, "--out", "run", cwd=tmp_path).returncode == 0
    for processes in (1, 3):
        result = torchrun(processes, "eval", "--checkpoint", "run/last.pt", "--dataset", "mnist5k", "--out", f"e{processes}",
                          cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
    one, three = (json.loads((tmp_path / f"e{n}/summary.json").read_text()) for n in (1, 3))
    assert three["world_size"] == 3 and sum(map(sum, three["confusion"])) == 1000
    assert all(one[k] == three[k] for k in ("test_accuracy", "test_loss", "confusion", "auc", "macro_auc", "per_class_accuracy"))


def test_three_processes_see_every_image_once(small, tmp_path):
    """But the last (320 mod 3) of the epoch's order; also in groups that three processes and two micro-steps do not divide."""
    recorder = program(tmp_path, """
step = caps.train_step
def recording_step(run, index, *rest):
    with open(f"seen{run.world.rank}", "a") as file:
        print(*index.tolist(), file=file)
    step(run, index, *rest)
caps.train_step = recording_step""")
    result = torchrun(3, "--dataset", "mnist", "--data-dir", small, "--epochs", 1, "--batch-size", 16, "--accumulate", 2,
                      cwd=tmp_path, program=recorder)
    assert result.returncode == 0, result.stderr[-3000:]
    steps = [[line.split() for line in (tmp_path / f"seen{rank}").read_text().splitlines()] for rank in range(3)]
    seen = [int(i) for lines in steps for line in lines for i in line]
    order, _ = caps.epoch_plan(320, 1, 0, 10, 0)
    assert len(steps[0]) == 4 and sorted(seen) == sorted(order[:318].tolist())


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(caps.UserError, match="3 processes but 2 GPU.*at most 2 here, or add --device cpu"):
        caps.start_world("auto")
    assert caps.start_world("cpu").device.type == "cpu"


def test_no_rank_leaves_before_the_files_are_written(small, tmp_path):
    last = program(tmp_path, '''
import time
from caps.extras import results
write, main = results.write_results, caps.main
def slow_write(*arguments, **options):  # by rank 0
    time.sleep(1.5)
    return write(*arguments, **options)
def main_and_look():
    return main() or int(not os.path.exists("run/summary.json"))
results.write_results, caps.main = slow_write, main_and_look''')
    result = torchrun(2, "--dataset", "mnist", "--data-dir", small, "--epochs", 1, "--out", "run", cwd=tmp_path, program=last)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_killed_rank_changes_nothing(small, tmp_path):
    words = ["--dataset", "mnist", "--data-dir", small, "--epochs", 2, "--batch-size", 8, "--checkpoint-every", 3]
    assert torchrun(2, *words, "--out", "whole", cwd=tmp_path).returncode == 0
    killer = program(tmp_path, """
step = caps.train_step
def killing_step(run, *rest):
    if run.steps == 8 and run.world.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    step(run, *rest)
caps.train_step = killing_step""")
    result = torchrun(2, *words, "--out", "killed", cwd=tmp_path, program=killer, options=("--standalone", "--max-restarts", "3"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Signal 9" in result.stderr or "exitcode: -9" in result.stderr or "-9" in result.stderr
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    assert torch.load(tmp_path / "killed/last.pt", weights_only=True)["steps"] == torch.load(
        tmp_path / "whole/last.pt", weights_only=True)["steps"]


def test_a_machine_that_fails_changes_nothing(small, tmp_path):
    """Two agents, of which torchrun counts the restart on one alone, and that is not rank 0's; a damaged checkpoint beside."""
    (tmp_path / "runs" / "alexcaps-old").mkdir(parents=True)
    (tmp_path / "runs" / "alexcaps-old" / "last.pt").write_bytes(b"damaged")
    killer = program(tmp_path, """
step = caps.train_step
def killing_step(run, *rest):
    if run.steps == 8 and run.world.rank == 1 and not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), 9)
    step(run, *rest)
    with open(f"steps{run.world.rank}", "a") as file:
        print(run.steps, file=file)
caps.train_step = killing_step""")
    port = free_port()
    agents = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--rdzv-backend", "c10d",
         "--rdzv-conf", f"is_host={1 - rank}", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1",
         "--max-restarts", "3", str(killer), "--dataset", "mnist", "--data-dir", str(small), "--epochs", "2", "--batch-size",
         "8", "--checkpoint-every", "3"], cwd=tmp_path, env=ENVIRONMENT | {"CAPS_JOB": "test"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [agent.communicate(timeout=200) for agent in agents]
    assert all(agent.returncode == 0 for agent in agents), said
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["alexcaps-mnist", "alexcaps-old"]
    steps = [int(line) for line in (tmp_path / "steps0").read_text().split()]
    assert steps == [*range(1, 9), *range(7, 11)]  # from the checkpoint of step 6


def test_a_rank_that_raises_ends_the_job(small, tmp_path):
    raiser = program(tmp_path, """
step = caps.train_step
def raising_step(run, *rest):
    if run.steps == 2 and run.world.rank == 1:
        raise ZeroDivisionError("rank one is unwell")
    step(run, *rest)
caps.train_step = raising_step""")
    begun = time.monotonic()
    result = torchrun(2, "--dataset", "mnist", "--data-dir", small, "--batch-size", 8, "--out", "run", cwd=tmp_path, program=raiser)
    assert result.returncode != 0 and "rank one is unwell" in result.stderr
    assert time.monotonic() - begun < 60


def test_a_missing_data_set_is_reported_once(tmp_path):
    result = torchrun(2, "--dataset", "mnist", "--data-dir", tmp_path / "none", cwd=tmp_path)
    assert result.returncode != 0
    assert sum(line.startswith("caps: mnist:") for line in result.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not SET_UP, reason="this environment was not made by run.sh")
def test_run_sh_starts_two_machines_that_meet(small, tmp_path):
    port = free_port()
    agents = [subprocess.Popen(
        [str(RUN), "ddp", "1", "--nnodes", "2", "--node-rank", str(rank),
         "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", "--", "--dataset", "mnist", "--data-dir",
         str(small), "--epochs", "1", "--out", "run"], cwd=tmp_path, env=ENVIRONMENT | {"VENV": sys.prefix},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [agent.communicate(timeout=200) for agent in agents]
    assert all(agent.returncode == 0 for agent in agents), said
    assert json.loads((tmp_path / "run/summary.json").read_text())["world_size"] == 2
    assert sum(out.count("epoch   1/1") for out, _ in said) == 1


@pytest.mark.skipif(not SET_UP, reason="this environment was not made by run.sh")
def test_run_sh_refuses_before_it_starts(tmp_path):
    result = subprocess.run([str(RUN), "ddp", "2", "--epochs", "none"], cwd=tmp_path, env=ENVIRONMENT | {"VENV": sys.prefix},
                            capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "--epochs" in result.stderr
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        result = subprocess.run([str(RUN), "ddp", "2", "--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", f"here:{port}", "--"],
                                cwd=tmp_path, env=ENVIRONMENT | {"VENV": sys.prefix}, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == f"run.sh: port {port} is in use here; name another one\n"
