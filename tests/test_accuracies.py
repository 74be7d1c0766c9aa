"""bench.py accuracy: settings of training with several seeds, which the README's table is made of."""
import json
import signal
import subprocess
import sys
import time
from unittest import mock

import bench_accuracy
import pytest
import torch
from bench import main as bench_main

import caps

SMALL = "--dataset mnist5k --batch-size 400"


def bench(folder, *settings, seeds=None):
    """The rows of the command line in this process."""
    words = [*settings, "--runs", folder, "--device", "cpu", "--json", folder / "rows.json", *(["--seeds", *seeds] if seeds else [])]
    with mock.patch("sys.argv", ["bench.py", "accuracy", *map(str, words)]):
        bench_main()
    return json.loads((folder / "rows.json").read_text())["rows"]


def test_settings_by_means_over_seeds_and_gone_on_with(tmp_path, capsys):
    row, = bench(tmp_path, f"few=train {SMALL} --epochs 1", seeds=[1, 2, 1])
    reached = [json.loads((tmp_path / f"few/seed-{seed}/summary.json").read_text())["test_accuracy"] for seed in (1, 2)]
    assert row["n"] == 2 and row["seeds"] == [1, 2] and row["accuracies"] == pytest.approx([100 * a for a in reached])
    assert row["mean"] == pytest.approx(50 * sum(reached))
    assert row["deviation"] == pytest.approx(100 * abs(reached[0] - reached[1]) / 2 ** 0.5) and row["dataset"] == "mnist5k"
    assert f"{row['mean']:.2f} ± {row['deviation']:.2f} % of mnist5k  n = 2" in capsys.readouterr().out
    before = (tmp_path / "few/seed-1/last.pt").stat().st_mtime_ns
    assert bench(tmp_path, f"few=train {SMALL} --epochs 1", seeds=[1, 2]) == [row]
    assert (tmp_path / "few/seed-1/last.pt").stat().st_mtime_ns == before  # nothing was trained
    for other, why in ((f"train {SMALL} --epochs 1 --lr 0.002", "lr"), ("train --dataset mnist --batch-size 400", "dataset"),
                       (f"plain {SMALL} --epochs 1", "layers"),
                       (f"ddp 2 {SMALL} --epochs 1 --amp off --accumulate 1 --lr-scale none --warmup 0", "world_size")):
        with pytest.raises(SystemExit) as stopped:
            bench(tmp_path, f"few={other}")
        assert stopped.value.code == 2 and f"differs in {why};" in capsys.readouterr().err
    (tmp_path / "few/seed-1/summary.json").unlink()  # as of a run that is not finished
    with pytest.raises(SystemExit):
        bench(tmp_path, f"few=train {SMALL} --epochs 4 --lr 0.002")
    assert "differs in lr;" in capsys.readouterr().err
    row, = bench(tmp_path, f"few=train {SMALL} --epochs 2")
    checkpoint = caps.read_checkpoint(tmp_path / "few/seed-1/last.pt")
    assert checkpoint["steps"] == 20 and checkpoint["history"][0]["test_accuracy"] == reached[0]
    with pytest.raises(SystemExit):
        bench(tmp_path, f"few=train {SMALL} --epochs 1")
    assert "differs in epochs;" in capsys.readouterr().err
    (tmp_path / "few/seed-1/summary.json").unlink()
    with pytest.raises(SystemExit):  # half of it would be of the other kind
        bench(tmp_path, f"few=plain {SMALL} --epochs 3")
    assert "differs in layers;" in capsys.readouterr().err


def test_a_command_without_epochs_goes_on_to_all_of_them(tmp_path, monkeypatch):
    bench(tmp_path, f"few=train {SMALL} --epochs 1")
    asked = []
    monkeypatch.setattr(bench_accuracy, "wait_for", lambda words, threads: asked.append(words) or 0)
    with pytest.raises(SystemExit) as stopped:  # as if that training had trained nothing
        bench(tmp_path, f"few=train {SMALL}")
    assert stopped.value.code == 2 and caps.parse(asked[0][2:]).epochs == 20


