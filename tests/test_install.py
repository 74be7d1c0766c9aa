"""The program as pip installs it: the same from any folder, with every source in its place."""
import configparser
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from common import ROOT

import caps
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
                if path.suffix in (".py", ".cpp", ".cu", ".h", ".pt")}
        there = installed / "caps_parts" / folder
        assert here and here == {path.relative_to(there) for path in there.rglob("*") if path.is_file()}


def test_the_installed_program_is_the_same(installed, tmp_path):
    def run(*words):
        environment = os.environ | {"PYTHONPATH": str(installed), "CAPS_BACKEND": "torch"}
        done = subprocess.run([sys.executable, "-B", *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import caps; from caps.csrc import extension; print(caps.__file__, extension.source_hash())")
    assert where.split() == [str(installed / "caps.py"), extension.source_hash()]
    assert "2,683,840" in run("-m", "caps", "summary")
    code = ("import contextlib, caps\nfor mode in caps.MODES:\n    with contextlib.suppress(SystemExit):\n"
            "        caps.main([mode, '--help'])")
    assert [line.split()[2] for line in run("-c", code).splitlines() if line.startswith("usage:")] == list(caps.MODES)
    points = configparser.ConfigParser()
    points.read(next(installed.glob("*.dist-info")) / "entry_points.txt")
    module, function = points["console_scripts"]["caps"].split(":")
    assert "2,022,272" in run("-c", f"import sys, {module}; sys.argv[1:] = ['summary', '--model', 'rescaps']; "
                                    f"{module}.{function}()")


def test_foreign_packages_of_the_same_names_are_left_alone(installed, tmp_path):
    """On the package index `extras` is another project; both may lie in one site-packages."""
    site = shutil.copytree(installed, tmp_path / "site")
    for name in ("extras", "csrc"):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("raise ImportError('this is somebody else')\n")
    code = ("import sys, caps; from caps.csrc import extension; print(extension.__file__); "
            "sys.exit(caps.main(['summary']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(site), "CAPS_BACKEND": "torch"})
    assert done.returncode == 0 and "2,683,840" in done.stdout, done.stderr
    assert done.stdout.startswith(str(site / "caps_parts" / "csrc"))


@pytest.mark.parametrize("start", ["link", "other name", "profiler"])
def test_other_ways_to_start_the_program(start, tmp_path):
    """Through a symbolic link, as a module of another name, and under cProfile: a mode runs, its mistake is one line."""
    program = tmp_path / "program.py"
    if start == "other name":
        program.write_text(
            "import importlib.util, sys\n"
            f"spec = importlib.util.spec_from_file_location('mine', {str(ROOT / 'caps.py')!r})\n"
            "mine = sys.modules['mine'] = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(mine)\n"
            "sys.exit(mine.main())\n")
    else:
        program.symlink_to(ROOT / "caps.py")
    words = [sys.executable, *(["-m", "cProfile", "-o", "profile"] if start == "profiler" else []), str(program)]
    run = lambda *more: subprocess.run([*words, *more], cwd=tmp_path, capture_output=True, text=True)
    assert "2,683,840" in run("summary").stdout
    assert run("report", "nowhere").stderr == "caps: nowhere: last.pt is not there\n"


def test_a_missing_package_is_named(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; import caps; sys.exit(caps.main(['diagram']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.startswith("caps: this mode needs the package matplotlib")
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
