// Sums and maxima over threads of a warp, by shuffles: each in one order, so that results repeat.
#pragma once

#include "runtime.h"

#include <math.h>

namespace caps::cuda {

constexpr unsigned whole_warp = 0xffffffffu;

template <class Real>
__device__ Real sum_across(Real x, int width) {
  for (int offset = width / 2; offset; offset /= 2)
    x += __shfl_xor_sync(whole_warp, x, offset);
  return x;
}

template <class Real>
__device__ Real max_across(Real x, int width) {
  for (int offset = width / 2; offset; offset /= 2)
    x = fmax(x, __shfl_xor_sync(whole_warp, x, offset));
  return x;
}

// Adds up arrays of `count` numbers over the threads whose numbers differ in the bits first, first / 2, …, last: each
// of them is left with its own part of the sums, the higher bits choosing the larger parts. Each exchange halves what
// is left to exchange: 14 shuffles for 16 numbers over 8 threads, where a sum across for each would take 48.
template <int count, int first, int last, class Real>
__device__ void scatter_sums(Real* x) {
  constexpr int half = count / 2;
  const bool upper = threadIdx.x & first;
#pragma unroll
  for (int m = 0; m < half; ++m) {
    const Real other = __shfl_xor_sync(whole_warp, upper ? x[m] : x[m + half], first);
    x[m] = (upper ? x[m + half] : x[m]) + other;
  }
  if constexpr (first > last)
    scatter_sums<half, first / 2, last>(x);
}

}  // namespace caps::cuda
