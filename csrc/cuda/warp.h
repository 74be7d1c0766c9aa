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
// of them is left with its own part of the sums, the higher bits choosing the larger parts, or with the same one number
// where there are more threads than numbers. Each exchange halves what is left to exchange: 14 shuffles for 16 numbers
// over 8 threads, where a sum across for each would take 48.
template <int count, int first, int last, class Real>
__device__ void scatter_sums(Real* x) {
  if constexpr (count == 1) {
    x[0] += __shfl_xor_sync(whole_warp, x[0], first);
  } else {
    const bool upper = threadIdx.x & first;
#pragma unroll
    for (int m = 0; m < count / 2; ++m) {
      const Real other = __shfl_xor_sync(whole_warp, upper ? x[m] : x[m + count / 2], first);
      x[m] = (upper ? x[m + count / 2] : x[m]) + other;
    }
  }
  if constexpr (first > last)
    scatter_sums<count == 1 ? 1 : count / 2, first / 2, last>(x);
}

}  // namespace caps::cuda