def test_several_processes(tmp_path, capfd):
    row, = bench(tmp_path, f"few=ddp 2 {SMALL} --epochs 1")
    facts = json.loads((tmp_path / "few/seed-1/summary.json").read_text())
    assert facts["world_size"] == 2 and facts["accumulate"] == 4 and row["accuracies"] == [round(100 * facts["test_accuracy"], 6)]
    with pytest.raises(SystemExit):
        bench(tmp_path, "bad=ddp 2 --dataset fashion --data-dir /nowhere --epochs 1")
    err = capfd.readouterr().err
    assert "fashion: " in err and "nothing was trained" in err and "goes on" not in err and "Traceback" not in err


def test_records_of_runs_are_enough(tmp_path, capsys):
    """summary.json alone: what is kept of the runs that docs/report is made of."""
    facts = vars(caps.parse(["train"])) | {"dataset": "mnist", "epochs": 20, "world_size": 1, "device": "cpu, 2 threads", "torch": "2.14",
                                           "seconds_per_epoch": 17.0}
    for seed, accuracy in enumerate((0.987, 0.988, 0.9896), 1):
        (tmp_path / f"alexcaps/seed-{seed}").mkdir(parents=True)
        told = {key: value for key, value in facts.items() if key != "given"} | {"seed": seed, "test_accuracy": accuracy}
        (tmp_path / f"alexcaps/seed-{seed}/summary.json").write_text(json.dumps(told))
    assert bench(tmp_path, "--finished") == bench(tmp_path, "alexcaps") and not capsys.readouterr().err
    assert bench(tmp_path, "alexcaps", "rescaps", "--finished") == bench(tmp_path, "alexcaps")
    assert "rescaps: no finished run of seed 1, 2, 3" in capsys.readouterr().err
    (tmp_path / "alexcaps/seed-2/summary.json").rename(tmp_path / "summary.json")
    row, = bench(tmp_path, "--finished")
    assert row["seeds"] == [1, 3] and row["mean"] == pytest.approx(98.83)
    assert "alexcaps: no finished run of seed 2" in capsys.readouterr().err
    for damage in ("[]", "null", "{", json.dumps(told | {"test_accuracy": None}), json.dumps({"model": "alexcaps"}),
                   json.dumps(told | {"test_accuracy": float("nan")}), json.dumps(told | {"warmup": None}),
                   json.dumps({key: value for key, value in told.items() if key != "amp"}),
                   json.dumps(told), json.dumps(told | {"seed": 2, "lr": 0.5})):  # told is seed 3's
        (tmp_path / "alexcaps/seed-2/summary.json").write_text(damage)
        assert bench(tmp_path, "--finished") == [row]
        assert "damaged" in (err := capsys.readouterr().err) or "it differs in " in err
    (tmp_path / "alexcaps/seed-2/summary.json").unlink()
    with pytest.raises(SystemExit):
        bench(tmp_path, "rescaps", "--finished")
    assert "no finished run of these settings" in capsys.readouterr().err and not (tmp_path / "rescaps").exists()
    (tmp_path / "summary.json").rename(tmp_path / "alexcaps/seed-2/summary.json")
    row, = bench(tmp_path, "alexcaps")
    assert row["accuracies"] == [98.7, 98.8, 98.96] and row["n"] == 3 and row["deviation"] == pytest.approx(0.1311, abs=1e-4)


def test_a_default_that_the_data_may_raise_is_compared(tmp_path, capsys):
    told = vars(bench_accuracy.setting("alexcaps-ddp4").wanted) | {"dataset": "mnist", "seed": 1, "world_size": 4, "device": "cpu",
                                                                  "torch": "2.14", "seconds_per_epoch": 17.0, "test_accuracy": 0.98}
    del told["given"]
    folder = tmp_path / "alexcaps-ddp4/seed-1"
    folder.mkdir(parents=True)
    for warmup in (1.0, 2.5):
        (folder / "summary.json").write_text(json.dumps(told | {"warmup": warmup}))
        assert bench(tmp_path, "alexcaps-ddp4", seeds=[1])[0]["accuracies"] == [98.0]
    (folder / "summary.json").write_text(json.dumps(told | {"warmup": 0.0}))
    with pytest.raises(SystemExit):
        bench(tmp_path, "alexcaps-ddp4", seeds=[1])
    assert "differs in warmup;" in capsys.readouterr().err


