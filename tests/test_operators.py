"""The native operators on the CPU, their autograd, and the models' fast layers, against plain PyTorch."""
import os
import shutil
import subprocess
import sys

import pytest
import torch
from common import ROOT
from torch.autograd import gradcheck

import caps
from caps.csrc import extension

SANITIZED = bool(os.environ.get("CAPS_TEST_SANITIZED"))
if SANITIZED:
    extension.FLAGS[:] = ["-O1", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ops = torch.ops.caps
pytestmark = pytest.mark.usefixtures("native")


def make(B, N, K, J, D, dtype=torch.float64, scale=0.3):
    generator = torch.Generator().manual_seed(B + 7 * N + 31 * K + 101 * J + 307 * D)
    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return normal(B, N, K), scale * normal(N, J, D, K), normal(B, J, D)


def run(function, tensors, grad, backend, **options):
    """[output, *gradients] of function(*tensors)."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves, backend=backend, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def difference(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def assert_near(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.numel() == 0 or difference(a, e) < tolerance, difference(a, e)


# B N K J D: the lanes of a vector partly and just filled, one capsule, one dimension, the models' K and D and others
SIZES = [(1, 1, 1, 1, 1), (2, 40, 8, 10, 16), (4, 5, 8, 10, 16), (16, 16, 16, 16, 16), (17, 37, 8, 10, 16),
         (33, 64, 8, 3, 16), (5, 7, 3, 4, 5), (20, 50, 12, 7, 20), (40, 9, 33, 3, 6), (19, 130, 4, 100, 8),
         (18, 33, 8, 1, 16), (3, 150, 8, 10, 16), (129, 3, 2, 2, 3), (6, 9, 8, 10, 16), (11, 6, 16, 2, 16),
         (7, 5, 8, 3, 24)]


@pytest.mark.parametrize("iterations", [3] if SANITIZED else [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_operators_equal_reference(sizes, iterations):
    u, w, grad = make(*sizes)
    votes = torch.einsum("njdk,bnk->bnjd", w, u)
    for function, tensors in ((caps.capsule_linear, (u, w)), (caps.routing, (votes,))):
        expected = run(function, tensors, grad, "torch", iterations=iterations)
        assert_near(run(function, tensors, grad, "native", iterations=iterations), expected, 1e-12)
        single = [t.float() for t in tensors]
        exact = run(function, [t.double() for t in single], grad.float().double(), "torch", iterations=iterations)
        assert_near(run(function, single, grad.float(), "native", iterations=iterations), exact, 1e-5)


@pytest.mark.parametrize("shape", [(5,), (7, 1), (100, 8), (3, 33, 16), (2, 5, 31), (0, 8), (4, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_squash(shape, dtype):
    s = torch.randn(shape, dtype=torch.float64).to(dtype)
    grad = torch.randn_like(s)
    expected = run(caps.squash, [s.double()], grad.double(), "torch")
    assert_near(run(caps.squash, [s], grad, "native"), expected, 1e-6 if dtype == torch.float32 else 1e-14)


def test_operators_squash_along_another_dimension():
    s, grad = torch.randn(4, 8, 6, dtype=torch.float64), torch.randn(4, 8, 6, dtype=torch.float64)
    assert_near(run(caps.squash, [s], grad, "native", dim=1), run(caps.squash, [s], grad, "torch", dim=1), 1e-14)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1e-4, 1.0, 1e4, 1e18, 1e30])
def test_operators_squash_range(size, backend):
    s = torch.full((3, 8), size)
    n = size * 8 ** 0.5
    output, gradient = run(caps.squash, [s], torch.ones(3, 8), backend)
    exact = run(caps.squash, [s.double()], torch.ones(3, 8).double(), "torch")
    assert output.isfinite().all() and gradient.isfinite().all()
    if backend == "native" or 1e-15 < n < 1e15:
        assert torch.allclose(output.double(), exact[0], rtol=1e-5, atol=1e-44)
        assert torch.allclose(gradient.double(), exact[1], rtol=1e-5, atol=1e-44 + 1e-6 * exact[0].abs().max() / max(n, 1e-40))


@pytest.mark.parametrize("B", [1, 5, 20])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4])
def test_operators_extreme_inputs(B, scale):
    u, w, grad = make(B, 30, 8, 10, 16, torch.float32)
    for tensors in ((u * scale, w), (u, w * scale)):
        exact = run(caps.capsule_linear, [t.double() for t in tensors], grad.double(), "torch")
        actual = run(caps.capsule_linear, tensors, grad, "native")
        assert all(a.isfinite().all() for a in actual)
        if scale < 1:
            assert_near(actual, exact, 1e-4)
        else:
            assert difference(actual[0], exact[0]) < 1e-4


@pytest.mark.parametrize("B", [1, 2, 5, 40])
def test_operators_keep_nan_in_its_sample(B):
    u, w, grad = make(B, 37, 8, 10, 16, torch.float32)
    clean = run(caps.capsule_linear, (u, w), grad, "native")
    votes = torch.einsum("njdk,bnk->bnjd", w, u)
    clean_votes = run(caps.routing, (votes,), grad, "native")
    bad = B // 2
    others = [b for b in range(B) if b != bad]
    payload = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN all of whose bits are set
    for value in (float("nan"), payload, float("inf")):
        u_bad, votes_bad = u.clone(), votes.clone()
        u_bad[bad, 3, 2] = votes_bad[bad, 3, 2, 1] = value
        for dirty, reference in ((run(caps.capsule_linear, (u_bad, w), grad, "native"), clean),
                                 (run(caps.routing, (votes_bad,), grad, "native"), clean_votes)):
            nan = dirty[0][bad].isnan()  # the softmax carries a NaN to all output capsules
            assert (nan.any() if value == float("inf") else nan.all()) and dirty[1][bad].isnan().any()
            assert torch.equal(dirty[0][others], reference[0][others])
            assert torch.equal(dirty[1][others], reference[1][others])


def test_operators_keep_samples_apart():
    u, w, grad = make(37, 50, 8, 10, 16)
    together = run(caps.capsule_linear, (u, w), grad, "native")
    for b in (0, 15, 16, 36):
        alone = run(caps.capsule_linear, (u[b:b + 1], w), grad[b:b + 1], "native")
        assert_near(alone[:2], [t[b:b + 1] for t in together[:2]], 1e-12)


def test_operators_empty():
    for B, N, J, D, K in ((0, 5, 3, 4, 8), (2, 0, 3, 4, 8), (20, 0, 3, 4, 8), (5, 6, 3, 4, 0), (5, 6, 3, 0, 8), (5, 6, 0, 4, 8)):
        u, w, grad = make(B, N, K, J, D)
        actual = run(caps.capsule_linear, (u, w), grad, "native")
        assert [a.shape for a in actual] == [(B, J, D), u.shape, w.shape]
        assert all((a == 0).all() for a in actual)
        output, gradient = run(caps.routing, (torch.zeros(B, N, J, D),), grad.float(), "native")
        assert output.shape == (B, J, D) and (output == 0).all() and gradient.shape == (B, N, J, D)


@pytest.mark.parametrize("B", [2, 20])
def test_operators_noncontiguous(B):
    u, w, grad = make(B, 12, 8, 10, 16)
    strided = u.transpose(0, 1).contiguous().transpose(0, 1), w.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    leaves = [t.requires_grad_() for t in strided]
    output = caps.capsule_linear(*leaves, backend="native")
    gradients = torch.autograd.grad(output, leaves, grad.transpose(0, 1).contiguous().transpose(0, 1))
    assert_near([output.detach(), *gradients], run(caps.capsule_linear, (u, w), grad, "native"), 1e-15)
    wide = torch.randn(6, 40, dtype=torch.float64)[:, ::5]
    assert torch.equal(caps.squash(wide, backend="native"), caps.squash(wide.contiguous(), backend="native"))


@pytest.mark.parametrize("sizes", [(2, 700, 8, 10, 16), (40, 300, 8, 10, 16), (33, 50, 5, 7, 12)], ids=str)
def test_operators_bitwise_equal_for_any_number_of_threads(sizes):
    u, w, grad = make(*sizes, torch.float32)
    votes, before, results = torch.einsum("njdk,bnk->bnjd", w, u), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2, 8):
            torch.set_num_threads(threads)
            results.append(run(caps.capsule_linear, (u, w), grad, "native") + run(caps.routing, (votes,), grad, "native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_operators_name_the_wrong_argument():
    u, w, grad = make(4, 6, 8, 3, 5, torch.float32)
    votes, sums = torch.zeros(4, 6, 3, 5), torch.zeros(2, 4, 3, 5)
    for call, message in (
            (lambda: ops.capsule_linear(u[0], w, 3), r"inputs has shape \[6, 8\], expected \[B, N, K\]"),
            (lambda: ops.capsule_linear(u, w[:5], 3), r"weight has shape \[5, 3, 5, 8\], expected \[N, J, D, K\] = \[6, any, any, 8\]"),
            (lambda: ops.capsule_linear(u, w.double(), 3), "weight has dtype Double, expected that of inputs, Float"),
            (lambda: ops.capsule_linear(u.long(), w, 3), "inputs has dtype Long, expected Float"),
            (lambda: ops.capsule_linear(u, w, 0), "iterations is 0, expected at least 1"),
            (lambda: ops.capsule_linear_backward(grad[:, :2], u, w, sums), r"grad has shape \[4, 2, 5\]"),
            (lambda: ops.capsule_linear_backward(grad, u, w, sums[:, :3]), r"sums has shape \[2, 3, 3, 5\]"),
            (lambda: ops.capsule_linear_backward(grad, u, w, sums[:0]), "iterations is 0"),
            (lambda: ops.routing(votes[0], 3), r"votes has shape \[6, 3, 5\], expected \[B, N, J, D\]"),
            (lambda: ops.routing_backward(grad.double(), votes, sums), "grad has dtype Double"),
            (lambda: ops.squash(u.half()), "s has dtype Half"),
            (lambda: ops.squash(torch.tensor(1.0)), "s has no dimension"),
            (lambda: ops.squash_backward(grad, u), r"grad has shape \[4, 3, 5\], expected that of s, \[4, 6, 8\]")):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_functions_name_the_wrong_argument(backend):
    u, w, _ = make(4, 6, 8, 3, 5, torch.float32)
    for arguments, error, message in (
            ((u[0], w), ValueError, r"inputs has shape \[6, 8\], expected \[B, N, K\]"),
            ((u, w[..., :7]), ValueError, r"weight has shape \[6, 3, 5, 7\], expected \[N = 6, J, D, K = 8\]"),
            ((u, w.double()), TypeError, "weight has dtype torch.float64, expected that of inputs, torch.float32"),
            ((u.long(), w), TypeError, "inputs has dtype torch.int64, expected a floating"),
            ((u, w.to("meta")), ValueError, "weight is on meta, expected the device of inputs, cpu"),
            ((u, w, 0), ValueError, "iterations is 0, expected at least 1")):
        with pytest.raises(error, match=message):
            caps.capsule_linear(*arguments, backend=backend)
    with pytest.raises(ValueError, match="backend is 'cuda', expected"):
        caps.squash(u, backend="cuda")


@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (1, 3, 2, 2, 3), (5, 3, 2, 1, 4), (9, 3, 1, 3, 2), (5, 1, 8, 1, 16)], ids=str)
def test_gradcheck(sizes, iterations):
    u, w, _ = make(*sizes, scale=1)
    votes = torch.einsum("njdk,bnk->bnjd", w, u)
    assert gradcheck(lambda *t: caps.capsule_linear(*t, iterations, "native"), (u.requires_grad_(), w.requires_grad_()))
    assert gradcheck(lambda t: caps.routing(t, iterations, "native"), votes.requires_grad_())
    assert gradcheck(lambda t: caps.squash(t, backend="native"), u)


@pytest.mark.parametrize("sizes", [(1, 6, 8, 3, 4), (5, 6, 8, 3, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(sizes, dtype):
    u, w, grad = (t.requires_grad_() for t in make(*sizes, dtype))
    votes = torch.einsum("njdk,bnk->bnjd", w, u).detach().requires_grad_()
    sums = ops.capsule_linear(u, w, 3)[1].detach()
    for operator, arguments in ((ops.squash, (u,)), (ops.capsule_linear, (u, w, 3)), (ops.routing, (votes, 3)),
                                (ops.squash, (u.detach().transpose(0, 1).requires_grad_(),))):
        torch.library.opcheck(operator.default, arguments)
    detached = [t.detach() for t in (grad, u, w, votes)]
    torch.library.opcheck(ops.squash_backward.default, (detached[1], detached[1]))
    torch.library.opcheck(ops.capsule_linear_backward.default, (*detached[:3], sums))
    torch.library.opcheck(ops.routing_backward.default, (detached[0], detached[3], sums))


def test_sums_have_no_gradient():
    u, w, _ = make(3, 4, 8, 3, 4)
    assert not ops.capsule_linear(u.requires_grad_(), w, 3)[1].requires_grad
    assert not ops.routing(torch.zeros(1, 2, 3, 4, requires_grad=True), 3)[1].requires_grad


def test_double_backward_is_refused():
    u, w, _ = make(3, 4, 8, 3, 4)
    output = caps.capsule_linear(u.requires_grad_(), w.requires_grad_(), backend="native")
    gradient, = torch.autograd.grad(output.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = caps.CapsuleLayer(30, 8, 10, 16)

    def forward(self, x):
        return caps.lengths(self.layer(caps.squash(x)))


def test_compile_and_export():
    model, x = Model(), torch.randn(6, 30, 8)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-6)
    expected.sum().backward()
    gradient, model.layer.weight.grad = model.layer.weight.grad, None
    compiled(x).sum().backward()
    assert torch.allclose(model.layer.weight.grad, gradient, atol=1e-6)
    program = torch.export.export(model, (x,))
    assert "caps.capsule_linear" in str(program.graph) and torch.allclose(program.module()(x), expected)


def test_layer_learns_on_either_backend_alike():
    losses = {}
    for name in ("native", "torch"):
        torch.manual_seed(0)
        layer = caps.CapsuleLayer(30, 8, 10, 16)
        x, target = torch.randn(64, 30, 8), torch.nn.functional.one_hot(torch.arange(64) % 10, 10)
        optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
        losses[name] = []
        for _ in range(50):
            loss = (caps.lengths(caps.capsule_linear(x, layer.weight, backend=name)) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["native"] == pytest.approx(losses["torch"], rel=1e-3) and losses["native"][-1] < losses["native"][0] / 2


@pytest.mark.parametrize("model", [caps.AlexCapsNet, caps.ResCapsNet])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-2)])
def test_fast_layers_equal_plain_ones(model, dtype, tolerance):
    import bench_training
    results = []
    for change in (lambda net: net, bench_training.plain_layers):
        torch.manual_seed(1)
        net, images = change(model().to(dtype)), torch.rand(3, 1, 28, 28, dtype=dtype, requires_grad=True)
        output = net(images)
        grads = torch.autograd.grad(output, [images, *net.parameters()], torch.randn_like(output))
        results.append([output.detach(), *grads, *(b for b in net.buffers() if b.is_floating_point())])
    for fast, plain in zip(*results, strict=True):  # in float32 roundings flip some ReLUs; a bias before BN has gradient 0
        assert fast.shape == plain.shape and (fast - plain).norm() < tolerance * (1 + plain.norm())


def test_training_curve_of_the_fast_path_is_the_plain_one():
    import bench_training
    data = caps.load_data("mnist5k", "")
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))[:200 * 8].split(8)
    curves = []
    for change, fused in ((lambda net: net, True), (bench_training.plain_layers, False)):
        torch.manual_seed(0)
        net = change(caps.AlexCapsNet().double())
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused)
        curves.append([])
        for part in order:
            scores = caps.lengths(net(caps.to_float(data.train_images[part]).double()))
            loss = caps.margin_loss(scores, data.train_labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert sum(curves[0][-20:]) < 0.8 * sum(curves[0][:20])


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_routed_in_float32(backend, dtype):
    u, w, _ = make(5, 30, 8, 10, 16, dtype)
    expected = caps.capsule_linear(u.float(), w.float(), backend="torch")
    output = caps.capsule_linear(u, w, backend=backend)
    assert output.dtype == dtype and torch.allclose(output.float(), expected, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = caps.capsule_linear(u, w.float(), backend=backend)
        assert output.dtype == torch.float32 and torch.allclose(output, expected, atol=1e-6)
        assert caps.squash(u, backend=backend).dtype == torch.float32
        if backend == "native":
            assert ops.capsule_linear(u, w, 3)[0].dtype == ops.squash(u).dtype == torch.float32


def test_lengths_have_a_finite_gradient_at_zero():
    v = torch.zeros(2, 3, 4, requires_grad=True)
    caps.lengths(v).sum().backward()
    assert torch.equal(v.grad, torch.zeros(2, 3, 4))


def test_peak_memory():
    import bench_operators
    memory = bench_operators.peak_memory("native", "cpu", 128, 1296, backward=True)
    assert memory < 36 * 2 ** 20, f"{memory / 2 ** 20:.1f} MiB"


@pytest.mark.sanitizer
@pytest.mark.skipif(SANITIZED, reason="runs inside itself")
def test_operators_under_sanitizers(tmp_path):
    libraries = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
                 for name in ("libasan.so", "libubsan.so")] if shutil.which("g++") else []
    if not libraries or not all(os.path.isabs(path) for path in libraries):
        pytest.skip("no sanitizer libraries")
    environment = {**os.environ, "CAPS_TEST_SANITIZED": "1", "CAPS_CACHE": str(tmp_path), "LD_PRELOAD": ":".join(libraries),
                   "ASAN_OPTIONS": "detect_leaks=0", "CXX": "g++"}
    files = [__file__, str(ROOT / "tests" / "test_small_maps.py")]
    result = subprocess.run([sys.executable, "-m", "pytest", "-x", "-s", "-q", *files, "-k", "operators_ and not name_the"],
                            env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
