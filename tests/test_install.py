"""The program as pip installs it: the same from any folder, with every source in its place."""
import configparser
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from common import ROOT

from caps.csrc import extension

PROJECT = ("caps.py", "setup.py", "README.md", "LICENSE", "csrc", "extras")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What a wheel of this project puts into site-packages."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("wheel")
    for name in PROJECT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    made = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "out", "."],
                          cwd=folder, env=os.environ | {"CAPS_BUILD": "0"}, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    with zipfile.ZipFile(next((folder / "out").glob("capsnet_exact-*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_every_source_is_installed(installed):
    for folder in ("csrc", "extras"):
        here = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*")
                if path.suffix in (".py", ".cpp", ".cu", ".h")}
        there = installed / "caps_parts" / folder
        assert here and here == {path.relative_to(there) for path in there.rglob("*") if path.is_file()}


def test_the_installed_program_is_the_same(installed, tmp_path):
    def run(*words):
        environment = os.environ | {"PYTHONPATH": str(installed), "CAPS_BACKEND": "torch", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import caps; from caps.csrc import extension; print(caps.__file__, extension.source_hash())")
    assert where.split() == [str(installed / "caps.py"), extension.source_hash()]
    assert "2,683,840" in run("-m", "caps", "summary")
    for mode in ("train", "eval", "predict", "export", "summary", "diagram", "report"):
        assert run("-m", "caps", mode, "--help").startswith("usage:")
    points = configparser.ConfigParser()
    points.read(next(installed.glob("*.dist-info")) / "entry_points.txt")
    module, function = points["console_scripts"]["caps"].split(":")
    assert "2,022,272" in run("-c", f"import sys, {module}; sys.argv[1:] = ['summary', '--model', 'rescaps']; "
                                    f"{module}.{function}()")
