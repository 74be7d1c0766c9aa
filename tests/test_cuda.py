"""The CUDA operators against a float64 reference: on a GPU where there is one, and everywhere the same source through
tests/cuda_shim.h, which runs the kernels' blocks and threads on the CPU."""

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.float64]
# B, N, K, J, D, T; K = 8 and D = 16 have kernels of their own, for J up to 112
MODEL = [(1, 1, 8, 10, 16, 1), (3, 5, 8, 10, 16, 3), (33, 19, 8, 10, 16, 2), (17, 3, 8, 10, 16, 4), (37, 3, 8, 3, 16, 3),
         (19, 4, 8, 17, 16, 3), (11, 3, 8, 33, 16, 3), (9, 3, 8, 65, 16, 3), (5, 2, 8, 112, 16, 2), (5, 2, 8, 113, 16, 2)]
OTHER = [(1, 1, 1, 1, 1, 1), (1, 7, 8, 1, 16, 3), (5, 3, 9, 3, 7, 2), (2, 37, 4, 10, 16, 3), (70, 9, 4, 2, 4, 3),
         (7, 2, 17, 5, 33, 4), (2, 2, 300, 2, 3, 2), (3, 2, 3, 150, 9, 3), (2, 1, 5, 7, 1, 3), (2, 40, 3, 2, 70, 2),
         (5, 3, 16, 62, 16, 2), (3, 2, 12, 20, 10, 3), (2, 2, 8, 64, 32, 2), (2, 2, 2, 400, 4, 2)]


def squash(s):
    n = s.norm(dim=-1, keepdim=True)
    return s * n / (1 + n * n)


def reference(votes, iterations):
    logits, sums = torch.zeros_like(votes[..., 0]), []
    for _ in range(iterations):
        sums.append((logits.softmax(2)[..., None] * votes).sum(1))
        v = squash(sums[-1])
        logits = logits + (votes * v[:, None]).sum(-1)
    return v, torch.stack(sums)


def gradients(function, arguments, grad):
    """Output, sums, and gradients of all arguments, in float64."""
    arguments = [a.double().requires_grad_() for a in arguments]
    v, sums = function(*arguments)
    return [v.detach(), sums.detach(), *torch.autograd.grad(v, arguments, grad.double())]


def expected_linear(inputs, weight, iterations, grad):
    return gradients(lambda u, w: reference(torch.einsum("njdk,bnk->bnjd", w, u), iterations), (inputs, weight), grad)


def expected_routing(votes, iterations, grad):
    return gradients(lambda x: reference(x, iterations), (votes,), grad)


def close(actual, expected, dtype, factor=1):
    tolerance = (1e-5 if dtype == torch.float32 else 1e-12) * factor
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert a.shape == e.shape and a.dtype == dtype
        error = (a.double().cpu() - e.cpu()).norm()
        assert error <= tolerance * e.cpu().norm(), f"relative error {error / e.cpu().norm():.1e}"


def problem(sizes, dtype, seed=0, scale=1.0):
    B, N, K, J, D, T = sizes
    random = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=random).to(dtype)
    return make(B, N, K) * scale, make(N, J, D, K) * 0.3, make(B, N, J, D) * scale, make(B, J, D)


# ---- the two ways of running the source -----------------------------------------------------------------------------


