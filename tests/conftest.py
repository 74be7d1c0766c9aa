"""Fixtures of all tests."""
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from common import FILES, command, write_idx  # noqa: E402

import caps  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "sanitizer: compiles and runs the operators under address and UB sanitizers")
    # Worker threads inherit whether denormal numbers are flushed, and keep it: they start before a training flushes them.
    torch.ones(2 ** 22).mul_(2)


@pytest.fixture(autouse=True)
def settings():
    """Training in this process flushes denormal numbers, compiles no more and handles signals; not so for the next test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_flush_denormal(False)
    torch.compiler.set_stance("default")


@pytest.fixture(scope="session")
def native():
    """The native operators are there."""
    name, reason = caps.backend()
    assert name == "native", reason


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
        for name, array in zip(FILES[split], (images[chosen, 0], labels[chosen])):
            write_idx(raw / name, array.numpy())
    return folder


@pytest.fixture(scope="session")
def few(embedded):
    """few(folder, train images a class, test images a class): a set of embedded images, its four files in `folder`."""
    def write(folder, train=5, test=2, names=lambda name: name):
        folder.mkdir(parents=True)
        for split, images, labels, each in (("train", embedded.train_images, embedded.train_labels, train),
                                            ("t10k", embedded.test_images, embedded.test_labels, test)):
            chosen = torch.cat([(labels == c).nonzero()[:each, 0] for c in range(10)])
            for name, array in zip(FILES[split], (images[chosen, 0], labels[chosen])):
                write_idx(folder / names(name), array.numpy())
        return folder
    return write


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory):
    """The folder of a finished run on few images, which lie in ../data."""
    folder = tmp_path_factory.mktemp("finished")
    few(folder / "data")
    assert caps.main(["--data-dir", str(folder / "data"), "--epochs", "1", "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a two-epoch run on the embedded images, made by the command that a newcomer types."""
    cwd = tmp_path_factory.mktemp("trained")
    result = command("--model", "alexcaps", "--epochs", 2, "--dataset", "mnist5k", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd / "runs" / "alexcaps-mnist5k"


@pytest.fixture
def main(capsys, monkeypatch, tmp_path):
    """main(*words): the command line in this process and an empty folder, its status and what it said on stderr in one
    line, but for the backend's; a traceback would be an exception. What it printed is main.printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        status = caps.main([*map(str, words)])
        run.printed, said = capsys.readouterr()
        lines = [line for line in said.splitlines() if not line.startswith("caps: native backend")]
        assert status == 0 or len(lines) == 1 and lines[0].startswith("caps: "), lines
        return status, "\n".join(lines)
    return run
