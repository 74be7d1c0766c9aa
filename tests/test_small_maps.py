"""The convolution of small maps: the native operator against PyTorch's, and the layers of AlexCapsNet that use it."""
import pytest
import torch
import torch.nn.functional as F
from test_operators import SANITIZED, assert_near
from torch.autograd import gradcheck

import caps

ops = torch.ops.caps
pytestmark = pytest.mark.usefixtures("native")
# B I O: one channel, tiles of lanes partly, just and more than filled, more samples than a task takes at once
SIZES = [(1, 1, 1), (3, 6, 5), (2, 64, 32), (9, 33, 17), (5, 130, 40), (131, 8, 70), (300, 16, 16)]


def make(B, I, O, side, kernel, dtype=torch.float64):
    generator = torch.Generator().manual_seed(B + 7 * I + 31 * O + 101 * side + 307 * kernel)
    shapes = (B, side, side, I), (O, I, kernel, kernel), (O,), (B, side, side, O)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(function, maps, weight, bias, grad, relu):
    """[output, the three gradients]"""
    leaves = [t.detach().clone().requires_grad_() for t in (maps, weight, bias)]
    output = function(*leaves, relu)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def plain(maps, weight, bias, relu):
    output = F.conv2d(maps.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[2] // 2).permute(0, 2, 3, 1)
    return F.relu(output) if relu else output


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("side", [1, 2, 3])
def test_operators_small_maps_equal_the_convolution(side, kernel, relu):
    for sizes in SIZES[::3] if SANITIZED else SIZES:
        arguments = make(*sizes, side, kernel)
        assert_near(run(ops.small_map_conv2d, *arguments, relu), run(plain, *arguments, relu), 1e-12)
        single = [t.float() for t in arguments]
        found = run(ops.small_map_conv2d, *single, relu)
        exact = run(plain, *(t.double() for t in single), False)
        if relu:  # rounding may put an output on the other side of 0: the mask is the found one
            *tensors, grad = (t.double() for t in single)
            exact = [F.relu(exact[0]), *run(plain, *tensors, grad * (found[0] > 0), False)[1:]]
        assert_near(found, exact, 1e-5)


def test_operators_small_maps_kernel_of_one_pixel_takes_any_maps():
    maps, weight, bias, _ = make(3, 5, 4, 1, 1)
    maps, grad = torch.randn(3, 4, 7, 5, dtype=torch.float64), torch.randn(3, 4, 7, 4, dtype=torch.float64)
    assert_near(run(ops.small_map_conv2d, maps, weight, bias, grad, True), run(plain, maps, weight, bias, grad, True), 1e-12)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_operators_small_maps_keep_nan_in_its_sample(side):
    maps, weight, bias, grad = make(7, 20, 36, side, 3, torch.float32)
    for relu in (False, True):
        clean = run(ops.small_map_conv2d, maps, weight, bias, grad, relu)
        for value in (float("nan"), torch.tensor(-1, dtype=torch.int32).view(torch.float32), float("inf")):
            bad = maps.clone()
            bad[4, 0, 0, 3] = value
            dirty = run(ops.small_map_conv2d, bad, weight, bias, grad, relu)
            others = [b for b in range(7) if b != 4]
            assert torch.equal(dirty[0][others], clean[0][others]) and torch.equal(dirty[1][others], clean[1][others])
            assert not dirty[0][4].isfinite().all()
            if value != float("inf"):
                assert dirty[0][4, 0, 0].isnan().all() and dirty[2][:, 3].isnan().any()


def test_operators_small_maps_keep_samples_apart():
    maps, weight, bias, grad = make(40, 30, 50, 2, 3)
    together = run(ops.small_map_conv2d, maps, weight, bias, grad, True)
    for b in (0, 7, 39):
        alone = run(ops.small_map_conv2d, maps[b:b + 1], weight, bias, grad[b:b + 1], True)
        assert_near(alone[:2], [t[b:b + 1] for t in together[:2]], 1e-12)


def test_operators_small_maps_of_no_sample():
    for kernel in (1, 3):
        arguments = make(0, 6, 5, 2, kernel)
        found = run(ops.small_map_conv2d, *arguments, True)
        assert [f.shape for f in found] == [arguments[3].shape, *(t.shape for t in arguments[:3])]
        assert not any(f.any() for f in found)


def test_operators_small_maps_noncontiguous():
    maps, weight, bias, grad = make(5, 12, 20, 2, 3)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (maps, weight)]
    leaves = [t.requires_grad_() for t in (*strided, bias.repeat_interleave(2)[::2])]
    output = ops.small_map_conv2d(*leaves, True)
    assert output.is_contiguous()
    gradients = torch.autograd.grad(output, leaves, grad.flip(0).flip(0).transpose(1, 2).contiguous().transpose(1, 2))
    for found, expected in zip([output, *gradients], run(ops.small_map_conv2d, maps, weight, bias, grad, True)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("side, sizes", [(1, (33, 70, 100)), (2, (300, 64, 96)), (2, (32, 192, 40)), (3, (130, 40, 60))], ids=str)
def test_operators_small_maps_bitwise_equal_for_any_number_of_threads(side, sizes):
    arguments, before, results = make(*sizes, side, 3, torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2, 8):
            torch.set_num_threads(threads)
            results.append(run(ops.small_map_conv2d, *arguments, True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_small_maps_name_the_wrong_argument():
    maps, weight, bias, grad = make(4, 6, 5, 2, 3, torch.float32)
    for call, message in (
            (lambda: ops.small_map_conv2d(maps[0], weight, bias, True), r"maps has shape \[2, 2, 6\], expected \[B, H, W, I\]"),
            (lambda: ops.small_map_conv2d(maps, weight[:, :5], bias, True), r"weight has shape \[5, 5, 3, 3\], expected .* = \[any, 6,"),
            (lambda: ops.small_map_conv2d(maps, weight[..., :2], bias, True), r"weight has shape \[5, 6, 3, 2\], expected"),
            (lambda: ops.small_map_conv2d(maps, weight[..., :2, :2], bias, True), "a kernel of 2×2, expected an odd number"),
            (lambda: ops.small_map_conv2d(maps, weight, bias[:4], True), r"bias has shape \[4\], expected \[O\] = \[5\]"),
            (lambda: ops.small_map_conv2d(maps, weight.double(), bias, True), "weight has dtype Double, expected that of maps"),
            (lambda: ops.small_map_conv2d(maps.half(), weight, bias, True), "maps has dtype Half"),
            (lambda: ops.small_map_conv2d(maps[:, :1], weight, bias, True), "maps are of 1×2 pixels, expected 1×1, 2×2 or 3×3"),
            (lambda: ops.small_map_conv2d(maps[..., :0], weight[:, :0], bias, True), "expected a channel at least"),
            (lambda: ops.small_map_conv2d_backward(grad[:3], maps, weight, grad), r"grad has shape \[3, 2, 2, 5\], expected"),
            (lambda: ops.small_map_conv2d_backward(grad, maps, weight, grad[..., :4]), r"rectified has shape \[4, 2, 2, 4\]")):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("side, kernel", [(1, 3), (2, 1), (2, 3), (2, 5), (3, 3), (3, 5)])
def test_gradcheck(side, kernel):
    tensors = [t.requires_grad_() for t in make(3, 2, 3, side, kernel)[:3]]
    for relu in (False, True):
        assert gradcheck(lambda *t: ops.small_map_conv2d(*t, relu), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    maps, weight, bias, grad = make(4, 6, 5, 2, 3, dtype)
    output = ops.small_map_conv2d(maps, weight, bias, True)
    for given in (maps, maps.transpose(1, 2)):
        torch.library.opcheck(ops.small_map_conv2d.default, (given.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), True))
    detached = [t.detach() for t in (grad, maps, weight)]
    torch.library.opcheck(ops.small_map_conv2d_backward.default, (*detached, output))
    torch.library.opcheck(ops.small_map_conv2d_backward.default, (*detached, None))


def test_no_second_derivative():
    maps, weight, bias, _ = (t.requires_grad_() for t in make(2, 3, 4, 2, 3))
    gradient, = torch.autograd.grad(ops.small_map_conv2d(maps, weight, bias, False).square().sum(), maps, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


# ---- the layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (2, 3), (4, 4)], ids=str)
def test_layer_is_the_convolution_on_any_maps(shape, relu):
    torch.manual_seed(1)
    layer = caps.SmallMapConv2d(6, 5, 3, relu).double()
    maps = torch.randn(4, 6, *shape, dtype=torch.float64, requires_grad=True)
    tensors = [maps, layer.weight, layer.bias]
    found, expected = layer(maps), torch.nn.Conv2d.forward(layer, maps)
    expected = F.relu(expected) if relu else expected
    grad = torch.randn_like(expected)
    assert_near([found, *torch.autograd.grad(found, tensors, grad)],
                [expected, *torch.autograd.grad(expected, tensors, grad)], 1e-12)


def test_layer_under_autocast_in_half_precision_and_without_the_library(monkeypatch):
    layer, maps = caps.SmallMapConv2d(6, 5, 3, relu=True), torch.randn(4, 6, 2, 2)
    expected = layer(maps)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(maps).dtype == torch.float32 and torch.equal(layer(maps), expected)
    half = layer.bfloat16()(maps.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), expected, atol=0.05)
    monkeypatch.setattr(caps, "_BACKEND", "torch")
    monkeypatch.setattr(ops, "small_map_conv2d", None)
    torch.testing.assert_close(layer.float()(maps), expected, atol=0.05, rtol=0)


def test_layer_lets_others_change_its_output_in_place():
    layer, maps = caps.SmallMapConv2d(6, 5, 3), torch.randn(2, 6, 2, 2)
    gradients = [torch.autograd.grad(relu(layer(maps)).square().sum(), layer.weight)[0] for relu in (torch.relu, torch.relu_)]
    assert torch.equal(*gradients)


def test_transforms_of_torch_func_take_the_plain_way():
    layer, (maps, direction) = caps.SmallMapConv2d(4, 4, 3).double(), torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    for function in (layer, caps.squash):
        _, tangent = torch.func.jvp(function, (maps,), (direction,))
        expected = (function(maps + 1e-6 * direction) - function(maps - 1e-6 * direction)) / 2e-6
        torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)
    capsules, weight = torch.randn(2, 5, 8), torch.randn(5, 3, 4, 8)

    def score(u, w):
        return caps.capsule_linear(u[None], w).square().sum()
    each = torch.vmap(torch.func.grad(score, 1), (0, None))(capsules, weight)  # a gradient for each sample
    for found, u in zip(each, capsules):
        w = weight.clone().requires_grad_()
        torch.testing.assert_close(found, torch.autograd.grad(score(u, w), w)[0], rtol=1e-4, atol=1e-6)


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="kernel_size is 4, expected an odd number"):
        caps.SmallMapConv2d(4, 4, 4)


@pytest.mark.parametrize("channels, size", [(1, 28), (1, 41), (3, 28)])
def test_patch_convolution_is_the_convolution(channels, size):
    layer = caps.PatchConv2d(channels, 8, 11, stride=4, padding=2).double()
    images = torch.randn(3, channels, size, size + 3, dtype=torch.float64, requires_grad=True)
    tensors = [images, layer.weight, layer.bias]
    found, expected = layer(images), torch.nn.Conv2d.forward(layer, images)
    grad = torch.randn_like(expected)
    assert_near([found, *torch.autograd.grad(found, tensors, grad)],
                [expected, *torch.autograd.grad(expected, tensors, grad)], 1e-12)


@pytest.mark.parametrize("size", [16, 28, 32])  # maps of 1×1, 2×2, 3×3
def test_model_compiles_with_its_small_maps(size):
    model, images = caps.AlexCapsNet(image=(1, size, size)), torch.rand(4, 1, size, size)
    expected = model(images)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), expected, atol=1e-5, rtol=1e-4)
