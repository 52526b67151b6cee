// The CUDA kernels of patch_pool.cuh as ops: checks, how much of the ring fits, launches.

#include "aligned.h"
#include "launch.h"
#include "patch_pool.cuh"
#include "patch_pool.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

namespace dreamlip {
namespace {

PoolShape describe(const at::Tensor& patches, const at::Tensor& texts, double threshold, int64_t normalization) {
  PoolShape s{};
  s.N = int(patches.size(0));
  s.P = int(patches.size(1));
  s.K = int(texts.size(1));
  s.D = int(patches.size(2));
  s.x_image = patches.stride(0);
  s.x_row = patches.stride(1);
  s.t_image = texts.stride(0);
  s.t_row = texts.stride(1);
  s.element = int(patches.element_size());
  s.options = {float(threshold), int(normalization)};
  return s;
}

// The bytes of shared memory to launch with; `s` is completed with the tiles that fit into what this GPU has.
// Forward refuses what backward could not hold.
int plan(PoolShape& s, bool backward) {
  const int limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int least = least_pool_bytes(s.P, s.K, s.D, s.element);
  TORCH_CHECK(least <= limit, "group_patches: backend='cuda' cannot run: P=", s.P, ", K=", s.K, ", D=", s.D, " needs ",
              least, " of ", limit, " bytes of shared memory a block. Use backend='auto'");
  return plan_pool(s, backward, limit);
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, const PoolShape& shape, int shared, Arguments... arguments) {
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  int blocks = 0;
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared));
  const int grid = std::min<int64_t>(shape.N, int64_t(std::max(blocks, 1)) * attribute(cudaDevAttrMultiProcessorCount));
  kernel<<<grid, kThreads, shared, c10::cuda::getCurrentCUDAStream()>>>(shape, arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// f(T{}, std::integral_constant<int, KT>) for the dtype and the number of sub-captions.
template <class F> void with_types(const at::Tensor& patches, int64_t K, F f) {
  const auto with_k = [&](auto t) {
    if (K <= 8) f(t, std::integral_constant<int, 1>{});
    else f(t, std::integral_constant<int, 2>{});
  };
  switch (patches.scalar_type()) {
    case at::kBFloat16: return with_k(__nv_bfloat16{});
    case at::kHalf: return with_k(__half{});
    case at::kFloat: return with_k(float{});
    default:
      TORCH_CHECK(false, "group_patches: backend='cuda' takes float32, bfloat16 and float16, got ",
                  patches.scalar_type(), "; use backend='torch'");
  }
}

template <class T> const T* data(const at::Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <class T> T* data_to(at::Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> patch_pool_forward_cuda(const at::Tensor& patches,
                                                                       const at::Tensor& texts, double threshold,
                                                                       int64_t normalization,
                                                                       const std::optional<at::Tensor>& patch_mask) {
  const c10::cuda::CUDAGuard guard(patches.device());
  if (texts.size(1) >
      kMostTexts) {  // sub-captions do not know of one another: the rest by another pass over the patches
    const auto [first, w, inv_norm] =
        patch_pool_forward_cuda(patches, texts.narrow(1, 0, kMostTexts), threshold, normalization, patch_mask);
    const auto [rest, w_rest, same] = patch_pool_forward_cuda(
        patches, texts.narrow(1, kMostTexts, texts.size(1) - kMostTexts), threshold, normalization, patch_mask);
    return {at::cat({first, rest}, 1), at::cat({w, w_rest}, 1), inv_norm};
  }
  const at::Tensor x = aligned(patches), t = aligned(texts);
  const int64_t N = x.size(0), P = x.size(1), K = t.size(1), D = x.size(2);
  at::Tensor pooled = at::empty({N, K, D}, t.options()),
             similarity = at::empty({N, K, P}, x.options().dtype(at::kFloat)),
             inv_norm = at::empty({N, P}, x.options().dtype(at::kFloat));
  const at::Tensor mask = patch_mask ? patch_mask->contiguous() : at::Tensor();
  if (N)
    with_types(x, K, [&](auto type, auto tiles) {
      using T = decltype(type);
      PoolShape s = describe(x, t, threshold, normalization);
      const int shared = plan(s, false);
      launch(forward_kernel<T, tiles>, s, shared, data<T>(x), data<T>(t),
             mask.defined() ? mask.const_data_ptr<bool>() : nullptr, data_to<T>(pooled),
             similarity.mutable_data_ptr<float>(), inv_norm.mutable_data_ptr<float>());
    });
  if (D != patches.size(2)) pooled = pooled.narrow(2, 0, patches.size(2)).contiguous();
  return {pooled, similarity, inv_norm};
}

std::tuple<at::Tensor, at::Tensor> patch_pool_backward_cuda(const at::Tensor& patches, const at::Tensor& texts,
                                                            const at::Tensor& similarity, const at::Tensor& inv_norm,
                                                            double threshold, int64_t normalization,
                                                            const std::optional<at::Tensor>& patch_mask,
                                                            const at::Tensor& d_pooled) {
  const c10::cuda::CUDAGuard guard(patches.device());
  if (texts.size(1) > kMostTexts) {
    const auto part = [&](int64_t from, int64_t count) {
      return patch_pool_backward_cuda(patches, texts.narrow(1, from, count),
                                      similarity.narrow(1, from, count).contiguous(), inv_norm, threshold,
                                      normalization, patch_mask, d_pooled.narrow(1, from, count));
    };
    auto [d_patches, d_texts] = part(0, kMostTexts);
    const auto [more, d_rest] = part(kMostTexts, texts.size(1) - kMostTexts);
    return {d_patches.add_(more), at::cat({d_texts, d_rest}, 1)};
  }
  const at::Tensor x = aligned(patches), t = aligned(texts), up = aligned(d_pooled), w = similarity.contiguous(),
                   norms = inv_norm.contiguous();
  const int64_t N = x.size(0), P = x.size(1), K = t.size(1), D = x.size(2);
  at::Tensor d_patches = at::empty({N, P, D}, x.options()), d_texts = at::empty({N, K, D}, t.options());
  const at::Tensor mask = patch_mask ? patch_mask->contiguous() : at::Tensor();
  if (N)
    with_types(x, K, [&](auto type, auto tiles) {
      using T = decltype(type);
      PoolShape s = describe(x, t, threshold, normalization);
      s.up_image = up.stride(0);
      s.up_row = up.stride(1);
      const int shared = plan(s, true);
      launch(backward_kernel<T, tiles>, s, shared, data<T>(x), data<T>(t), data<T>(up),
             mask.defined() ? mask.const_data_ptr<bool>() : nullptr, w.const_data_ptr<float>(),
             norms.const_data_ptr<float>(), data_to<T>(d_patches), data_to<T>(d_texts));
    });
  if (D != patches.size(2)) {
    d_patches = d_patches.narrow(2, 0, patches.size(2)).contiguous();
    d_texts = d_texts.narrow(2, 0, patches.size(2)).contiguous();
  }
  return {d_patches, d_texts};
}

}  // namespace dreamlip
