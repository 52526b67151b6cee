// The grouping op for CPU tensors: parallel over images, each by the code compiled for the vectors that torch uses.
//
// N images, P patches, K texts, D width.

#include "patch_pool.h"
#include "patch_pool_image.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <string>

namespace dreamlip {
namespace {

// The same code for three instruction sets.
#define DREAMLIP_VARIANT(NAME, TARGET, BYTES)                                                              \
  template <class S, class T> TARGET void NAME(const Image<S, T>& im, Scratch<T>& scratch, bool forward) { \
    if (forward) forward_image<S, T, BYTES>(im, scratch);                                                  \
    else backward_image<S, T, BYTES>(im, scratch);                                                         \
  }
DREAMLIP_VARIANT(run_portable, , 16)
#ifdef __x86_64__
DREAMLIP_VARIANT(run_avx2, __attribute__((target("avx2,fma,f16c"))), 32)
DREAMLIP_VARIANT(run_avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), 64)
#endif
#undef DREAMLIP_VARIANT

// As torch chose for its own kernels: ATEN_CPU_CAPABILITY=default|avx2|avx512 holds here too.
int vector_bytes() {
  static const int bytes = [] {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? 64 : capability == "AVX2" ? 32 : 16;
  }();
  return bytes;
}

template <class S, class T> void run(const Image<S, T>& im, Scratch<T>& scratch, bool forward) {
#ifdef __x86_64__
  if (vector_bytes() == 64) return run_avx512(im, scratch, forward);
  if (vector_bytes() == 32) return run_avx2(im, scratch, forward);
#endif
  run_portable(im, scratch, forward);
}

// f(S{}, T{}) with the stored and the computing dtype.
template <class F> void with_types(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kFloat: return f(float{}, float{});
    case at::kDouble: return f(double{}, double{});
    case at::kBFloat16: return f(c10::BFloat16{}, float{});
    case at::kHalf: return f(c10::Half{}, float{});
    default: TORCH_CHECK(false, "patch_pool: patches must be float32, float64, bfloat16 or float16, got ", dtype);
  }
}

void check(const at::Tensor& patches, const at::Tensor& texts, const std::optional<at::Tensor>& mask) {
  TORCH_CHECK(
      patches.dim() == 3 && texts.dim() == 3 && patches.size(0) == texts.size(0) && patches.size(2) == texts.size(2),
      "patch_pool: patches [N, P, D] and texts [N, K, D] must share N and D, got ", patches.sizes(), " and ",
      texts.sizes());
  TORCH_CHECK(patches.scalar_type() == texts.scalar_type(), "patch_pool: patches and texts must share a dtype, got ",
              patches.scalar_type(), " and ", texts.scalar_type());
  TORCH_CHECK(!mask || (mask->scalar_type() == at::kBool && mask->dim() == 2 && mask->size(0) == patches.size(0) &&
                        mask->size(1) == patches.size(1)),
              "patch_pool: patch_mask must be bool [N, P]");
  TORCH_CHECK(patches.device().is_cpu() && texts.device().is_cpu(),
              "patch_pool: these are the CPU kernels, got a tensor on ", patches.device());
}

template <class S, class T>
Image<S, T> describe(const at::Tensor& patches, const at::Tensor& texts, double threshold, int64_t normalization) {
  Image<S, T> im{};
  im.P = int(patches.size(1));
  im.K = int(texts.size(1));
  im.D = int(patches.size(2));
  im.patch_stride = patches.stride(1);
  im.patch_step = patches.stride(2);
  im.text_stride = texts.stride(1);
  im.text_step = texts.stride(2);
  im.options = {static_cast<T>(threshold), int(normalization)};
  return im;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> patch_pool_forward_cpu(const at::Tensor& patches,
                                                                      const at::Tensor& texts, double threshold,
                                                                      int64_t normalization,
                                                                      const std::optional<at::Tensor>& patch_mask) {
  check(patches, texts, patch_mask);
  const int64_t N = patches.size(0), P = patches.size(1), K = texts.size(1), D = patches.size(2);
  const auto sum_options = patches.options().dtype(patches.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  at::Tensor pooled = at::empty({N, K, D}, patches.options()), similarity = at::empty({N, K, P}, sum_options),
             inv_norm = at::empty({N, P}, sum_options);
  const at::Tensor mask = patch_mask ? patch_mask->contiguous() : at::Tensor();
  with_types(patches.scalar_type(), [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const Image<S, T> base = describe<S, T>(patches, texts, threshold, normalization);
    at::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
      Scratch<T> scratch;
      for (int64_t n = begin; n < end; ++n) {
        Image<S, T> im = base;
        im.patches = patches.const_data_ptr<S>() + n * patches.stride(0);
        im.texts = texts.const_data_ptr<S>() + n * texts.stride(0);
        im.valid = mask.defined() ? mask.const_data_ptr<bool>() + n * P : nullptr;
        im.pooled = pooled.mutable_data_ptr<S>() + n * K * D;
        im.similarity = similarity.mutable_data_ptr<T>() + n * K * P;
        im.inv_norm = inv_norm.mutable_data_ptr<T>() + n * P;
        run(im, scratch, true);
      }
    });
  });
  return {pooled, similarity, inv_norm};
}

std::tuple<at::Tensor, at::Tensor> patch_pool_backward_cpu(const at::Tensor& patches, const at::Tensor& texts,
                                                           const at::Tensor& similarity, const at::Tensor& inv_norm,
                                                           double threshold, int64_t normalization,
                                                           const std::optional<at::Tensor>& patch_mask,
                                                           const at::Tensor& d_pooled) {
  check(patches, texts, patch_mask);
  TORCH_CHECK(d_pooled.sizes() == texts.sizes() && d_pooled.scalar_type() == texts.scalar_type(),
              "patch_pool: d_pooled must be like texts, got ", d_pooled.sizes(), " of ", d_pooled.scalar_type());
  TORCH_CHECK(similarity.is_contiguous() && inv_norm.is_contiguous(),
              "patch_pool: similarity and inv_norm must be contiguous, as forward gives them");
  const int64_t N = patches.size(0), P = patches.size(1), K = texts.size(1), D = patches.size(2);
  at::Tensor d_patches = at::empty({N, P, D}, patches.options()), d_texts = at::empty({N, K, D}, texts.options());
  const at::Tensor mask = patch_mask ? patch_mask->contiguous() : at::Tensor();
  with_types(patches.scalar_type(), [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    Image<S, T> base = describe<S, T>(patches, texts, threshold, normalization);
    base.up_stride = d_pooled.stride(1);
    base.up_step = d_pooled.stride(2);
    at::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
      Scratch<T> scratch;
      for (int64_t n = begin; n < end; ++n) {
        Image<S, T> im = base;
        im.patches = patches.const_data_ptr<S>() + n * patches.stride(0);
        im.texts = texts.const_data_ptr<S>() + n * texts.stride(0);
        im.valid = mask.defined() ? mask.const_data_ptr<bool>() + n * P : nullptr;
        im.d_pooled = d_pooled.const_data_ptr<S>() + n * d_pooled.stride(0);
        im.similarity = const_cast<T*>(similarity.const_data_ptr<T>()) + n * K * P;  // only read
        im.inv_norm = const_cast<T*>(inv_norm.const_data_ptr<T>()) + n * P;
        im.d_patches = d_patches.mutable_data_ptr<S>() + n * P * D;
        im.d_texts = d_texts.mutable_data_ptr<S>() + n * K * D;
        run(im, scratch, false);
      }
    });
  });
  return {d_patches, d_texts};
}

}  // namespace dreamlip