def compile_shim(output, *flags):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    include = pathlib.Path(torch.__file__).parent / "include"
    command = ["g++", "-std=c++20", "-fPIC", "-DCAPS_SHIM", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wall",
               "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-isystem{include}", str(ROOT / "tests/cuda_shim.cpp"),
               "-o", str(output), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


class Shim:
    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.shim_error.restype = ctypes.c_char_p

    def turns(self, order):
        """In which the threads and blocks run: 0 ascending, 1 descending, else the seed of a shuffle."""
        self.library.shim_turns(order)

    def call(self, name, dtype, *arguments):
        arguments = [a if not isinstance(a, torch.Tensor) else ctypes.c_void_p(a.data_ptr()) for a in arguments]
        suffix = "float32" if dtype == torch.float32 else "float64"
        if getattr(self.library, f"{name}_{suffix}")(*arguments):
            raise RuntimeError(self.library.shim_error().decode())

    def run(self, sizes, votes, inputs, weight, grad):
        """Output, sums and gradients; everything that the kernels have to write begins as NaN."""
        B, N, K, J, D, T = sizes
        dtype, nan = grad.dtype, float("nan")
        n = (ctypes.c_int64 * 6)(B, N, K if votes is None else -1, J, D, T)
        v, sums = torch.full((B, J, D), nan, dtype=dtype), torch.full((T, B, J, D), nan, dtype=dtype)
        self.call("forward", dtype, n, votes, inputs, weight, v, sums)
        source, grad_weight = torch.full_like(votes if votes is not None else inputs, nan), None
        if votes is None:
            grad_weight = torch.full_like(weight, nan)
        self.call("backward", dtype, n, votes, inputs, weight, grad, sums, source, grad_weight)
        return [v, sums, source] + ([grad_weight] if votes is None else [])

    def linear(self, inputs, weight, iterations, grad):
        (B, N, K), (_, J, D, _) = inputs.shape, weight.shape
        return self.run((B, N, K, J, D, iterations), None, inputs, weight, grad)

    def routing(self, votes, iterations, grad):
        return self.run((*votes.shape[:2], 0, *votes.shape[2:], iterations), votes, None, None, grad)

    def squash(self, s, grad):
        v, gs = torch.full_like(s, float("nan")), torch.full_like(s, float("nan"))
        vectors, D = ctypes.c_int64(s[..., 0].numel()), ctypes.c_int64(s.shape[-1])
        self.call("squash", s.dtype, vectors, D, s, v)
        self.call("squash_backward", s.dtype, vectors, D, grad, s, gs)
        return [v, gs]


class Gpu:
    """The registered operators."""

    def __init__(self):
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        import caps

        caps.squash(torch.zeros(1, 1, device="cuda"), backend="native")  # loads the library

    def turns(self, order):
        pass

    def linear(self, inputs, weight, iterations, grad):
        inputs, weight, grad = inputs.cuda(), weight.cuda(), grad.cuda()
        v, sums = torch.ops.caps.capsule_linear(inputs, weight, iterations)
        return [v, sums, *torch.ops.caps.capsule_linear_backward(grad, inputs, weight, sums)]

    def routing(self, votes, iterations, grad):
        votes, grad = votes.cuda(), grad.cuda()
        v, sums = torch.ops.caps.routing(votes, iterations)
        return [v, sums, torch.ops.caps.routing_backward(grad, votes, sums)]

    def squash(self, s, grad):
        return [torch.ops.caps.squash(s.cuda()), torch.ops.caps.squash_backward(grad.cuda(), s.cuda())]


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    return Shim(compile_shim(tmp_path_factory.mktemp("shim") / "libshim.so", "-O2", "-shared"))


@pytest.fixture(params=["shim", "gpu"])
def ops(request):
    chosen = request.getfixturevalue("shim") if request.param == "shim" else Gpu()
    chosen.turns(0)
    yield chosen
    chosen.turns(0)


# ---- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", MODEL + OTHER)
def test_linear(ops, sizes, dtype):
    inputs, weight, _, grad = problem(sizes, dtype)
    ops.turns(2)
    close(ops.linear(inputs, weight, sizes[-1], grad), expected_linear(inputs, weight, sizes[-1], grad), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", MODEL + OTHER)
def test_routing(ops, sizes, dtype):
    _, _, votes, grad = problem(sizes, dtype)
    ops.turns(2)
    close(ops.routing(votes, sizes[-1], grad), expected_routing(votes, sizes[-1], grad), dtype)


# A block gets several capsules, or tiles of samples in `gradients`, from 256 pairs of them on.
@pytest.mark.parametrize("sizes", [(3, 300, 8, 3, 16, 2), (70, 60, 8, 3, 16, 3), (17, 150, 8, 20, 16, 2),
                                   (17, 150, 8, 34, 16, 2), (9, 140, 8, 42, 16, 2), (9, 140, 8, 66, 16, 2),
                                   (3, 300, 5, 3, 6, 2), (3, 300, 3, 60, 15, 2)])
def test_blocks_with_several_pieces_of_work(ops, sizes):
    inputs, weight, votes, grad = problem(sizes, torch.float32, scale=0.3)
    ops.turns(3)
    close(ops.linear(inputs, weight, sizes[-1], grad), expected_linear(inputs, weight, sizes[-1], grad), torch.float32)
    if sizes[3] == 3:  # stored votes have no pieces, and blocks of one kind
        close(ops.routing(votes, sizes[-1], grad), expected_routing(votes, sizes[-1], grad), torch.float32)


@pytest.mark.parametrize("first", range(1, 8))
def test_any_number_of_output_capsules(ops, first):
    for J in range(first, 131, 7):
        sizes = (J % 5 + 1, 2, 8, J, 16, 2)
        inputs, weight, votes, grad = problem(sizes, torch.float32)
        close(ops.linear(inputs, weight, 2, grad), expected_linear(inputs, weight, 2, grad), torch.float32)
        close(ops.routing(votes, 2, grad), expected_routing(votes, 2, grad), torch.float32)


@pytest.mark.parametrize("seed", range(30))
def test_random_sizes(ops, seed):
    random = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=random))
    model = seed % 3 == 0
    sizes = (draw(1, 40), draw(1, 25), *((8, draw(1, 40), 16) if model else (draw(1, 20), draw(1, 12), draw(1, 20))), draw(1, 4))
    dtype = DTYPES[seed % 2]
    inputs, weight, votes, grad = problem(sizes, dtype, seed)
    ops.turns(seed)
    close(ops.linear(inputs, weight, sizes[-1], grad), expected_linear(inputs, weight, sizes[-1], grad), dtype)
    close(ops.routing(votes, sizes[-1], grad), expected_routing(votes, sizes[-1], grad), dtype)


