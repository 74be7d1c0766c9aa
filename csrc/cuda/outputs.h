// The kernels between the passes, a few threads per output capsule (b, j): sums of the shares of all chunks, squash,
// and its gradient. Builds on warp.h.
#pragma once

#include "warp.h"

#include <math.h>

namespace caps::cuda {

// ---- threads of an output capsule -----------------------------------------------------------------------------------

// `width` threads side by side walk over d; `slices` of them share the chunks of a sum.
struct Spread {
  static constexpr int threads = 256;
  int width = 1, slices = 1;
  int64_t capsules;
  int D;

  Spread(int64_t capsules, int64_t D_, int64_t chunks) : capsules(capsules), D(D_) {
    while (width < D && width < 32)  // at most a warp, which sums over d by shuffles
      width *= 2;
    while (slices < chunks && slices * width < threads)
      slices *= 2;
  }
  int64_t blocks() const {
    const int per_block = threads / (width * slices);
    return (capsules + per_block - 1) / per_block;
  }
};

// One capsule as its threads see it: from + d for d in lane, lane + width, … < D; D = 0 for a thread without one.
struct Capsule {
  int lane, width, D, slice;
  int64_t from;

  __device__ explicit Capsule(const Spread& n) {
    const int64_t index = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / (n.width * n.slices);
    lane = threadIdx.x % n.width, width = n.width, slice = threadIdx.x / n.width % n.slices;
    D = index < n.capsules ? n.D : 0;
    from = index * n.D;
  }
};

// ---- what they do together ------------------------------------------------------------------------------------------

template <class Real>
__device__ Real norm(const Capsule& at, const Real* s) {
  Real largest = 0, sum = 0;
  for (int d = at.lane; d < at.D; d += at.width)
    largest = fmax(largest, fabs(s[at.from + d]));
  const Real scale = norm_scale(max_across(largest, at.width));
  for (int d = at.lane; d < at.D; d += at.width)
    sum += scale * s[at.from + d] * (scale * s[at.from + d]);
  return sqrt(sum_across(sum, at.width)) / scale;
}

// gs = f (g + q e (e·g)), see caps.h.
template <class Real>
__device__ void squash_transposed(const Capsule& at, const Real* s, const Real* g, Real* gs) {
  const Real n = norm(at, s), f = squash_factor(n), q = squash_slope(n);
  const auto e = [&](int d) { return n > 0 ? s[at.from + d] / n : 0; };
  Real dot = 0;
  for (int d = at.lane; d < at.D; d += at.width)
    dot += e(d) * g[at.from + d];
  dot = sum_across(dot, at.width);
  if (at.slice == 0)
    for (int d = at.lane; d < at.D; d += at.width)
      gs[at.from + d] = f * (g[at.from + d] + q * e(d) * dot);
}

// The sum of all chunks' shares, added to `total` or put there.
template <class Real>
__device__ void add_shares(const Capsule& at, const Spread& n, const Real* shares, int64_t chunks, bool add,
                           Real* total) {
  CAPS_SHARED(memory);
  Real* const parts = reinterpret_cast<Real*>(memory);
  const int own = threadIdx.x;
  for (int d0 = 0; d0 < n.D; d0 += n.width) {
    const int d = d0 + at.lane;
    Real sum = 0;
    if (d < at.D)
#pragma unroll 8
      for (int64_t c = at.slice; c < chunks; c += n.slices)
        sum += shares[c * n.capsules * n.D + at.from + d];
    parts[own] = sum;
    __syncthreads();
    if (at.slice == 0 && d < at.D) {
      sum = add ? total[at.from + d] : 0;
      for (int slice = 0; slice < n.slices; ++slice)
        sum += parts[own + slice * n.width];
      total[at.from + d] = sum;
    }
    __syncthreads();
  }
}

// ---- the kernels ----------------------------------------------------------------------------------------------------

// After a pass of an iteration: s = Σ shares, v = squash(s), V += v.
template <class Real>
__global__ void advance(const Spread n, const Real* shares, int64_t chunks, bool first, Real* s, Real* v, Real* V) {
  const Capsule at(n);
  add_shares(at, n, shares, chunks, false, s);
  const Real f = squash_factor(norm(at, s));
  if (at.slice == 0)
    for (int d = at.lane; d < at.D; d += at.width) {
      v[at.from + d] = f * s[at.from + d];
      V[at.from + d] = first ? v[at.from + d] : V[at.from + d] + v[at.from + d];
    }
}

// After a backward pass: g += Σ shares, gs = squash'(s)ᵀ g.
template <class Real>
__global__ void retreat(const Spread n, const Real* shares, int64_t chunks, bool first, const Real* s, Real* g,
                        Real* gs) {
  const Capsule at(n);
  add_shares(at, n, shares, chunks, !first, g);
  squash_transposed(at, s, g, gs);
}

// Before the first backward pass: V [T - 1, B, J, D] and gs^T.
template <class Real>
__global__ void prepare(const Spread n, int64_t T, const Real* sums, const Real* grad, Real* V, Real* gs) {
  const Capsule at(n);
  const int64_t size = n.capsules * n.D;
  for (int64_t t = 1; t < T; ++t, sums += size, V += size, gs += size) {
    const Real f = squash_factor(norm(at, sums));
    for (int d = at.lane; d < at.D; d += at.width)
      V[at.from + d] = f * sums[at.from + d] + (t > 1 ? V[at.from + d - size] : 0);
  }
  squash_transposed(at, sums, grad, gs);
}

template <class Real>
__global__ void squash_kernel(const Spread n, const Real* s, Real* v) {
  const Capsule at(n);
  const Real f = squash_factor(norm(at, s));
  for (int d = at.lane; d < at.D; d += at.width)
    v[at.from + d] = f * s[at.from + d];
}

template <class Real>
__global__ void squash_backward_kernel(const Spread n, const Real* g, const Real* s, Real* gs) {
  squash_transposed(Capsule(n), s, g, gs);
}

template <class Real>
__global__ void add_splits(const Real* parts, int64_t splits, int64_t size, Real* sum) {
  const int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e < size) {
    Real total = 0;
    for (int64_t split = 0; split < splits; ++split)
      total += parts[split * size + e];
    sum[e] = total;
  }
}

}  // namespace caps::cuda
