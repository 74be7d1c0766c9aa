"""How caps.py and setup.py come by the native operators: flags, sources, builder, cache, and their registration.

The library is compiled at first use into a cache folder, or ahead of time by setup.py. CAPS_CACHE names the folder,
CAPS_VERBOSE=1 shows the compiler's output, TORCH_CUDA_ARCH_LIST the GPUs to compile for where there is none.
"""

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import threading

import torch

try:
    import fcntl
except ImportError:  # native Windows, where load() refuses
    fcntl = None

FOLDER = pathlib.Path(__file__).parent
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
_LOCK = threading.Lock()
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11, the oldest whose stable ABI is used


def available(device):
    """(whether there are native operators for tensors on `device`, "cpu" or "cuda"; where from, or why not)."""
    with _LOCK:  # threads that route for the first time at once build once
        info, reason = _loaded()
    if info and device == "cuda" and info["cuda_architectures"] == "none":
        return False, f"the library was built for the CPU alone: {cuda()[1] or 'ahead of time'}"
    if device not in ("cpu", "cuda"):
        return False, f"no native operators for {device}"
    return info is not None, reason


@functools.cache
def _loaded():
    """(build_info, how it was loaded) or (None, why it could not be)."""
    try:
        module, reason = load()
        return module.build_info(), reason
    except Exception as error:  # of a compiler, a file system or a foreign library; CAPS_VERBOSE shows it whole
        if os.environ.get("CAPS_VERBOSE"):
            raise
        lines = list(filter(None, map(str.strip, str(error).splitlines()))) or [type(error).__name__]
        return None, next((line for line in lines if re.search(r"\berror:", line)), lines[0])


def load():
    """(the module caps_native with its operators registered, where it came from); raises where it cannot be had."""
    if fcntl is None:
        raise RuntimeError("on native Windows there are no native operators; WSL has them")
    module, reason = find()
    if not hasattr(module, "registered"):
        register()
        module.registered = True
        sys.modules["caps_native"] = module
    return module, reason


def find():
    loaded = sys.modules.get("caps_native")
    if loaded is not None:
        if loaded.build_info()["source_hash"] != source_hash():
            raise RuntimeError(f"caps_native was imported from {loaded.__file__}, which other sources were built into")
        return loaded, f"from {loaded.__file__}"
    if hasattr(torch.ops.caps, "squash"):  # to register them again would abort the process
        raise RuntimeError("another library has already registered operators under torch.ops.caps")
    ahead = importlib.util.find_spec("caps_native")
    if ahead and matches(pathlib.Path(ahead.origin)):
        with contextlib.suppress(ImportError):  # a damaged one
            return import_library(pathlib.Path(ahead.origin)), f"from {ahead.origin}"
    return build()


def matches(library):
    """Whether a library is of these sources and for this CPU and GPU; asked of its bytes, without loading it."""
    stamp = re.search(rb"caps-build/(\w+)/(\w+)/([\w.,+]+)/end", library.read_bytes())
    if not stamp:
        return False
    source, processor, built = (field.decode() for field in stamp.groups())
    wanted = re.findall(r"\d+\.\d+", cuda()[0])
    return source == source_hash() and processor == cpu() and set(wanted) <= set(built.split(","))


def import_library(library):
    spec = importlib.util.spec_from_file_location("caps_native", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources():
    names = ["ops.cpp", "cpu/operators.cpp"] + ["cuda/operators.cu"] * bool(cuda()[0])
    return [str(FOLDER / name) for name in names]


def source_hash():
    """A digest of every source below this folder, so that none is edited, added or moved without a new library."""
    files = sorted(f for f in FOLDER.rglob("*") if f.suffix in (".cpp", ".cu", ".h"))
    named = (f.relative_to(FOLDER).as_posix().encode() + b"\0" + f.read_bytes() + b"\0" for f in files)
    return hashlib.sha256(b"".join(named)).hexdigest()[:16]


@functools.cache
def cpu():
    """A digest of what -march=native depends on."""
    try:
        text = next(line for line in open("/proc/cpuinfo") if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        text = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {text}".encode()).hexdigest()[:16]


@functools.cache
def cuda():
    """(architectures, "", CUDA's folder) to compile for, or ("", why the CPU alone, "")."""
    if torch.version.cuda is None:
        return "", "this torch has no CUDA", ""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(f"{a}.{b}" for a, b in sorted(found))
    if not wanted:
        return "", "no GPU is present", ""
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", "")] + [
        os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]))
    if nvcc is None:
        return "", "no nvcc on the PATH", ""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", said)
    if not release or release[1] != torch.version.cuda.split(".")[0]:
        return "", f"nvcc is of CUDA {release[1] if release else '?'}, torch of CUDA {torch.version.cuda}", ""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", said)  # nvcc itself knows its folder, also behind links and wrappers
    return wanted, "", os.path.realpath(top[1]) if top else str(pathlib.Path(os.path.realpath(nvcc)).parents[1])


