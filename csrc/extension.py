"""How caps.py and setup.py come by the native operators: flags, sources, builder, cache, and their registration.

The library is compiled at first use into a cache folder, or ahead of time by setup.py. CAPS_CACHE names the folder,
CAPS_VERBOSE=1 shows the compiler's output, TORCH_CUDA_ARCH_LIST GPUs to compile for besides those that are here.
Whatever CUDA lacks, a driver, an nvcc or code for a GPU, the operators for the CPU are there all the same.
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
import shlex
import shutil
import sys
import tempfile
import threading

import torch

from . import toolkit

try:
    import fcntl
except ImportError:  # native Windows, where load() refuses
    fcntl = None

FOLDER = pathlib.Path(__file__).parent
NATIVE = "-march=native"
FLAGS = ["-O3", NATIVE, "-fno-math-errno", "-fno-trapping-math"]
_LOCK = threading.Lock()
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11, the oldest whose stable ABI is used


def available(device):
    """(whether there are native operators for tensors on `device`, "cpu" or "cuda"; where from, or why not)."""
    if device not in ("cpu", "cuda"):
        return False, f"no native operators for {device}"
    with _LOCK:  # threads that route for the first time at once build once
        codes, reason, lacking = _loaded()
    if codes is None or device == "cpu":
        return codes is not None, reason
    gpus, why = toolkit.gpus()
    unserved = toolkit.unserved(codes, gpus)
    if codes and not unserved:
        return bool(gpus), reason if gpus else why
    built = f"for {', '.join(codes)}, not for a GPU of {'%d.%d' % unserved[0]}" if codes else "for the CPU alone"
    return False, f"the library was built {built}: {lacking or toolkit.cuda()[1] or 'ahead of time'}"


@functools.cache
def _loaded():
    """(the GPU code in the library, how it was loaded, what befell CUDA), or (None, why it could not be loaded, "")."""
    try:
        module, reason, lacking = load()
        return toolkit.codes_in(module.build_info()["cuda_architectures"]), reason, lacking
    except Exception as error:  # of a compiler, a file system or a foreign library; CAPS_VERBOSE shows it whole
        if os.environ.get("CAPS_VERBOSE"):
            raise
        return None, complaint(error), ""


def complaint(error):
    """The line in which a tool says what is wrong, out of all that a builder prints."""
    lines = str(error).splitlines()
    failed = next((i for i, line in enumerate(lines) if line.startswith("FAILED: ")), None)
    said = lines if failed is None else lines[failed + 2:]  # in between stands the command
    said = [line.strip() for line in said if line.strip() and not line.startswith("ninja: build stopped")]
    fault = re.compile(r"\b(error|fatal)\b( #[\w-]+)?\s*:(?! ld returned| linker command failed)", re.IGNORECASE)
    return next(filter(fault.search, said), (said + lines[failed:] + [type(error).__name__])[0])


def load():
    """(the module caps_native with its operators registered, where from, what befell CUDA); raises if there is none."""
    if fcntl is None:
        raise RuntimeError("on native Windows there are no native operators; WSL has them")
    module, reason, lacking = find()
    if not hasattr(module, "registered"):
        register()
        module.registered = True
        sys.modules["caps_native"] = module
    return module, reason, lacking


def find():
    loaded = sys.modules.get("caps_native")
    if loaded is not None:
        if loaded.build_info()["source_hash"] != source_hash():
            raise RuntimeError(f"caps_native was imported from {loaded.__file__}, which other sources were built into")
        return loaded, f"from {loaded.__file__}", ""
    if hasattr(torch.ops.caps, "squash"):  # to register them again would abort the process
        raise RuntimeError("another library has already registered operators under torch.ops.caps")
    library, codes = ahead()
    lacking = ""
    if library and toolkit.unserved(codes, toolkit.gpus()[0]) and toolkit.cuda()[0]:
        try:
            return build()  # for the GPUs that are here
        except Exception as error:
            lacking = complaint(error)
    if library:
        with contextlib.suppress(ImportError):  # a damaged one
            return import_library(library), f"from {library}", lacking
    return build()


def ahead():
    """(the library that setup.py built, the GPU code in it), or (None, ()) where it is of other sources or another CPU.

    Asked of the file's bytes, without loading it.
    """
    spec = importlib.util.find_spec("caps_native")
    library = pathlib.Path(spec.origin) if spec and spec.origin else None
    stamp = library and re.search(rb"caps-build/(\w+)/(\w+)/([\w,]+)/end", library.read_bytes())
    if not stamp:
        return None, ()
    source, processor, codes = (field.decode() for field in stamp.groups())
    if source != source_hash() or processor not in (cpu(), platform.machine()):
        return None, ()
    return library, toolkit.codes_in(codes)


def import_library(library):
    spec = importlib.util.spec_from_file_location("caps_native", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(arguments):
    names = ["ops.cpp", "cpu/operators.cpp"] + ["cuda/operators.cu"] * ("nvcc" in arguments)
    return [str(FOLDER / name) for name in names]


def source_hash():
    """A digest of every source below this folder, so that none is edited, added or moved without a new library."""
    files = sorted(f for f in FOLDER.rglob("*") if f.suffix in (".cpp", ".cu", ".h"))
    named = (f.relative_to(FOLDER).as_posix().encode() + b"\0" + f.read_bytes() + b"\0" for f in files)
    return digest(b"".join(named))


def digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


@functools.cache
def cpu():
    """A digest of what -march=native depends on."""
    try:
        text = next(line for line in open("/proc/cpuinfo") if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        text = platform.processor()
    return digest(f"{platform.machine()} {text}".encode())


def compiler():
    return shlex.split(os.environ.get("CXX") or "c++")


@functools.cache
def takes_native():
    """Whether the C++ compiler knows this CPU; some clang, and those for other machines, refuse -march=native."""
    check = [*compiler(), "-E", "-x", "c++", os.devnull]
    return toolkit.said(*check, NATIVE)[0] or not toolkit.said(*check)[0]  # one that is not there refuses nothing


def compile_arguments(codes):
    """{"cxx": flags} for the CPU alone, and "nvcc": flags with code for GPUs, as setup.py takes them."""
    flags = [flag for flag in FLAGS if flag != NATIVE or takes_native()]
    processor = cpu() if NATIVE in flags else platform.machine()
    # No character that a shell would touch.
    stamp = f"caps-build/{source_hash()}/{processor}/{','.join(codes) or 'none'}/end"
    arguments = {"cxx": [*flags, TORCH_TARGET, f"-DCAPS_STAMP={stamp}", f"-DCAPS_FLAGS={','.join(flags)}"]}
    if codes:
        gencode = [f"-gencode=arch=compute_{code.partition('_')[2]},code={code}" for code in codes]
        arguments["nvcc"] = ["-O3", "-DUSE_CUDA", TORCH_TARGET, *gencode]
    return arguments


@contextlib.contextmanager
def builder():
    """torch's builder, with ninja on the PATH, a bound on compilers and CUDA's folder, and without its warnings."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(pathlib.Path(sys.executable).parent)])
    jobs = os.environ.get("MAX_JOBS") or str(min(4, os.cpu_count() or 1))
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with toolkit.environment(PATH=path, MAX_JOBS=jobs):
            cpp_extension = toolkit.cpp_extension()
            cpp_extension.CUDA_HOME = toolkit.cuda()[2] or cpp_extension.CUDA_HOME
            yield cpp_extension
    finally:
        logger.setLevel(level)


