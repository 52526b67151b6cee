// Every CUDA kernel that is shipped, without torch's headers:
// what tests/kernels/test_compile_only.py compiles and reads.
#include "patch_pool.cuh"

namespace dreamlip {
#define DREAMLIP_INSTANCE(T, KT)                                                                                     \
  template __global__ void forward_kernel<T, KT>(const __grid_constant__ PoolShape, const T*, const T*, const bool*, \
                                                 T*, float*, float*);                                                \
  template __global__ void backward_kernel<T, KT>(const __grid_constant__ PoolShape, const T*, const T*, const T*,   \
                                                  const bool*, const float*, const float*, T*, T*);
DREAMLIP_INSTANCE(__nv_bfloat16, 1)
DREAMLIP_INSTANCE(__nv_bfloat16, 2)
#ifdef DREAMLIP_ALL
DREAMLIP_INSTANCE(__half, 1)
DREAMLIP_INSTANCE(__half, 2)
#endif
DREAMLIP_INSTANCE(float, 1)
DREAMLIP_INSTANCE(float, 2)
}  // namespace dreamlip
