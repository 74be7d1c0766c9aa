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

from caps.csrc import extension, toolkit


@pytest.fixture
def checkout(tmp_path):
    """A folder with caps.py, a csrc/ without kernels and an empty cache; run(code, **environment) runs code there.

    No GPU is visible, and CUDA's folder is one that a test may make.
    """
    for folder in ("csrc/cpu", "csrc/cuda"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "caps.py", tmp_path)
    for name in ("extension.py", "toolkit.py", "driver.py"):
        source = (ROOT / "csrc" / name).read_text().replace('"-O3"', '"-O0"').replace("/usr/local/cuda", "/nonexistent")
        (tmp_path / "csrc" / name).write_text(source)
    for name in ("caps.h", "ops.cpp"):
        shutil.copy(ROOT / "csrc" / name, tmp_path / "csrc")
    (tmp_path / "csrc" / "cpu" / "lanes.h").write_text('#include "../caps.h"\n')
    (tmp_path / "csrc" / "cpu" / "operators.cpp").write_text('#include "lanes.h"\n')
    (tmp_path / "csrc" / "cuda" / "operators.cu").touch()

    def environment(**changes):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("CAPS_", "CUDA_")) and k != "PYTHONPATH"}
        cuda = {"CUDA_HOME": str(tmp_path / "toolkit"), "CUDA_VISIBLE_DEVICES": "", "TORCH_CUDA_ARCH_LIST": ""}
        return {**inherited, **cuda, "CAPS_CACHE": str(tmp_path / "cache"), **changes}

    def run(code, **changes):
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(**changes),
                              capture_output=True, text=True, timeout=120)

    run.folder, run.environment = tmp_path, environment
    return run


CUDA = torch.version.cuda or "13.0"
WHICH = "import caps; print(*caps.backend())"
BOTH = f"import torch, caps; torch.version.cuda = '{CUDA}'\nfor device in 'cpu', 'cuda': print(*caps.backend(device))\n"
WITHOUT_LOCK = """
import os
from torch.utils import cpp_extension
load = cpp_extension.load
def checked(*arguments, build_directory, **options):  # torch up to 2.13 would wait for ever
    assert not os.path.exists(os.path.join(build_directory, "lock")), "a leftover lock"
    return load(*arguments, build_directory=build_directory, **options)
cpp_extension.load = checked
"""


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def pretended(folder, release=CUDA, codes="sm_75 sm_80 sm_86 sm_90 sm_100 sm_103", compiles=""):
    """A CUDA folder whose nvcc compiles C++, after commands of a test, which may stop it; and counts."""
    (folder / "lib64").mkdir(parents=True, exist_ok=True)
    for name in ("cudart", "c10_cuda", "torch_cuda"):
        (folder / "lib64" / f"lib{name}.a").write_text("!<arch>\n")
    return script(folder / "bin" / "nvcc", f"""
        case "$1" in
            --version) echo 'Cuda compilation tools, release {release}, V{release}.88' ;;
            --list-gpu-code) printf '%s\\n' {codes} ;;
            --dryrun) echo '#$ TOP={folder}/bin/..' >&2 ;;
            *)
                echo once >> {folder}/count
                {compiles}
                while [ $# -gt 0 ]; do
                    case "$1" in -c) source=$2 ;; -o) object=$2 ;; esac
                    shift
                done
                exec c++ -fPIC -x c++ -c "$source" -o "$object" ;;
        esac""")


READ_ONLY = """
import builtins, errno, pathlib, torch
real = builtins.open
def refused(*arguments, **options):
    raise OSError(errno.EROFS, "Read-only file system")
builtins.open = lambda name, mode="r", *rest, **more: (refused if "w" in mode else real)(name, mode, *rest, **more)
pathlib.Path.mkdir = refused
"""


def test_loading_builds_once_and_survives_leftovers(checkout):
    first = checkout(WHICH)
    assert first.stdout.startswith("native compiled to"), first.stdout + first.stderr
    again = checkout(WHICH, PATH="/nonexistent")  # needs neither ninja nor a compiler now
    assert again.stdout.startswith("native from"), again.stdout + again.stderr
    pretended(checkout.folder / "toolkit")
    cpu, cuda = checkout(READ_ONLY + BOTH, TORCH_CUDA_ARCH_LIST="9.0").stdout.splitlines()
    assert cpu.startswith("native from") and cuda.endswith("for the CPU alone: [Errno 30] Read-only file system")
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


NO_LOCKS = """
import errno, fcntl, os
flock = fcntl.flock
def refused(file, how):
    number = file if isinstance(file, int) else file.fileno()
    if "/cache/" in os.readlink(f"/proc/self/fd/{number}"):
        raise OSError(errno.ENOLCK, "No locks available")
    flock(file, how)
fcntl.flock = refused
"""


