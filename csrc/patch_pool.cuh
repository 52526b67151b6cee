// The grouping op on a CUDA device: a block an image, its patches through a ring of boxes in shared memory,
// tensor cores for every product.
//
//   forward    pass 1  similarities and norms      box by box, sums in registers, a warp has 16 patches
//              rows    range, threshold, weights   a warp a sub-caption (patch_pool_math.h)
//              pass 2  pooled = weights @ patches  box by box, a warp has 8 columns
//   backward   pass 1  gradients of the weights    as the similarities
//              rows    gradients of the similarities
//              pass 2  dt as the pooling; dx through the box it came from, written once
//
// A box is up to 256 patches x 128 bytes of columns (64 of 16 bits, 32 of float32), its 16-byte chunks permuted by the
// row so that ldmatrix meets no bank twice. Where all boxes of an image fit (P = 196, D = 512: 8 boxes, 196 KB) the
// second pass finds them still there, and each box it has finished is refilled for the next image; else both passes
// stream, the second one from L2. Copies are cp.async on every architecture: 16 bytes a thread, many in flight.
// A block's images are its own from first to last: no atomics, the same bits each time.
//
// float32 products are three TF32 ones.
//
// N images, P patches, K <= 8 KT sub-captions, D width (a multiple of 8).
#pragma once

#include "patch_pool_backward.cuh"
#include "patch_pool_forward.cuh"

#ifdef __CUDACC__
namespace dreamlip {

template <class T, int KT>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(const __grid_constant__ PoolShape shape, const T* patches, const T* texts, const bool* mask,
                   T* pooled, float* similarity, float* inv_norm) {
  extern __shared__ __align__(128) char shared[];
  pool_forward<T, KT>(shape, patches, texts, mask, pooled, similarity, inv_norm, shared, threadIdx.x, blockIdx.x,
                      gridDim.x);
}

template <class T, int KT>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ PoolShape shape, const T* patches, const T* texts, const T* upstream,
                    const bool* mask, const float* similarity, const float* inv_norm, T* d_patches, T* d_texts) {
  extern __shared__ __align__(128) char shared[];
  pool_backward<T, KT>(shape, patches, texts, upstream, mask, similarity, inv_norm, d_patches, d_texts, shared,
                       threadIdx.x, blockIdx.x, gridDim.x);
}

}  // namespace dreamlip
#endif
