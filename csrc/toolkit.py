"""What CUDA there is: GPUs, nvcc, and the code that one makes for the other; no question here initialises CUDA.

Code is named as nvcc names it: "sm_90" is machine code for compute capability 9.0, "sm_90a" for that GPU alone, and
"compute_90" is PTX, which the driver translates for that GPU and every later one.
"""
import contextlib
import ctypes
import functools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import torch

DRIVER = pathlib.Path(__file__).with_name("driver.py")
USUAL = "/usr/local/cuda"
PATIENCE = 10  # seconds for a tool to say what it is


@contextlib.contextmanager
def environment(**changes):
    """os.environ with changes, which are taken back afterwards."""
    saved = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def said(*command, patience=None):
    """(whether a program succeeded, what it printed)."""
    try:
        done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors="replace", timeout=patience or PATIENCE)
    except (OSError, subprocess.SubprocessError) as error:
        return False, str(error)
    return done.returncode == 0, done.stdout


def gpus():
    """(the compute capability (major, minor) of every visible GPU, ""), or ((), why there is none to be used)."""
    if torch.version.cuda is None:
        return (), "this torch has no CUDA"
    if torch.cuda.is_initialized():
        return tuple(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())), ""
    return _asked()


@functools.cache
def _asked():
    try:
        ctypes.CDLL("libcuda.so.1")  # the driver; to load it initialises nothing
    except OSError:
        return (), "no GPU is present"
    worked, text = said(sys.executable, "-S", DRIVER, patience=60)  # it may have to wake many GPUs
    version = re.search(r"CUDA (\d+)(\d\d)\d", text)
    if not worked or not version:
        return (), f"the GPU driver does not work: {text.strip().rpartition(chr(10))[2] or 'no answer'}"
    if int(version[1]) < int(torch.version.cuda.split(".")[0]):
        return (), f"the GPU driver is of CUDA {version[1]}.{int(version[2])}, torch of CUDA {torch.version.cuda}"
    found = tuple((int(major), int(minor)) for major, minor in re.findall(r"GPU (\d+)\.(\d+)", text))
    return found, "" if found else "no GPU is present"


def codes_in(stamp):
    """"sm_90,compute_90" -> ["sm_90", "compute_90"]; "none" -> []."""
    return re.findall(r"[a-z]+_\w+", stamp)


def parts(code):
    """"sm_90a" -> "sm", (9, 0), True."""
    kind, major, minor, alone = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", code).groups()
    return kind, (int(major), int(minor)), bool(alone)


def runs(code, gpu):
    kind, capability, alone = parts(code)
    if alone:
        return gpu == capability
    return gpu >= capability and (kind == "compute" or gpu[0] == capability[0])


def unserved(codes, gpus):
    """The GPUs on which none of the codes runs."""
    return [gpu for gpu in gpus if not any(runs(code, gpu) for code in codes)]


def nvccs():
    """Every nvcc there is, in the order in which torch looks for one."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [os.path.join(home, "bin") for home in homes if home] + os.get_exec_path() + [f"{USUAL}/bin"]
    return list(dict.fromkeys(filter(None, (shutil.which("nvcc", path=folder) for folder in folders))))


def nvcc():
    """(the first nvcc of torch's CUDA version, its own version), or (None, why there is none)."""
    found = []
    for path in nvccs():
        release = re.search(r"release ((\d+)\.\d+)", said(path, "--version")[1])
        if release and release[2] == torch.version.cuda.split(".")[0]:
            return path, release[1]
        found.append(f"is of CUDA {release[2]} ({path})" if release else f"does not tell its version ({path})")
    if found:
        return None, f"nvcc {', '.join(found)}, torch of CUDA {torch.version.cuda}"
    return None, f"no nvcc in CUDA_HOME, in CUDA_PATH, on the PATH or in {USUAL}"


def cpp_extension():
    """torch's builder. Its import asks for a GPU, which would initialise CUDA, unless CUDA_HOME is empty."""
    with environment(CUDA_HOME="", CUDA_PATH=""):
        from torch.utils import cpp_extension
    if cpp_extension.CUDA_HOME == "":  # whoever else builds with it finds CUDA as ever
        cpp_extension.CUDA_HOME = next((str(pathlib.Path(path).parents[1]) for path in nvccs()), None)
    return cpp_extension


def asked_for():
    """The code that TORCH_CUDA_ARCH_LIST names, as torch reads it."""
    codes = []
    wanted = re.sub(r"[;,\s]+\+PTX", "+PTX", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    for word in re.split(r"[;,\s]+", wanted):
        if word in ("", "native"):  # the GPUs that are present are among them anyway
            continue
        # most of torch's names, as "Hopper", imply PTX
        for spelling in filter(None, (word, word.removesuffix("+PTX"))):
            with environment(TORCH_CUDA_ARCH_LIST=spelling), contextlib.suppress(ValueError):
                flags = cpp_extension()._get_cuda_arch_flags()
                break
        else:
            raise ValueError(f"torch {torch.__version__} knows no {word!r}, which TORCH_CUDA_ARCH_LIST names")
        codes += re.findall(r",code=(\w+)", " ".join(flags))
    return codes


def nearest(code, known):
    """[the code itself where nvcc makes it, else PTX of the newest GPU before it]; [] where there is none."""
    capability = parts(code)[1]
    if capability in known:
        return [code]
    return ["compute_{}{}".format(*gpu) for gpu in sorted(known) if gpu < capability][-1:]


@functools.cache
def cuda():
    """(the code to compile, "", CUDA's folder), or ((), why for the CPU alone, "")."""
    present, why = gpus()
    if torch.version.cuda is None:
        return (), why, ""
    try:
        wanted = asked_for()
    except Exception as error:  # also of torch's own reader: the operators for the CPU need none of it
        return (), str(error), ""
    if not present and not wanted:
        return (), why, ""
    path, version = nvcc()
    if path is None:
        return (), version, ""
    known = {parts(code)[1] for code in re.findall(r"sm_\d\d+\b", said(path, "--list-gpu-code")[1])}
    wanted += ["sm_{}{}".format(*gpu) for gpu in present]
    codes = sorted({code for name in wanted for code in nearest(name, known)}, key=lambda code: (parts(code)[1], code))
    for gpu in unserved(codes, present):
        return (), "nvcc {} makes no code for a GPU of compute capability {}.{}".format(version, *gpu), ""
    if not codes:
        return (), f"nvcc {version} makes none of TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']}", ""
    top = re.search(r"TOP=(\S+)", said(path, "--dryrun", "-x", "cu", os.devnull)[1])
    # nvcc itself knows its folder, also behind links and wrappers.
    return tuple(codes), "", os.path.realpath(top[1]) if top else str(pathlib.Path(os.path.realpath(path)).parents[1])


def circumstances():
    """What a failed build for CUDA may be due to, besides what it was made of: when this changes, it is worth a try."""
    home = cuda()[2]
    host = [shutil.which(shlex.split(os.environ.get(name) or name)[0]) for name in ("CXX", "CC", "c++", "g++", "gcc")]
    paths = [path for path in (*host, f"{home}/bin/nvcc", f"{home}/include", f"{home}/lib64") if path]
    tools = [(os.path.realpath(path), os.stat(path).st_mtime_ns) for path in paths if os.path.exists(path)]
    names = sorted(name for name in os.environ if re.search("NVCC|^CC$|^C.*PATH$|^LIBRARY_PATH$", name))
    return repr((tools, [(name, os.environ[name]) for name in names]))