def test_loading_where_files_cannot_be_locked(checkout):
    start = [subprocess.Popen([sys.executable, "-c", NO_LOCKS + WHICH], cwd=checkout.folder, env=checkout.environment(),
                              stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in start]
    assert all(line.startswith("native ") for line in said) and "compiled" in "".join(said), said
    assert checkout(NO_LOCKS + WHICH).stdout.startswith("native from")
    assert len(list(checkout.folder.glob("cache/*/*.so"))) == 1


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


def test_loading_with_a_compiler_that_does_not_know_this_cpu(checkout):
    compiler = checkout.folder / "c++"
    script(compiler, """
        for word; do
            [ "$word" != -march=native ] || { echo "c++: error: unsupported argument 'native'" >&2; exit 1; }
        done
        exec c++ "$@" """)
    flags = "; import sys; print(sys.modules['caps_native'].build_info()['flags'])"
    known = checkout(WHICH + flags).stdout
    refused = [checkout(WHICH + flags, CXX=str(compiler)).stdout for _ in range(2)]
    assert "-march=native" in known and "-march=native" not in refused[0], (known, refused)
    assert [line.split()[1] for line in refused] == ["compiled", "from"]


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


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """ask(gpus, **environment): what is to be compiled with a torch of CUDA 13.0 and no nvcc but those in tmp_path."""
    def ask(*gpus, **environment):
        for name, value in {"CUDA_HOME": "", "CUDA_PATH": "", "PATH": "/nonexistent", "TORCH_CUDA_ARCH_LIST": "",
                            **environment}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(toolkit, "gpus", lambda: (gpus, "" if gpus else "no GPU is present"))
        return toolkit.cuda.__wrapped__()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(toolkit, "USUAL", str(tmp_path / "usual"))
    return ask


HOPPER = (9, 0)


def test_nvcc_is_looked_for_where_torch_does_until_one_fits(ask, tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    pretended(old, "12.4"), pretended(new, "13.1")
    found = ("sm_90",), "", str(new)
    assert ask()[1] == "no GPU is present"
    assert ask(HOPPER)[1] == f"no nvcc in CUDA_HOME, in CUDA_PATH, on the PATH or in {tmp_path}/usual"
    assert ask(HOPPER, PATH=f"{old}/bin")[1] == f"nvcc is of CUDA 12 ({old}/bin/nvcc), torch of CUDA 13.0"
    assert ask(HOPPER, PATH=f"{old}/bin", CUDA_HOME=new) == found
    assert ask(HOPPER, CUDA_HOME=old, CUDA_PATH=new) == found
    assert ask(HOPPER, CUDA_HOME=tmp_path, PATH=f"{old}/bin:{new}/bin") == found
    (tmp_path / "usual").symlink_to(new)
    assert ask(HOPPER, PATH=f"{old}/bin") == found
    monkeypatch.setattr(toolkit, "PATIENCE", 1)
    for defect in ("exec sleep 60", "kill -SEGV $$", "exit 1", "#!"):
        script(old / "bin" / "nvcc", defect)
        assert ask(HOPPER, CUDA_HOME=old) == found
    (tmp_path / "usual").unlink()
    assert ask(HOPPER, CUDA_HOME=old)[1] == f"nvcc does not tell its version ({old}/bin/nvcc), torch of CUDA 13.0"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert ask(HOPPER)[0] == ()


@pytest.mark.parametrize("wanted, gpus, codes", [
    ("8.0", [HOPPER], "sm_80 sm_90"), ("", [HOPPER, (8, 6), HOPPER], "sm_86 sm_90"), ("native", [HOPPER], "sm_90"),
    ("Ampere", [], "sm_80 compute_86 sm_86"), ("Turing+PTX;Hopper", [], "compute_75 sm_75 compute_90 sm_90"),
    ("9.0 +PTX", [], "compute_90 sm_90"),
    (" 9.0a, 8.0;\t7.5+PTX ;;", [], "compute_75 sm_75 sm_80 sm_90a"),
    ("", [(12, 1)], "compute_103"), ("6.0;12.1+PTX", [], "compute_103"), ("", [(8, 9)], "compute_86")])
def test_code_for_gpus_that_are_named_or_present(ask, tmp_path, wanted, gpus, codes):
    pretended(tmp_path / "usual", "13.0")
    assert ask(*gpus, TORCH_CUDA_ARCH_LIST=wanted)[0] == tuple(codes.split())


@pytest.mark.parametrize("wanted, gpus, reason", [
    ("8.0;Pascall", [HOPPER], f"torch {torch.__version__} knows no 'Pascall', which TORCH_CUDA_ARCH_LIST names"),
    ("6.0 6.1", [], "nvcc 13.0 makes none of TORCH_CUDA_ARCH_LIST=6.0 6.1"),
    ("8.0", [HOPPER, (6, 1)], "nvcc 13.0 makes no code for a GPU of compute capability 6.1")])
def test_code_that_cannot_be_made_is_named(ask, tmp_path, wanted, gpus, reason):
    pretended(tmp_path / "usual", "13.0")
    assert ask(*gpus, TORCH_CUDA_ARCH_LIST=wanted) == ((), reason, "")


def test_code_runs_where_nvidia_says_so():
    runs = {code: [gpu for gpu in ((8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0)) if toolkit.runs(code, gpu)]
            for code in ("sm_80", "sm_86", "sm_90a", "compute_90", "compute_100a", "sm_100")}
    assert runs == {"sm_80": [(8, 0), (8, 6)], "sm_86": [(8, 6)], "sm_90a": [(9, 0)], "compute_100a": [(10, 0)],
                    "compute_90": [(9, 0), (10, 0), (10, 3), (12, 0)], "sm_100": [(10, 0), (10, 3)]}


@pytest.mark.parametrize("said, line", [
    ("nvcc fatal   : Unsupported gpu architecture 'compute_20'", 0),
    ("In file included from a.h:1,\nhost_config.h:143:2: error: #error -- unsupported GNU version!", 1),
    ("a.cu(1): warning #1: w\na.cu(2): error #20: identifier \"x\" is undefined", 1),
    ("/usr/bin/ld: cannot find -lcudart: No such file\ncollect2: error: ld returned 1 exit status", 0),
    ("sh: 1: cicc: not found", 0), ("", 0)])
def test_a_failed_build_is_told_by_the_tool_itself(said, line):
    text = f"Error building: [1/2] c++ -Werror\n[2/2] nvcc a.cu\nFAILED: [code=1] a.o \nnvcc a.cu -o a.o\n{said}\n" \
           "ninja: build stopped: subcommand failed.\n"
    assert extension.complaint(RuntimeError(text)) == (said.splitlines() or ["FAILED: [code=1] a.o "])[line]


REFUSED = "the library was built for the CPU alone: nvcc fatal   : no host compiler"


def test_a_failed_build_for_cuda_is_remembered_and_leaves_the_cpu(checkout):
    folder = checkout.folder / "toolkit"
    wanted = checkout.environment(TORCH_CUDA_ARCH_LIST="9.0")
    pretended(folder, compiles="echo 'nvcc fatal   : no host compiler' >&2; exit 1")
    start = [subprocess.Popen([sys.executable, "-c", BOTH], cwd=checkout.folder, env=wanted, stdout=subprocess.PIPE,
                              text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].splitlines() for process in start]
    said.append(checkout(BOTH, **wanted).stdout.splitlines())
    assert sorted(cpu.split()[1] for cpu, _ in said) == ["compiled", "from", "from"] and said[2][0].startswith("native")
    assert all(cuda.startswith(f"torch {REFUSED}") for _, cuda in said), said
    assert (folder / "count").read_text() == "once\n"
    pretended(folder)
    repaired = checkout(BOTH + "import sys; print(sys.modules['caps_native'].build_info())", **wanted).stdout
    assert repaired.startswith("native compiled") and "'sm_90'" in repaired, repaired
    assert (folder / "count").read_text() == "once\nonce\n"


def test_setup_builds_for_the_cpu_where_cuda_fails(checkout):
    shutil.copy(ROOT / "setup.py", checkout.folder)
    pretended(checkout.folder / "toolkit", compiles="echo 'nvcc fatal   : no host compiler' >&2; exit 1")
    environment = checkout.environment(TORCH_CUDA_ARCH_LIST="9.0")
    made = subprocess.run([sys.executable, "setup.py", "build_ext", "--build-lib", "."], cwd=checkout.folder,
                          env=environment, capture_output=True, text=True)
    assert torch.version.cuda is None or "caps: built without its CUDA part" in made.stderr, made.stdout + made.stderr
    used = checkout(WHICH, PATH="/nonexistent").stdout
    assert used.startswith(f"native from {checkout.folder}/caps_native."), used + made.stderr


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """The environment in which CUDA's driver is a pretended one, which writes down who initialises it."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.cpp").write_text(r"""
        #include <cstdio>
        #include <cstdlib>
        #include <cstring>
        #include <unistd.h>
        extern "C" {
        int cuInit(unsigned) {
          FILE* file = fopen(getenv("PRETENDED_LOG"), "a");
          fprintf(file, "%d\n", getpid());
          return fclose(file) + atoi(getenv("PRETENDED_STATUS"));
        }
        int cuDriverGetVersion(int* version) { return *version = atoi(getenv("PRETENDED_VERSION")), 0; }
        int cuDeviceGetCount(int* count) { return *count = strlen(getenv("PRETENDED_GPUS")) / 2, 0; }
        int cuDeviceGet(int* device, int i) { return *device = i, 0; }
        int cuDeviceGetAttribute(int* value, int attribute, int device) {
          return *value = getenv("PRETENDED_GPUS")[2 * device + (attribute == 76)] - '0', 0;
        }
        int cuGetErrorString(int, const char** text) { return *text = "a pretended error", 0; }
        }""")
    subprocess.run(["c++", "-shared", "-fPIC", "driver.cpp", "-o", "libcuda.so.1"], cwd=folder, check=True)
    return {"LD_LIBRARY_PATH": str(folder), "PRETENDED_LOG": str(folder / "log"), "PRETENDED_STATUS": "0",
            "PRETENDED_VERSION": CUDA.split(".")[0] + "000"}


def test_operators_for_the_cpu_do_not_initialise_cuda(checkout, driver):
    """Neither to compile them for the GPU that is there nor to use them; a process forked afterwards can use CUDA."""
    pretended(checkout.folder / "toolkit")
    code = BOTH + """import os
caps.squash(torch.ones(2, 3), backend="torch")
forked = os.fork()
if not forked:
    os._exit(torch.cuda._is_in_bad_fork())
print(os.waitpid(forked, 0)[1], torch.cuda.is_initialized(), os.getpid())"""
    done = checkout(code, **driver, PRETENDED_GPUS="90")
    cpu, cuda, last = done.stdout.splitlines()
    assert cpu.startswith("native compiled to") and cuda.startswith("native compiled to") and done.stderr == ""
    assert last.startswith("0 False") and last.split()[2] not in Path(driver["PRETENDED_LOG"]).read_text().split()


@pytest.mark.parametrize("changes, reason", [
    ({"PRETENDED_VERSION": "11080"}, f"the GPU driver is of CUDA 11.8, torch of CUDA {CUDA}"),
    ({"PRETENDED_STATUS": "803"}, "the GPU driver does not work: a pretended error"),
    ({"PRETENDED_STATUS": "100"}, "no GPU is present"), ({"PRETENDED_GPUS": ""}, "no GPU is present"),
    ({"PRETENDED_GPUS": "9061"}, "makes no code for a GPU of compute capability 6.1")])
def test_gpus_that_cannot_be_used_are_named(checkout, driver, changes, reason):
    pretended(checkout.folder / "toolkit")
    code = f"import torch; torch.version.cuda = '{CUDA}'; from caps.csrc import toolkit; print(toolkit.cuda())"
    done = checkout(code, **{**driver, "PRETENDED_GPUS": "90", **changes})
    assert done.stdout.startswith("((), ") and reason in done.stdout and done.stderr == "", done.stdout + done.stderr


def test_a_library_built_ahead_is_taken_where_it_runs(checkout, driver):
    nvcc = pretended(checkout.folder / "toolkit")
    assert checkout(BOTH, **driver, PRETENDED_GPUS="80").stdout.startswith("native compiled to")
    ahead = checkout.folder / "caps_native.so"
    shutil.copy(next(checkout.folder.glob("cache/*/caps_native.so")), ahead)
    nvcc.rename(checkout.folder / "hidden")
    without = {**driver, "PATH": "/nonexistent"}
    taken = f"native from {ahead}"
    assert checkout(BOTH, **without, PRETENDED_GPUS="8086").stdout.splitlines() == [taken, taken]
    for gpus in ("90", "8090"):
        cpu, cuda = checkout(BOTH, **without, PRETENDED_GPUS=gpus).stdout.splitlines()
        assert cpu == taken and cuda.startswith("torch the library was built for sm_80, not for a GPU of 9.0: no nvcc")
    (checkout.folder / "hidden").rename(nvcc)
    better = checkout(BOTH, **driver, PRETENDED_GPUS="90").stdout.splitlines()
    assert all(line.startswith("native compiled to") for line in better), better
    broken = checkout(BOTH, **driver, PRETENDED_GPUS="75", CXX="no-such-compiler").stdout.splitlines()
    assert broken[0] == taken and broken[1].endswith("of 7.5: no C++ compiler: no-such-compiler is not on the PATH")


def test_cuda_folder_is_that_of_nvcc(checkout):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    link = checkout.folder / "bin" / "nvcc"
    link.parent.mkdir()
    link.symlink_to(shutil.which("nvcc"))
    code = "import torch; torch.version.cuda = '{}'; from caps.csrc import toolkit; print(toolkit.cuda()[2])"
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout.split("release ")[1].split(",")[0]
    said = checkout(code.format(version), PATH=f"{link.parent}:/bin:/usr/bin", TORCH_CUDA_ARCH_LIST="9.0").stdout.strip()
    assert (Path(said) / "include" / "cuda_runtime.h").exists(), said