def defines():
    architectures = re.sub("[; ]+", ",", cuda()[0]) or "none"
    stamp = f"caps-build/{source_hash()}/{cpu()}/{architectures}/end"  # no character that a shell would touch
    return [TORCH_TARGET, f"-DCAPS_STAMP={stamp}", f"-DCAPS_FLAGS={','.join(FLAGS)}"]


def compile_arguments():
    """{"cxx": flags, "nvcc": flags}, as setup.py takes them."""
    return {"cxx": FLAGS + defines(), "nvcc": ["-O3", "-DUSE_CUDA", TORCH_TARGET]}


@contextlib.contextmanager
def builder():
    """torch's builder, in an environment with ninja on the PATH, a bound on compilers, and CUDA's folder and GPUs."""
    saved = dict(os.environ)
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(pathlib.Path(sys.executable).parent)])
    os.environ.setdefault("MAX_JOBS", str(min(4, os.cpu_count() or 1)))
    architectures, _, folder = cuda()
    if architectures:
        os.environ.update(TORCH_CUDA_ARCH_LIST=architectures, CUDA_HOME=folder)
    else:
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a missing GPU
    try:
        from torch.utils import cpp_extension
        if architectures:
            cpp_extension.CUDA_HOME = folder
        yield cpp_extension
    finally:
        os.environ.clear()
        os.environ.update(saved)


def build():
    """The library out of the cache, compiled first where there is none that is whole; one process compiles, others wait.
    """
    arguments = compile_arguments()
    key = repr((torch.__version__, torch.version.cuda, sys.implementation.cache_tag, os.environ.get("CXX"), arguments))
    root = os.environ.get("CAPS_CACHE") or os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch_extensions")
    folder = pathlib.Path(root).expanduser() / f"caps_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    library, finished = folder / "caps_native.so", folder / "finished"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "caps.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            if finished.read_text() == digest(library):
                return import_library(library), f"from {library}"
        # What a killed build, or one whose library was damaged since, has left would count as up to date: all goes.
        for path in folder.iterdir():
            if path.is_file() and path.name != "caps.lock":
                path.unlink()
        module = compile_library(folder, arguments)
        finished.write_text(digest(library))
        return module, f"compiled to {library}"


def digest(library):
    return hashlib.sha256(library.read_bytes()).hexdigest()


def compile_library(folder, arguments):
    import pybind11
    verbose = bool(os.environ.get("CAPS_VERBOSE"))
    with builder() as cpp_extension:
        compiler = cpp_extension.get_cxx_compiler()
        if shutil.which(compiler) is None:
            raise RuntimeError(f"no C++ compiler: {compiler} is not on the PATH")
        return cpp_extension.load(
            "caps_native", sources(), extra_cflags=arguments["cxx"], extra_cuda_cflags=arguments["nvcc"],
            extra_include_paths=[pybind11.get_include()], build_directory=str(folder), verbose=verbose)


def register():
    """Shapes for tracing, gradients, and float32 under autocast, for the operators that csrc/ops.cpp defines."""
    library = torch.library

    @library.register_fake("caps::squash")
    def _(s):
        return torch.empty_like(s, memory_format=torch.contiguous_format)

    @library.register_fake("caps::squash_backward")
    def _(grad, s):
        return torch.empty_like(s, memory_format=torch.contiguous_format)

    @library.register_fake("caps::routing")
    def _(votes, iterations):
        B, _, J, D = votes.shape
        return votes.new_empty(B, J, D), votes.new_empty(iterations, B, J, D)

    @library.register_fake("caps::routing_backward")
    def _(grad, votes, sums):
        return torch.empty_like(votes, memory_format=torch.contiguous_format)

    @library.register_fake("caps::capsule_linear")
    def _(inputs, weight, iterations):
        B, (_, J, D, _) = inputs.shape[0], weight.shape
        return inputs.new_empty(B, J, D), inputs.new_empty(iterations, B, J, D)

    @library.register_fake("caps::capsule_linear_backward")
    def _(grad, inputs, weight, sums):
        return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (inputs, weight))

    def save(ctx, inputs, output):
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        if isinstance(output, tuple):
            tensors.append(output[1])
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors)

    def no_double_backward(ctx, *grads):
        raise RuntimeError("the native operators have no second derivative; use backend='torch'")

    operators = torch.ops.caps
    library.register_autograd(
        "caps::squash", lambda ctx, grad: operators.squash_backward(grad, *ctx.saved_tensors), setup_context=save)
    library.register_autograd(
        "caps::routing", lambda ctx, grad, _: (operators.routing_backward(grad, *ctx.saved_tensors), None),
        setup_context=save)
    library.register_autograd(
        "caps::capsule_linear",
        lambda ctx, grad, _: (*operators.capsule_linear_backward(grad, *ctx.saved_tensors), None), setup_context=save)
    for name in ("squash", "routing", "capsule_linear"):
        library.register_autograd(f"caps::{name}_backward", no_double_backward)
        for device in ("cpu", "cuda"):
            library.register_autocast(f"caps::{name}", device, torch.float32)