def test_a_plain_training_in_parts_is_that_in_whole(tmp_path):
    bench(tmp_path, f"parts=plain {SMALL} --epochs 1")
    bench(tmp_path, f"parts=plain {SMALL} --epochs 2", f"whole=plain {SMALL} --epochs 2")
    parts, whole = (caps.read_checkpoint(tmp_path / f"{name}/seed-1/last.pt") for name in ("parts", "whole"))
    for name, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][name]), name
    assert not whole["optimizer"]["param_groups"][0]["fused"]


def test_plain_trainings_keep_denormal_numbers(monkeypatch, tmp_path):
    seen = []

    def start(args, world):
        seen.append(torch.tensor([1e-40]).mul(1).item())
        raise caps.UserError("enough")
    monkeypatch.setattr(caps, "start_run", start)
    torch.set_flush_denormal(False)
    assert bench_accuracy.train_plain([*SMALL.split(), "--out", str(tmp_path / "run")]) == 2 and 0 < seen[0] < 1e-38


def test_results_that_cannot_be_written_are_refused_first(tmp_path):
    words = ["accuracy", f"few=train {SMALL}", "--runs", tmp_path / "runs", "--json", tmp_path / "nowhere/rows.json"]
    done = subprocess.run([sys.executable, bench_accuracy.BENCH, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "rows.json: cannot be written" in done.stderr and not (tmp_path / "runs").exists()
    words[-1] = tmp_path
    done = subprocess.run([sys.executable, bench_accuracy.BENCH, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be written" in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text, words", [
    ("nothing", "there are alexcaps, "), ("y=", "expected NAME=train"), ("y=trian --epochs 1", "expected NAME=train"),
    ("y=ddp 0", "expected NAME=train"), ("a/b=train", "expected NAME=train"), ("=train", "expected NAME=train"),
    ("..=train", "expected NAME=train"), ("y=train --lr fast", "--lr"),
    ("y=train --seed 3", "leave out --seed"), ("y=train --check --out x", "leave out --check, --out")])
def test_settings_that_are_none(text, words):
    done = subprocess.run([sys.executable, bench_accuracy.BENCH, "accuracy", text], capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_settings_of_several_processes():
    assert bench_accuracy.setting("alexcaps-ddp4").wanted.accumulate == 4 and bench_accuracy.setting("x=ddp --lr 0.1").processes == 2
    assert {name: bench_accuracy.setting(name).processes for name in bench_accuracy.SETTINGS if "ddp" in name} == {
        name: 4 for name in bench_accuracy.SETTINGS if "ddp4" in name}


def test_a_signal_ends_the_training_that_has_saved(tmp_path):
    done = subprocess.Popen([sys.executable, bench_accuracy.BENCH, "accuracy", f"long=train {SMALL} --epochs 500", "--runs", "."],
                            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "long/seed-1/metrics.csv"
    until = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 1) and time.monotonic() < until:
        time.sleep(0.1)
    done.send_signal(signal.SIGTERM)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 2 and "the same command goes on" in err and "stopped in epoch" in out, (out, err)
    steps = caps.read_checkpoint(tmp_path / "long/seed-1/last.pt")["steps"]
    time.sleep(1)
    assert steps >= 10 and caps.read_checkpoint(tmp_path / "long/seed-1/last.pt")["steps"] == steps  # no one trains on


@pytest.mark.parametrize("words, expected", [
    ("", "command"), ("ops --threads -1", "--threads"), ("ops --sizes 3", "BxN"), ("ops --sizes 3xa", "'a'"),
    ("train --device tpu", "--device"), ("maps --device cpu", "--device cpu"), ("pictures --count 0", "--count"),
    ("pictures --checkpoint nowhere", "nowhere: no such checkpoint"), ("ops --json nowhere/f.json", "--json nowhere/f.json"),
    ("scale --plot nowhere/f.png", "--plot nowhere/f.png"), ("accuracy nothing", "no setting nothing")])
def test_a_mistake_is_one_line(words, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bench.py", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        bench_main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("bench.py: ") and expected in err and err.count("\n") == 1
