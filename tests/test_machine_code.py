"""The CUDA kernels as nvcc compiles them, without a GPU: warnings, address spaces, spills, and instructions per vote."""
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from common import ROOT

from caps.csrc import extension

ARCHITECTURES = ("80", "90")


def cuobjdump():
    """From CUDA's folder, or the one that torch's compiler brings along."""
    beside = Path(shutil.which("nvcc") or "").resolve().parent / "cuobjdump"
    try:
        import triton
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    except ImportError:
        bundled = beside
    return next((str(path) for path in (shutil.which("cuobjdump"), beside, bundled) if path and os.access(path, os.X_OK)), None)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(object file, what ptxas said) for all architectures."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    from torch.utils.cpp_extension import include_paths
    library = tmp_path_factory.mktemp("cuda") / "cuda.o"
    command = ["nvcc", "-c", str(ROOT / "csrc" / "cuda" / "operators.cu"), "-o", str(library), "-std=c++20",
               "--threads=2", "-Xptxas=-v",
               "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC",
               *[part for path in include_paths() for part in ("-isystem", path)],
               *extension.compile_arguments([f"sm_{a}" for a in ARCHITECTURES])["nvcc"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return library, done.stderr


@pytest.fixture(scope="module")
def kernels(compiled):
    """{(architecture, mangled name): [(address, operation and operands)]}"""
    if not cuobjdump():
        pytest.skip("no cuobjdump")
    found = {}
    for architecture in ARCHITECTURES:
        text = subprocess.run([cuobjdump(), "-sass", "-arch", f"sm_{architecture}", str(compiled[0])], capture_output=True,
                              text=True, check=True).stdout
        for part in re.split(r"\n\s*Function : ", text)[1:]:
            name, body = part.split("\n", 1)
            found[architecture, name] = [(int(address, 16), operation) for address, operation in
                                         re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", body)]
    return found


def test_spills_are_few(compiled):
    spills = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+).*?(\d+) bytes spill stores, (\d+) bytes spill loads",
                        compiled[1], re.DOTALL)
    assert {architecture for _, architecture, _, _ in spills} == set(ARCHITECTURES) and len(spills) > 80
    assert not [spill for spill in spills if max(map(int, spill[2:])) > 40]


def test_scratch_is_in_shared_memory_for_all_to_see(kernels):
    """LD and ST find out at run time whether an address is in shared memory; LDS, STS, LDG and STG know."""
    for key, code in kernels.items():
        generic = [operation for _, operation in code if re.match(r"(LD|ST|ATOM|RED)[.\s]", operation)]
        assert not generic, (key, generic[:3])
        assert any(operation.startswith(("LDG", "STG")) for _, operation in code), key  # the pattern still fits


# ---- instructions per vote ------------------------------------------------------------------------------------------


def loops(code):
    """[(first, last)] addresses, by the branches that lead back."""
    branches = [(int(target.group(1), 16), address) for address, operation in code
                if (target := re.match(r"BRA\S*\s.*?(0x[0-9a-f]+)", operation))]
    return [branch for branch in branches if branch[0] < branch[1]]


def warp_instructions(code, times):
    """What a warp issues in the loop over the capsules, or over the tiles of samples: the outermost. A loop within it
    counts as often as times(its operations) says."""
    (first, last), *inner = sorted(loops(code), key=lambda loop: loop[0] - loop[1])
    weight = {loop: times([operation for address, operation in code if loop[0] <= address <= loop[1]]) for loop in inner}
    total = 0
    for address, _ in code:
        if first <= address <= last:
            count = 1
            for loop in inner:
                if loop[0] <= address <= loop[1]:
                    count *= weight[loop]
            total += count
    return total


def shapes(kernels, architecture, kind):
    """{most J: (samples, slots, teams, depth, code)} of the models' kernels; kind: route's pass, or "gradients"."""
    pattern = "gradients" if kind == "gradients" else rf"routeILNS\w*_4PassE{kind}E"
    found = {}
    for (built_for, name), code in kernels.items():
        sizes = re.search(rf"{pattern}.*?RecomputedVotes.*?ModelSizesIf((?:Li\d+E)+)", name)
        if built_for == architecture and sizes:
            most, *others = map(int, re.findall(r"\d+", sizes[1]))
            found[most] = (*others, code)
    return found


def instructions_per_vote(found, J, T=3, K=8):
    most = min(m for m in found if m >= J)
    samples, slots, teams, depth, code = found[most]
    warp_lanes, tile, sharers = 32 // teams, samples * teams, 2 ** math.ceil(math.log2(max(1, most / 4)))
    lanes = -(-(-(-4 * J // slots)) // warp_lanes) * warp_lanes
    threads = lanes * teams

    def times(inside):
        text = "\n".join(inside)
        if "BAR" in text:
            return T - 1                      # the iterations, in gradients
        if "LDGSTS" in text:
            return tile * depth / threads     # numbers of u
        if "SHFL" in text and "MUFU" in text:
            return tile * sharers / threads   # threads of the softmax
        if "STG" in text:
            return tile * K / threads         # sums of gu
        return threads / 32 / 4               # within those, over the warps, four at a time
    return warp_instructions(code, times) * (threads // 32) / (tile * J)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_instructions_per_vote(kernels, architecture):
    """Of forward and backward with T = 3: a pass with c = 1 / J, two with couplings, two backward, and the gradients."""
    passes = [(count, shapes(kernels, architecture, kind))
              for kind, count in {"0": 1, "1": 2, "2": 2, "gradients": 1}.items()]
    assert all(len(found) == 8 for _, found in passes)
    total = {J: sum(count * instructions_per_vote(found, J) for count, found in passes) for J in range(2, 101)}
    ratios = {J: total[J] / total[10] for J in total}
    print(f"sm_{architecture}: {total[10]:.0f} warp instructions per (sample, i, j) at J = 10, of which in one pass",
          *[f"{instructions_per_vote(found, 10):.1f}" for _, found in passes], "; times as many at",
          *[f"J = {J}: {ratios[J]:.2f}" for J in (2, 3, 5, 20, 33, 50, 65, 66, 100)])
    # From 65 to 67 the lanes of a block have least to do: 130 groups to a slot, in 5 warps.
    assert not {J: ratio for J, ratio in ratios.items() if ratio > (1.6 if J in (65, 66, 67) else 1.5)}
