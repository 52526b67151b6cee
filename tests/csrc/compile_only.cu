// Every CUDA kernel that is shipped, without torch's headers:
// what tests/kernels/test_compile_only.py compiles and reads.
#include "logsumexp_gradient.cuh"
#include "patch_pool.cuh"

namespace dreamlip {

#define DREAMLIP_POOL(T, KT)                                                                                         \
  template __global__ void forward_kernel<T, KT>(const __grid_constant__ PoolShape, const T*, const T*, const bool*, \
                                                 T*, float*, float*);                                                \
  template __global__ void backward_kernel<T, KT>(const __grid_constant__ PoolShape, const T*, const T*, const T*,   \
                                                  const bool*, const float*, const float*, T*, T*);
#define DREAMLIP_LOGSUMEXP(T)                                                                                         \
  template __global__ void exp_sums_kernel<T>(const __grid_constant__ Rectangle<T>, Exponent, Bands, float*, float*); \
  template __global__ void finish_kernel<T>(const __grid_constant__ Rectangle<T>, Exponent, Parts, bool, float*);     \
  template __global__ void pairs_kernel<T>(const __grid_constant__ Rectangle<T>, Exponent, int, int, float*);         \
  template __global__ void gradient_kernel<T>(const __grid_constant__ Rectangle<T>,                                   \
                                              const __grid_constant__ Coefficients, const __grid_constant__ Chunk,    \
                                              Exponent, const int*, T*);

#define DREAMLIP_INSTANCE(T) DREAMLIP_POOL(T, 1) DREAMLIP_POOL(T, 2) DREAMLIP_LOGSUMEXP(T)
DREAMLIP_INSTANCE(__nv_bfloat16)
#ifdef DREAMLIP_ALL
DREAMLIP_INSTANCE(__half)
#endif
DREAMLIP_INSTANCE(float)

}  // namespace dreamlip
