"""How the native library is found, built and refused; with a kernel file cut short, so that a build takes seconds."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from common import ROOT

from caps.csrc import extension


@pytest.fixture
def checkout(tmp_path):
    """A folder with caps.py, a csrc/ without kernels and an empty cache; run(code, **environment) runs code there."""
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    shutil.copy(ROOT / "caps.py", tmp_path)
    (tmp_path / "csrc" / "extension.py").write_text((ROOT / "csrc" / "extension.py").read_text().replace('"-O3"', '"-O0"'))
    for name in ("caps.h", "ops.cpp"):
        shutil.copy(ROOT / "csrc" / name, tmp_path / "csrc")
    (tmp_path / "csrc" / "cpu" / "lanes.h").write_text('#include "../caps.h"\n')
    (tmp_path / "csrc" / "cpu" / "operators.cpp").write_text('#include "lanes.h"\n')

    def environment(**changes):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("CAPS_") and k != "PYTHONPATH"}
        return {**inherited, "CAPS_CACHE": str(tmp_path / "cache"), "TORCH_CUDA_ARCH_LIST": "", **changes}

    def run(code, **changes):
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(**changes),
                              capture_output=True, text=True, timeout=120)

    run.folder, run.environment = tmp_path, environment
    return run


WHICH = "import caps; print(*caps.backend())"
WITHOUT_LOCK = """
import os
from torch.utils import cpp_extension
load = cpp_extension.load
def checked(*arguments, build_directory, **options):  # torch up to 2.13 would wait for ever
    assert not os.path.exists(os.path.join(build_directory, "lock")), "a leftover lock"
    return load(*arguments, build_directory=build_directory, **options)
