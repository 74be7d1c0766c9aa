// Coupling coefficients c = softmax_j(û·V) of a tile of samples, the gradient h of their logits, and what a fragment
// has to do with them. Builds on seats.h and warp.h.
#pragma once

#include "seats.h"
#include "warp.h"

#include <math.h>

namespace caps::cuda {

// ---- a thread's fragment --------------------------------------------------------------------------------------------

// Σ_d û a for all samples of the thread's team. At the models' K and D a j has four lanes, which add up their parts by
// shuffles and write a quarter of the samples each; else a number per group.
template <class Shape, class Real>
__device__ void put_dot(const Seat<Shape>& seat, Real* parts, int slot, const Fragment<Shape, Real>& x,
                        const Fragment<Shape, Real>& a) {
  constexpr int samples = Shape::samples;
  Real dot[samples] = {};
#pragma unroll
  for (int q = 0; q < rows; ++q)
#pragma unroll
    for (int s = 0; s < samples; ++s)
      dot[s] += x.at[q][s] * a.at[q][s];
  if constexpr (Shape::fixed) {
    static_assert(Shape::per_j == 4 && samples % 4 == 0);
    scatter_sums<samples, 2, 1>(dot);
    if (seat.owns(slot))
      store<samples / 4>(dot, parts + seat.j(slot) * Shape::stride + seat.sample() + threadIdx.x % 4 * (samples / 4));
  } else if (seat.owns(slot)) {
    store<samples>(dot, parts + int64_t(seat.group(slot)) * seat.z.stride + seat.sample());
  }
}

template <class Shape, class Real>
__device__ void add_scaled(const Seat<Shape>& seat, const Real* scales, int slot, const Fragment<Shape, Real>& a,
                           Fragment<Shape, Real>& sum) {
  Real scale[Shape::samples];
  load<Shape::samples>(scales + int64_t(seat.j(slot)) * seat.z.stride + seat.sample(), scale);
#pragma unroll
  for (int q = 0; q < rows; ++q)
#pragma unroll
    for (int s = 0; s < Shape::samples; ++s)
      sum.at[q][s] += scale[s] * a.at[q][s];
}

// ---- softmax over J, by a few threads a sample ----------------------------------------------------------------------
//
// `sharers` threads side by side share a sample's softmax: one of them has j, j + sharers, …

// Its numbers: in registers, or where they end up.
template <class Shape, class Real>
struct PerCapsule {
  Real* array;
  int stride;
  Real own[Shape::own];

  __device__ PerCapsule(Real* array, int stride) : array(array), stride(stride) {}
  __device__ Real& at(int j, int m) {
    if constexpr (Shape::fixed)
      return own[m];
    else
      return array[int64_t(j) * stride];
  }
};

template <class Shape, class F>
__device__ void each_capsule(const Shape& z, int first, int J, F&& f) {
  if constexpr (Shape::fixed) {
#pragma unroll
    for (int m = 0; m < Shape::own; ++m)
      if (first + m * z.sharers < J)
        f(first + m * z.sharers, m);
  } else {
    for (int j = first; j < J; j += z.sharers)
      f(j, 0);
  }
}

// c = softmax_j(b), and h = c (p - Σ_k c_k p_k) if asked for; c itself may then stay in registers.
template <bool backward, bool write_c = true, class Shape, class Real>
__device__ void couple(const Shape& z, const Real* logits, const Real* agreement, Real* coupling, Real* change) {
  CAPS_READ_THREAD(tid);
#pragma unroll 1
  for (int s0 = 0; s0 < z.tile; s0 += blockDim.x / z.sharers) {
    const int s = s0 + tid / z.sharers, J = s < z.tile ? z.J : 0;
    const auto gather = [&](const Real* parts, int j) {
      Real sum = 0;
      for (int g = 0; g < z.parts_per_j; ++g)
        sum += parts[(int64_t(j) * z.parts_per_j + g) * z.stride + s];
      return sum;
    };
    PerCapsule<Shape, Real> c(coupling + s, z.stride), h(change + s, z.stride);
    const auto each = [&](auto&& f) { each_capsule(z, tid % z.sharers, J, f); };
    Real largest = -INFINITY, sum = 0, mean = 0;
    each([&](int j, int m) { largest = fmax(largest, c.at(j, m) = gather(logits, j)); });
    largest = max_across(largest, z.sharers);
    each([&](int j, int m) { sum += c.at(j, m) = exp(c.at(j, m) - largest); });
    const Real scale = 1 / sum_across(sum, z.sharers);
    each([&](int j, int m) {
      c.at(j, m) *= scale;
      if constexpr (Shape::fixed && write_c)
        coupling[j * z.stride + s] = c.at(j, m);
    });
    if constexpr (backward) {
      each([&](int j, int m) { mean += c.at(j, m) * (h.at(j, m) = gather(agreement, j)); });
      mean = sum_across(mean, z.sharers);
      each([&](int j, int m) {
        h.at(j, m) = c.at(j, m) * (h.at(j, m) - mean);
        if constexpr (Shape::fixed)
          change[j * z.stride + s] = h.at(j, m);
      });
    }
  }
}

}  // namespace caps::cuda