def build():
    codes = toolkit.cuda()[0]
    try:
        return cached(codes)
    except OSError as error:  # a folder that cannot be written; but the library for the CPU alone may lie there
        if not codes:
            raise
        return cached((), complaint(error))


def cached(codes, lacking=""):
    """(the module, where from, what befell CUDA): out of the cache, compiled first where there is none that is whole.

    One process compiles, others wait. Where CUDA's part fails, that is remembered, and one for the CPU alone is taken.
    """
    arguments = compile_arguments(codes)
    folder = cache(arguments)
    library = folder / "caps_native.so"
    if module := ready(library):
        return module, f"from {library}", lacking
    verbose = bool(os.environ.get("CAPS_VERBOSE"))  # then torch shows what the tools say, and tells us nothing
    failed = folder / f"failed-{digest(toolkit.circumstances().encode())}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as held:
        if module := ready(library):
            return module, f"from {library}", lacking
        if failed.exists() and not verbose:
            return cached((), f"{failed.read_text()} (to try again, delete {failed})")
        try:
            module = compile_into(folder, arguments, held)
        except Exception as error:
            if not codes:
                raise
            result = cached((), complaint(error))  # raises where the C++ compiler fails as well: nothing is remembered
            if not verbose:
                failed.write_text(complaint(error))
            return result
        return module, f"compiled to {library}", lacking


