// What the kernels and their launches use of CUDA. Under CAPS_SHIM all of it, and the two macros, come from
// tests/cuda_shim.h, which runs them on a CPU.
#pragma once

#include "../caps.h"

#ifndef CAPS_SHIM
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#define CAPS_LAUNCH(kernel, grid, block, shared, stream) kernel<<<grid, block, shared, stream>>>
#define CAPS_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace caps::cuda {

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "caps: CUDA: ", cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, cudaStream_t stream,
            const Arguments&... arguments) {
  if (blocks == 0)  // of empty tensors; CUDA refuses an empty grid
    return;
  if (shared > 48 << 10)  // beyond this a kernel has to ask
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared)));
  CAPS_LAUNCH(kernel, unsigned(blocks), unsigned(threads), size_t(shared), stream)(arguments...);
  check(cudaGetLastError());
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace caps::cuda
