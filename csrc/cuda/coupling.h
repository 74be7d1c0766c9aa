// Coupling coefficients c = softmax_j(û·V) of a tile of samples, the gradient h of their logits, and what a fragment
// has to do with them. Builds on seats.h and warp.h.
#pragma once

#include "seats.h"
#include "warp.h"

#include <math.h>

namespace caps::cuda {

// ---- a thread's fragment --------------------------------------------------------------------------------------------

// The thread's part of Σ_d û a, for all samples of its team: a number per group.
template <class Shape, class Real>
__device__ void put_dot(const Seat<Shape>& seat, Real* parts, int slot, const Fragment<Shape, Real>& x,
                        const Fragment<Shape, Real>& a) {
  Real dot[Shape::samples] = {};
#pragma unroll
  for (int q = 0; q < rows; ++q)
#pragma unroll
    for (int s = 0; s < Shape::samples; ++s)
      dot[s] += x.at[q][s] * a.at[q][s];
  if (seat.owns(slot))
    store<Shape::samples>(dot, parts + seat.group(slot) * seat.z.stride + seat.sample());
}

template <class Shape, class Real>
__device__ void add_scaled(const Seat<Shape>& seat, const Real* scales, int slot, const Fragment<Shape, Real>& a,
                           Fragment<Shape, Real>& sum) {
  Real scale[Shape::samples] = {};
  if (Shape::fixed || seat.owns(slot))
    load<Shape::samples>(scales + seat.j(slot) * seat.z.stride + seat.sample(), scale);
#pragma unroll
  for (int q = 0; q < rows; ++q)
#pragma unroll
    for (int s = 0; s < Shape::samples; ++s)
      sum.at[q][s] += scale[s] * a.at[q][s];
}

// ---- softmax over J, by four threads a sample -----------------------------------------------------------------------

constexpr int quad = 4;  // threads that share a sample's softmax: one of them has j, j + quad, …

// Its numbers: in registers, or where they end up.
template <class Shape, class Real>
struct PerCapsule {
  Real* array;
  int stride;
  Real own[Shape::fixed ? 4 : 1];

  __device__ PerCapsule(Real* array, int stride) : array(array), stride(stride) {}
  __device__ Real& at(int j, int m) {
    if constexpr (Shape::fixed)
      return own[m];
    else
      return array[j * stride];
  }
};

template <class Shape, class F>
__device__ void each_capsule(int J, F&& f) {
  const int first = threadIdx.x % quad;
  if constexpr (Shape::fixed) {
#pragma unroll
    for (int m = 0; m * quad < Shape::J; ++m)
      if (first + m * quad < J)
        f(first + m * quad, m);
  } else {
    for (int j = first; j < J; j += quad)
      f(j, 0);
  }
}

// c = softmax_j(b), and h = c (p - Σ_k c_k p_k) if asked for.
template <bool backward, class Shape, class Real>
__device__ void couple(const Shape& z, const Real* logits, const Real* agreement, Real* coupling, Real* change) {
  for (int s0 = 0; s0 < z.tile; s0 += blockDim.x / quad) {
    const int s = s0 + threadIdx.x / quad, J = s < z.tile ? z.J : 0;
    const auto gather = [&](const Real* parts, int j) {
      Real sum = 0;
#pragma unroll
      for (int g = 0; g < z.per_j; ++g)
        sum += parts[(j * z.per_j + g) * z.stride + s];
      return sum;
    };
    PerCapsule<Shape, Real> c(coupling + s, z.stride), h(change + s, z.stride);
    Real largest = -INFINITY, sum = 0, mean = 0;
    each_capsule<Shape>(J, [&](int j, int m) { largest = fmax(largest, c.at(j, m) = gather(logits, j)); });
    largest = max_across(largest, quad);
    each_capsule<Shape>(J, [&](int j, int m) { sum += c.at(j, m) = exp(c.at(j, m) - largest); });
    const Real scale = 1 / sum_across(sum, quad);
    each_capsule<Shape>(J, [&](int j, int m) { coupling[j * z.stride + s] = c.at(j, m) *= scale; });
    if constexpr (backward) {
      each_capsule<Shape>(J, [&](int j, int m) { mean += c.at(j, m) * (h.at(j, m) = gather(agreement, j)); });
      mean = sum_across(mean, quad);
      each_capsule<Shape>(J, [&](int j, int m) { change[j * z.stride + s] = c.at(j, m) * (h.at(j, m) - mean); });
    }
  }
}

}  // namespace caps::cuda