@pytest.mark.parametrize("sizes", [(5, 3, 8, 10, 16, 3), (5, 3, 4, 3, 8, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_arrays_have_the_same_results(ops, sizes, dtype):
    inputs, weight, votes, grad = problem(sizes, dtype)
    shift = lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    for aligned, unaligned in ((ops.linear(inputs, weight, 3, grad), ops.linear(shift(inputs), shift(weight), 3, grad)),
                               (ops.routing(votes, 3, grad), ops.routing(shift(votes), 3, grad))):
        assert all(torch.equal(a, b) for a, b in zip(aligned, unaligned))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (2, 3, 8), (7, 33), (3, 100), (0, 4)])
def test_squash(ops, shape, dtype):
    s, grad = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    x = s.double().requires_grad_()
    v = squash(x)
    close(ops.squash(s, grad), [v.detach(), *torch.autograd.grad(v, x, grad.double())], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_squash_at_the_edges(ops, dtype):
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 16
    s = torch.tensor([[0, 0], [tiny, 0], [1e-20, 1e-20], [1e4, -1e4], [huge, huge]], dtype=dtype)
    v, gs = (x.cpu() for x in ops.squash(s, torch.ones_like(s)))
    assert v.isfinite().all() and gs.isfinite().all()
    assert (v[0] == 0).all() and (gs[0] == 0).all()
    n = s[2].double().norm()  # v = n s; gs = n (g + e (e·g)) = 2 n along s
    torch.testing.assert_close(gs[2].double(), torch.full((2,), 2 * n, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(v[3:].norm(dim=-1), torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(5, 6, 8, 10, 16, 3), (5, 6, 4, 3, 5, 3)])
@pytest.mark.parametrize("scale", [0.0, 1e4, 1e-20])
def test_zero_huge_tiny(ops, sizes, scale, dtype):
    inputs, weight, votes, grad = problem(sizes, dtype, scale=scale)
    for actual, expected in ((ops.linear(inputs, weight, 3, grad), expected_linear(inputs, weight, 3, grad)),
                             (ops.routing(votes, 3, grad), expected_routing(votes, 3, grad))):
        if scale == 0:
            assert all((x == 0).all() for x in actual)
        elif scale < 1:  # squared in v, far below the smallest float32
            assert all(x.isfinite().all() for x in actual)
            close(actual[1:2], expected[1:2], dtype)
        else:  # a softmax that has all but decided: its rounding errors are as large as the logits'
            close(actual[:2], expected[:2], dtype, 10)
            assert all(x.isfinite().all() for x in actual)


@pytest.mark.parametrize("sizes", [(21, 6, 8, 10, 16, 3), (21, 6, 4, 3, 5, 3)])
def test_nan_stays_in_its_sample(ops, sizes):
    inputs, weight, votes, grad = problem(sizes, torch.float32)
    clean = [ops.linear(inputs, weight, 3, grad), ops.routing(votes, 3, grad)]
    inputs[4, 2, 1] = votes[4, 2, 1, 1] = float("nan")
    others = [b for b in range(sizes[0]) if b != 4]
    for before, after in zip(clean, [ops.linear(inputs, weight, 3, grad), ops.routing(votes, 3, grad)]):
        for index in (0, 2):  # the output, and the gradient of inputs or votes
            assert torch.equal(before[index][others], after[index][others])
            assert after[index][4].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(0, 3, 8, 10, 16, 2), (3, 0, 8, 10, 16, 2), (2, 3, 0, 10, 16, 3), (2, 3, 8, 0, 16, 3),
                                   (2, 3, 8, 10, 0, 3), (0, 0, 4, 3, 2, 3), (0, 2, 4, 3, 2, 1), (2, 3, 0, 4, 5, 1),
                                   (2, 3, 4, 0, 5, 2), (2, 3, 4, 5, 0, 2), (1, 0, 0, 0, 0, 1)])
def test_an_empty_axis_gives_zeros(ops, sizes, dtype):
    inputs, weight, votes, grad = problem(sizes, dtype)
    B, N, K, J, D, T = sizes
    for actual in (ops.linear(inputs, weight, T, grad), *[ops.routing(votes, T, grad)] * (0 in (B, N, J, D))):
        assert all((x == 0).all() for x in actual)
        assert actual[0].shape == (B, J, D) and actual[1].shape == (T, B, J, D)


@pytest.mark.parametrize("sizes", [(37, 20, 8, 10, 16, 3), (9, 11, 5, 7, 6, 3)])
def test_repeats_bit_for_bit(ops, sizes):
    inputs, weight, votes, grad = problem(sizes, torch.float32)
    runs = []
    for order in range(4):
        ops.turns(order)
        runs.append(ops.linear(inputs, weight, 3, grad) + ops.routing(votes, 3, grad))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


# ---- tools ----------------------------------------------------------------------------------------------------------


def test_shim_under_sanitizers(tmp_path):
    program = compile_shim(tmp_path / "shim", "-O1", "-g", "-DCAPS_SHIM_MAIN", "-fsanitize=address,undefined",
                           "-fno-sanitize-recover=all")
    environment = dict(os.environ, ASAN_OPTIONS="detect_stack_use_after_return=0:detect_leaks=0")
    done = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "no finding" in done.stdout, done.stderr


@pytest.mark.parametrize("sizes", [(2, 3, 8, 10, 16, 3), (3, 4, 3, 2, 5, 2), (1, 1, 1, 1, 1, 4)])
def test_gradcheck_on_gpu(sizes):
    Gpu()
    import caps

    inputs, weight, votes, _ = (x.cuda().requires_grad_() for x in problem(sizes, torch.float64))
    T = sizes[-1]
    assert torch.autograd.gradcheck(lambda u, w: caps.capsule_linear(u, w, T, backend="native"), (inputs, weight))
    assert torch.autograd.gradcheck(lambda x: caps.routing(x, T, backend="native"), (votes,))
    assert torch.autograd.gradcheck(lambda x: caps.squash(x, backend="native"), (votes,))


def test_graph_capture_on_gpu():
    gpu = Gpu()
    inputs, weight, votes, grad = (x.cuda() for x in problem((33, 19, 8, 10, 16, 3), torch.float32))
    eager = gpu.linear(inputs, weight, 3, grad) + gpu.routing(votes, 3, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gpu.linear(inputs, weight, 3, grad) + gpu.routing(votes, 3, grad)
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured))


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("model", ["alexcaps", "rescaps"])
def test_training_with_a_step_graph_on_gpu(model, amp, tmp_path):
    """30 steps, and the last 10 of them again from the graph's checkpoint in mid-epoch.

    Only rounding may differ: the graph's learning rate is float32, and cuDNN may choose otherwise. Adam makes whole
    steps out of the rounding of the smallest gradients, unless its eps is above them. Then, on a CPU, the rounded rate
    changed weights by 0.023 of their way (bfloat16) and losses by 0.002 at most; a step left out, by 0.036 and 0.046 at
    least.
    """
    Gpu()
    import caps
    from caps.extras import faster

    def train(*words):
        args = caps.parse(["train", "--model", model, "--dataset", "mnist5k", "--device", "cuda", "--amp", amp,
                           "--ema", "0.9", "--warmup", "1.5", "--checkpoint-every", "20", *words])
        run = caps.start_run(args, caps.start_world("cuda"), faster)
        run.optimizer.param_groups[0]["eps"] = 1e-2
        for part in ("train_images", "train_labels"):  # 400 of each class in order: 14 groups of 32, and one of 20
            setattr(run.data, part, getattr(run.data, part)[::8][:468])
        both = torch.nn.ModuleList([run.model, run.average])
        weights = lambda: torch.cat([p.detach().flatten() for p in both.parameters()])
        states, losses = [weights()], []
        while run.epoch < 2:
            losses.append(caps.train_epoch(run)[0])
            run.history.append({})
            run.position = 0
            run.totals.zero_()
        assert run.steps == 30 and (not run.graph or run.graph.graph)
        return [*states, weights()], losses

    (first, last), losses = train("--out", str(tmp_path / "plain"))
    resume = ["--resume", str(tmp_path / "graph" / "last.pt")]
    for words in (["--out", str(tmp_path / "graph"), "--graph"], resume, [*resume, "--graph"]):
        (_, weights), found = train(*words)
        assert (weights - last).norm() <= 0.03 * (last - first).norm()
        assert found == pytest.approx(losses[-len(found):], rel=0.01)


def test_a_step_that_cannot_be_captured_is_reported_on_gpu(tmp_path):
    Gpu()
    code = """
import caps
loss = caps.margin_loss
def waiting(*arguments):
    result = loss(*arguments)
    result.item()  # waits for the device, which a capture forbids
    return result
caps.margin_loss = waiting
raise SystemExit(caps.main("train --dataset mnist5k --device cuda --amp fp16 --graph --epochs 2 --out run".split()))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # a process of its own: the allocator remembers
    assert done.returncode == 2 and done.stderr.count("--graph: this step cannot be captured") == 1, done.stderr
    assert (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    Gpu()
    if not shutil.which("compute-sanitizer"):
        pytest.skip("no compute-sanitizer")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all",
               sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__,
               "-k", "gpu and (test_linear or test_routing)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