def cache(arguments):
    key = repr((torch.__version__, torch.version.cuda, sys.implementation.cache_tag, os.environ.get("CXX"), arguments))
    root = os.environ.get("CAPS_CACHE") or os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch_extensions")
    return pathlib.Path(root).expanduser() / f"caps_{digest(key.encode())}"


def ready(library):
    """The module, or None where the file is not whole or does not load, being of another machine, say."""
    with contextlib.suppress(OSError, ImportError):
        if library.with_name("finished").read_text() == digest(library.read_bytes()):
            return import_library(library)
    return None


@contextlib.contextmanager
def locked(folder):
    """Waits for other processes, and says whether that was possible: some file systems have no locks."""
    with open(folder / "caps.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        yield held


def compile_into(folder, arguments, held):
    library = folder / "caps_native.so"
    if held:
        # What a killed build, or one whose library was damaged since, has left would count as up to date: all goes.
        for path in folder.iterdir():
            if path.is_file() and path.name != "caps.lock" and not path.name.startswith("failed-"):
                path.unlink()
        module = compile_library(folder, arguments)
    else:
        # Others may be compiling the same: each in a folder of its own, whence the library comes at one stroke.
        with tempfile.TemporaryDirectory(prefix="caps_") as private:
            module = compile_library(pathlib.Path(private), arguments)
            arrived = folder / f"{pathlib.Path(private).name}.so"
            shutil.move(f"{private}/caps_native.so", arrived)
            os.replace(arrived, library)
        module.__file__ = str(library)
    (folder / "finished").write_text(digest(library.read_bytes()))
    return module


def compile_library(folder, arguments):
    import pybind11
    verbose = bool(os.environ.get("CAPS_VERBOSE"))
    with builder() as cpp_extension:
        if shutil.which(compiler()[0]) is None:
            raise RuntimeError(f"no C++ compiler: {compiler()[0]} is not on the PATH")
        # torch would give a second build of other code, in the same process, another name.
        cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop("caps_native", None)
        return cpp_extension.load(
            "caps_native", sources(arguments), extra_cflags=arguments["cxx"], extra_cuda_cflags=arguments.get("nvcc"),
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

    @library.register_fake("caps::small_map_conv2d")
    def _(maps, weight, bias, relu):
        return maps.new_empty(*maps.shape[:3], weight.shape[0])

    @library.register_fake("caps::small_map_conv2d_backward")
    def _(grad, maps, weight, rectified):
        return *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (maps, weight)), weight.new_empty(
            weight.shape[0])

    def save(ctx, inputs, output):
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        if isinstance(output, tuple):
            tensors.append(output[1])
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors)

    def no_double_backward(ctx, *grads):
        raise RuntimeError("the native operators have no second derivative; use backend='torch', or CAPS_BACKEND=torch")

    operators = torch.ops.caps
    library.register_autograd(
        "caps::squash", lambda ctx, grad: operators.squash_backward(grad, *ctx.saved_tensors), setup_context=save)
    library.register_autograd(
        "caps::routing", lambda ctx, grad, _: (operators.routing_backward(grad, *ctx.saved_tensors), None),
        setup_context=save)
    library.register_autograd(
        "caps::capsule_linear",
        lambda ctx, grad, _: (*operators.capsule_linear_backward(grad, *ctx.saved_tensors), None), setup_context=save)

    def save_maps(ctx, inputs, output):
        maps, weight, _, relu = inputs
        ctx.save_for_backward(maps, weight, output if relu else None)  # else it is anyone's to change

    library.register_autograd(
        "caps::small_map_conv2d",
        lambda ctx, grad: (*operators.small_map_conv2d_backward(grad, *ctx.saved_tensors), None),
        setup_context=save_maps)
    for name in ("squash", "routing", "capsule_linear", "small_map_conv2d"):
        library.register_autograd(f"caps::{name}_backward", no_double_backward)
        for device in ("cpu", "cuda"):
            library.register_autocast(f"caps::{name}", device, torch.float32)
