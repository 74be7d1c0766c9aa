// How many threads, samples and numbers a block has: at the models' sizes constants, else from the arguments; and where
// its arrays lie in shared memory.
#pragma once

#include "runtime.h"

#include <algorithm>

namespace caps::cuda {

// ---- how a block's threads share the work ---------------------------------------------------------------------------
//
// A group is `rows` components d of one j. `lanes` threads side by side take one group each, for `samples` samples;
// `teams` of them make a tile of samples; `slots` rounds cover all groups. W comes in pieces of `depth` of the K
// components, read `step` numbers at a time. `pitch` and `stride` are padded against bank conflicts: else
// a warp's 8 lanes would read W from the same banks, and 4 or 8 of its threads would copy u to the same.

constexpr int rows = 4;

// Numbers in 16 bytes, which a thread loads, stores or copies at once.
template <class Real>
constexpr int pack = 16 / sizeof(Real);

template <class Real, int size = pack<Real>>
struct alignas(size * sizeof(Real)) Pack {
  Real at[size];
};

template <class Real, int samples_>
struct ModelSizes {
  static constexpr bool fixed = true;
  static constexpr int K = 8, J = 10, D = 16, J_D = J * D;
  static constexpr int per_j = D / rows, groups = J * per_j, lanes = groups, slots = 1;
  static constexpr int samples = samples_, teams = 4, tile = samples * teams, stride = tile + pack<Real>;
  static constexpr int depth = K, step = pack<Real> / 2, pitch = rows * depth + pack<Real>;
  static constexpr int threads = lanes * teams, max_threads = threads;
};

template <class Real>
struct AnySizes {
  static constexpr bool fixed = false;
  static constexpr int samples = pack<Real>, max_threads = 256;
  static constexpr int depth = 32 / sizeof(Real), step = 1, pitch = rows * depth + 1;
  int K, J, D, J_D, per_j, groups, lanes, slots, teams, tile, stride, threads;

  explicit AnySizes(const Sizes& n) : K(n.K), J(n.J), D(n.D), J_D(J * D) {
    per_j = (D + rows - 1) / rows;
    groups = J * per_j;
    lanes = std::min(groups, max_threads);
    slots = (groups + lanes - 1) / lanes;
    teams = std::min(max_threads / lanes, 8);
    tile = samples * teams;
    stride = tile + (teams > 1 ? pack<Real> : 0);
    threads = (lanes * teams + 31) / 32 * 32;  // shuffles are of whole warps
  }
};

// Blocks that are to share a multiprocessor: as many as their registers allow. Of 160 threads each, three leave 128
// registers to a thread and two leave 168. The backward pass holds gs besides V: in 128 it would spill 256 bytes a
// thread, not 60 (float32, sm_90).
template <class Shape, class Real>
constexpr int resident(bool backward) {
  return Shape::fixed && sizeof(Real) == 4 && !backward ? 3 : 2;
}

// ---- scratch --------------------------------------------------------------------------------------------------------

// Where a block's arrays begin, counted in numbers: first the two pieces, always in shared memory, then the rest.
struct Scratch {
  int inputs_at, piece;
  int64_t kept, result, logits, agreement, coupling, change, partial, size;

  template <class Shape>
  __host__ __device__ Scratch(const Shape& z, bool recompute, bool backward, bool gradients) {
    inputs_at = (z.lanes * z.pitch + 3) / 4 * 4;        // a multiple of 16 bytes, as load() expects
    piece = recompute ? inputs_at + z.depth * z.stride : 0;
    const int64_t parts = int64_t(z.groups) * z.stride, per_capsule = int64_t(z.J) * z.stride;
    const int64_t fragments = z.fixed ? 0 : rows * parts;
    kept = 0;                                           // û
    result = kept + fragments;                          // the share of s, or gû
    logits = result + fragments;                        // a number per group: û·V
    agreement = logits + parts;                         // and û·gs
    coupling = agreement + (backward ? parts : 0);      // c
    change = coupling + per_capsule;                    // h
    partial = change + (backward ? per_capsule : 0);    // the parts of gu
    size = partial + (gradients && recompute ? int64_t(z.threads) * (z.fixed ? z.samples : z.tile) : 0);
  }
};

}  // namespace caps::cuda
