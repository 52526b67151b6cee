// What the launchers of CUDA kernels ask of the current device.
#pragma once

#include <c10/cuda/CUDAException.h>

namespace dreamlip {

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

}  // namespace dreamlip