cpp_extension.load = checked
"""


def test_loading_builds_once_and_survives_leftovers(checkout):
    first = checkout(WHICH)
    assert first.stdout.startswith("native compiled to"), first.stdout + first.stderr
    again = checkout(WHICH, PATH="/nonexistent")  # needs neither ninja nor a compiler now
    assert again.stdout.startswith("native from"), again.stdout + again.stderr
    library = next((checkout.folder / "cache").glob("*/caps_native.so"))
    library.write_bytes(b"half a library")  # a build that was killed: no mark, torch's lock still there
    (library.parent / "finished").unlink()
    (library.parent / "lock").touch()
    (library.parent / ".ninja_log").unlink(missing_ok=True)
    killed = checkout(WITHOUT_LOCK + WHICH)
    assert killed.stdout.startswith("native compiled to"), killed.stdout + killed.stderr
    with open(checkout.folder / "csrc" / "cpu" / "lanes.h", "a") as source:  # a header in a sub-folder counts as well
        source.write("// changed\n")
    changed = checkout(WHICH)
    assert changed.stdout.startswith("native compiled to"), changed.stdout + changed.stderr
    assert len(list((checkout.folder / "cache").glob("*/caps_native.so"))) == 2


def test_every_source_counts_in_the_hash(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(extension, "FOLDER", tmp_path / "csrc")
    found = [extension.source_hash()]
    sources = [path for path in (tmp_path / "csrc").rglob("*") if path.is_file() and path.suffix != ".py"]
    assert len(sources) > 15
    for path in sources:
        kept = path.read_bytes()
        path.write_bytes(kept + b"\n")
        found.append(extension.source_hash())
        path.write_bytes(kept)
    (tmp_path / "csrc" / "cpu" / "new.h").touch()
    found.append(extension.source_hash())
    (tmp_path / "csrc" / "cpu" / "new.h").rename(tmp_path / "csrc" / "cuda" / "new.h")
    found.append(extension.source_hash())
    assert len(set(found)) == len(found)


def test_a_copy_in_another_package_finds_its_operators(checkout):
    package = checkout.folder / "project"
    package.mkdir()
    for name in ("caps.py", "csrc"):
        shutil.move(checkout.folder / name, package / name)
    said = checkout("from project import caps; print(*caps.backend())")
    assert said.stdout.startswith("native compiled to"), said.stdout + said.stderr


def test_loading_by_two_processes_at_once(checkout):
    start = [subprocess.Popen([sys.executable, "-c", WHICH], cwd=checkout.folder, env=checkout.environment(),
                              stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0].split()[1] for process in start)
    assert said == ["compiled", "from"]


def test_loading_after_a_killed_build(checkout):
    process = subprocess.Popen([sys.executable, "-c", WHICH], cwd=checkout.folder, env=checkout.environment(),
                               stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 60
    while not list(checkout.folder.glob("cache/*/build.ninja")) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    after = checkout(WHICH)
    assert after.stdout.startswith("native compiled to"), after.stdout + after.stderr


def test_loading_without_ninja_on_the_path(checkout):
    folder = checkout.folder / "bin"
    folder.mkdir()
    for tool in ("c++", "g++", "as", "ld", "sh", "which"):
        if shutil.which(tool):
            (folder / tool).symlink_to(shutil.which(tool))
    if not (Path(sys.executable).parent / "ninja").exists():
        pytest.skip("no ninja beside the interpreter")
    result = checkout(WHICH, PATH=str(folder))
    assert result.stdout.startswith("native compiled to"), result.stdout + result.stderr


SQUASH = "import torch, caps; s = torch.ones(2, 3); caps.squash(s); print(caps.squash(s).shape)"


def test_loading_without_a_compiler(checkout):
    result = checkout(SQUASH, CXX="no-such-compiler")
    assert result.returncode == 0 and "[2, 3]" in result.stdout
    assert result.stderr == ("caps: plain PyTorch backend, no C++ compiler: no-such-compiler is not on the PATH\n")
    demanded = checkout(SQUASH, CXX="no-such-compiler", CAPS_BACKEND="native")
    assert demanded.returncode != 0
    assert "the native backend cannot be had: no C++ compiler: no-such-compiler is not on the PATH" in demanded.stderr
    plain = checkout(SQUASH, CXX="no-such-compiler", CAPS_BACKEND="torch")
    assert plain.returncode == 0 and plain.stderr == ""


def test_loading_with_a_compiler_error(checkout):
    (checkout.folder / "csrc" / "cpu" / "operators.cpp").write_text("int x = nonsense;\n")
    result = checkout(SQUASH)
    assert result.returncode == 0 and "[2, 3]" in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and "plain PyTorch backend" in lines[0] and "nonsense" in lines[0], result.stderr


def test_loading_says_nothing_on_import_and_one_line_on_use(checkout):
    quiet = checkout("import caps; caps.CapsuleLayer(2, 3, 4, 5)")
    assert quiet.returncode == 0 and quiet.stderr == ""
    unwritable = checkout(SQUASH, CAPS_CACHE="/proc/nowhere")
    assert unwritable.returncode == 0 and len(unwritable.stderr.splitlines()) == 1 and "/proc" in unwritable.stderr


def test_loading_beside_foreign_operators(checkout):
    foreign = "import torch; library = torch.library.Library('caps', 'DEF'); library.define('squash(Tensor s) -> Tensor');"
    result = checkout(foreign + WHICH)
    assert result.stdout.startswith("torch another library has already registered"), result.stdout + result.stderr


def test_loading_a_library_built_ahead(checkout):
    assert checkout(WHICH).stdout.startswith("native compiled")
    library = next((checkout.folder / "cache").glob("*/caps_native.so"))
    ahead = checkout.folder / "caps_native.so"
    shutil.copy(library, ahead)
    taken = checkout(WHICH)
    assert taken.stdout.strip() == f"native from {ahead}", taken.stdout + taken.stderr
    other = "import caps; from caps.csrc import extension; extension.cpu = lambda: 'another'; print(*caps.backend())"
    assert checkout(other).stdout.startswith("native compiled to")
    (checkout.folder / "caps_parts").mkdir()
    shutil.move(checkout.folder / "csrc", checkout.folder / "caps_parts" / "csrc")  # as pip installs it
    assert checkout(WHICH).stdout.strip() == f"native from {ahead}"
    shutil.move(checkout.folder / "caps_parts" / "csrc", checkout.folder / "moved")
    assert checkout(WHICH).stdout.startswith("torch csrc/extension.py cannot be imported (No module named 'caps.csrc')")
    shutil.move(checkout.folder / "moved", checkout.folder / "csrc")
    (checkout.folder / "caps_parts").rmdir()  # else it is where a copy looks
    with open(checkout.folder / "csrc" / "cpu" / "operators.cpp", "a") as source:
        source.write("// changed\n")
    assert checkout(WHICH).stdout.startswith("native compiled to")


def fake_nvcc(folder, release):
    folder.mkdir()
    (folder / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    (folder / "nvcc").chmod(0o755)


def test_cuda_is_left_out_where_it_cannot_be_compiled(checkout):
    cuda = "import torch, sys; torch.version.cuda = {}; from caps.csrc import extension; print(extension.cuda()[:2])"
    assert "this torch has no CUDA" in checkout(cuda.format(None)).stdout
    if not torch.cuda.is_available():
        assert "no GPU is present" in checkout(cuda.format("'13.0'")).stdout
    fake_nvcc(checkout.folder / "bin", "12.4")
    path = f"{checkout.folder / 'bin'}:/bin:/usr/bin"
    said = checkout(cuda.format("'13.0'"), PATH=path, TORCH_CUDA_ARCH_LIST="9.0").stdout
    assert "nvcc is of CUDA 12, torch of CUDA 13.0" in said
    assert "('9.0', '')" in checkout(cuda.format("'12.8'"), PATH=path, TORCH_CUDA_ARCH_LIST="9.0").stdout
    assert "no nvcc" in checkout(cuda.format("'13.0'"), PATH="/nonexistent", TORCH_CUDA_ARCH_LIST="9.0").stdout


def test_cuda_folder_is_that_of_nvcc(checkout):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    link = checkout.folder / "bin" / "nvcc"
    link.parent.mkdir()
    link.symlink_to(shutil.which("nvcc"))
    code = "import torch; torch.version.cuda = '{}'; from caps.csrc import extension; print(extension.cuda()[2])"
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout.split("release ")[1].split(",")[0]
    said = checkout(code.format(version), PATH=f"{link.parent}:/bin:/usr/bin", TORCH_CUDA_ARCH_LIST="9.0").stdout.strip()
    assert (Path(said) / "include" / "cuda_runtime.h").exists(), said


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.skipif(not (ROOT / "csrc" / "cuda" / "operators.cu").exists(), reason="no CUDA source")
def test_cuda_source_compiles_without_a_warning(tmp_path):
    from torch.utils.cpp_extension import include_paths
    includes = [part for path in include_paths() for part in ("-isystem", path)]
    command = ["nvcc", "-c", str(ROOT / "csrc" / "cuda" / "operators.cu"), "-o", str(tmp_path / "cuda.o"), "-std=c++20",
               "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90", "--threads=2",
               "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC", *includes,
               *extension.compile_arguments()["nvcc"]]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
