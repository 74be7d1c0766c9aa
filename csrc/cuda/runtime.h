// What the kernels and their launches use of CUDA. Under CAPS_SHIM all of it, and the macros, come from
// tests/cuda_shim.h, which runs them on a CPU.
#pragma once

#include "../caps.h"

#ifndef CAPS_SHIM
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#define CAPS_LAUNCH(kernel, grid, block, shared, stream) kernel<<<grid, block, shared, stream>>>
#define CAPS_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// threadIdx.x, read anew at each use: what is computed from it is not kept in registers, and spilled, across a loop.
#define CAPS_READ_THREAD(name) unsigned name; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(name))
#endif

namespace caps::cuda {

// Bytes of shared memory that a block has on every GPU. More would have to be asked for, kernel by kernel, with an
// attribute that other threads and captured graphs see; and what a result is made of would depend on the GPU.
constexpr int64_t shared_limit = 48 << 10;

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "caps: CUDA: ", cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, cudaStream_t stream,
            const Arguments&... arguments) {
  if (blocks == 0)  // of empty tensors; CUDA refuses an empty grid
    return;
  CAPS_LAUNCH(kernel, unsigned(blocks), unsigned(threads), size_t(shared), stream)(arguments...);
  check(cudaGetLastError());
}

template <class Real>
void fill_zeros(Real* numbers, int64_t count, cudaStream_t stream) {
  if (count)
    check(cudaMemsetAsync(numbers, 0, count * sizeof(Real), stream));
}

CAPS_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CAPS_HD constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

}  // namespace caps::cuda
