// The grouping op for CPU tensors: parallel over images, one pass over an image's patches while they are in the cache,
// no intermediate of their size.
//
// N images, P patches, K texts, D width; ld is D rounded up to whole vectors.

#include "patch_pool.h"
#include "patch_pool_kernels.h"
#include "patch_pool_math.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <string>
#include <type_traits>
#include <vector>

namespace dreamlip {
namespace {

#define DREAMLIP_INLINE inline __attribute__((always_inline))

// One image of one call: `S` is the stored dtype, `T` the one computed in.
template <class S, class T> struct Image {
  const S* patches;   // [P, D], rows `patch_stride` apart, elements `patch_step` apart
  const S* texts;     // [K, D]
  const bool* valid;  // [P] or null
  const S* d_pooled;  // [K, D] or null (forward)
  T* similarity;      // [K, P]
  T* inv_norm;        // [P]
  S* pooled;          // [K, D]     (forward)
  S* d_patches;       // [P, D]     (backward)
  S* d_texts;         // [K, D]     (backward)
  long patch_stride, patch_step, text_stride, text_step, up_stride, up_step;
  int P, K, D;
  RowOptions<T> options;
};

// A thread's buffers, kept from image to image.
template <class T> struct Scratch {
  std::vector<T> x, rows, coef, squares, radial, out, text_inv, along;

  void reserve(int P, int K, int ld) {
    rows.assign(size_t(2) * K * ld, T(0));  // the padding stays zero
    coef.resize(size_t(2) * K * P);
    squares.resize(P);
    radial.resize(P);
    out.resize(size_t(K > 4 ? K : 4) * ld);
    text_inv.resize(K);
    along.resize(K);
  }
};

template <class S, class T> DREAMLIP_INLINE void widen(const S* from, long step, int d, T* to) {
  if (step == 1)
    for (int i = 0; i < d; ++i) to[i] = static_cast<T>(from[i]);
  else
    for (int i = 0; i < d; ++i) to[i] = static_cast<T>(from[i * step]);
}

template <class S, class T> DREAMLIP_INLINE void narrow(const T* from, int d, S* to) {
  for (int i = 0; i < d; ++i) to[i] = static_cast<S>(from[i]);
}

// The image's patches as rows of T of whole vectors: where they lie, if they do, else copied.
template <class S, class T, int kBytes>
DREAMLIP_INLINE const T* rows_of(const Image<S, T>& im, Scratch<T>& scratch, int ld, long& stride) {
  if constexpr (std::is_same_v<S, T>) {
    if (im.patch_step == 1 && ld == im.D) {
      stride = im.patch_stride;
      return im.patches;
    }
  }
  scratch.x.resize(size_t(im.P) * ld);
  T* x = scratch.x.data();
  for (int p = 0; p < im.P; ++p) {
    widen(im.patches + p * im.patch_stride, im.patch_step, im.D, x + size_t(p) * ld);
    for (int i = im.D; i < ld; ++i) x[size_t(p) * ld + i] = 0;
  }
  stride = ld;
  return x;
}

// Unit texts as rows of whole vectors; inv[k] = 1 / |t_k|, 0 for a zero vector.
template <class S, class T, int kBytes>
DREAMLIP_INLINE void unit_texts(const Image<S, T>& im, int ld, T* rows, T* inv) {
  for (int k = 0; k < im.K; ++k) {
    T* row = rows + size_t(k) * ld;
    widen(im.texts + k * im.text_stride, im.text_step, im.D, row);
    T zero, square;
    Simd<T, kBytes>::template dots<1, 1, true>(row, ld, row, ld, ld, &zero, 1, &square);
    inv[k] = square == 0 ? T(0) : 1 / std::sqrt(square);
    for (int i = 0; i < im.D; ++i) row[i] *= inv[k];
  }
}

template <class S, class T, int kBytes> DREAMLIP_INLINE void forward_image(const Image<S, T>& im, Scratch<T>& scratch) {
  using V = Simd<T, kBytes>;
  const int P = im.P, K = im.K, ld = (im.D + V::width - 1) / V::width * V::width;
  scratch.reserve(P, K, ld);
  long ldx;
  const T* x = rows_of<S, T, kBytes>(im, scratch, ld, ldx);
  unit_texts<S, T, kBytes>(im, ld, scratch.rows.data(), scratch.text_inv.data());
  V::all_dots(x, ldx, P, scratch.rows.data(), ld, K, ld, im.similarity, P, scratch.squares.data());
  for (int p = 0; p < P; ++p) im.inv_norm[p] = scratch.squares[p] == 0 ? T(0) : 1 / std::sqrt(scratch.squares[p]);
  for (int k = 0; k < K; ++k) {
    T *w = im.similarity + size_t(k) * P, *coef = scratch.coef.data() + size_t(k) * P;
    for (int p = 0; p < P; ++p) w[p] *= im.inv_norm[p];
    const Row<T> row = read_row(OneLane{}, w, im.valid, P, im.options);
    for (int p = 0; p < P; ++p)
      coef[p] = weight(row, im.options.normalization, w[p], is_valid(im.valid, p)) * im.inv_norm[p];
  }
  V::pool(x, ldx, P, scratch.coef.data(), P, K, ld, scratch.out.data(), ld);
  for (int k = 0; k < K; ++k) narrow(scratch.out.data() + size_t(k) * ld, im.D, im.pooled + size_t(k) * im.D);
}

template <class S, class T, int kBytes>
DREAMLIP_INLINE void backward_image(const Image<S, T>& im, Scratch<T>& scratch) {
  using V = Simd<T, kBytes>;
  const int P = im.P, K = im.K, ld = (im.D + V::width - 1) / V::width * V::width;
  scratch.reserve(P, K, ld);
  long ldx;
  const T* x = rows_of<S, T, kBytes>(im, scratch, ld, ldx);
  T *up = scratch.rows.data(), *unit = up + size_t(K) * ld;  // rows: K upstream gradients, K unit texts
  for (int k = 0; k < K; ++k) widen(im.d_pooled + k * im.up_stride, im.up_step, im.D, up + size_t(k) * ld);
  unit_texts<S, T, kBytes>(im, ld, unit, scratch.text_inv.data());
  T *a = scratch.coef.data(),
    *dw = a + size_t(K) * P;  // coefficients of the rows: weights, gradients of the similarities
  V::all_dots(x, ldx, P, up, ld, K, ld, dw, P, nullptr);
  for (int p = 0; p < P; ++p) scratch.radial[p] = 0;
  for (int k = 0; k < K; ++k) {
    const T* w = im.similarity + size_t(k) * P;
    T *ak = a + size_t(k) * P, *dwk = dw + size_t(k) * P;
    const Row<T> row = read_row(OneLane{}, w, im.valid, P, im.options);
    for (int p = 0; p < P; ++p) {
      dwk[p] *= im.inv_norm[p];
      ak[p] = weight(row, im.options.normalization, w[p], is_valid(im.valid, p));
      scratch.radial[p] += ak[p] * dwk[p];
    }
    scratch.along[k] = weights_backward(OneLane{}, row, w, im.valid, P, im.options.normalization, dwk);
    for (int p = 0; p < P; ++p) {
      scratch.radial[p] += dwk[p] * w[p];
      ak[p] *= im.inv_norm[p];
      dwk[p] *= im.inv_norm[p];  // from here both carry the 1 / |x_p| of the normalised patch
    }
  }
  V::pool(x, ldx, P, dw, P, K, ld, scratch.out.data(), ld);
  for (int k = 0; k < K; ++k) {
    const T *d_unit = scratch.out.data() + size_t(k) * ld, *t = unit + size_t(k) * ld;
    S* to = im.d_texts + size_t(k) * im.D;
    for (int i = 0; i < im.D; ++i) to[i] = static_cast<S>((d_unit[i] - t[i] * scratch.along[k]) * scratch.text_inv[k]);
  }
  for (int p = 0; p < P; ++p) scratch.radial[p] *= im.inv_norm[p] * im.inv_norm[p];
  constexpr int kPatches = 4;
  for (int p = 0; p < P; p += kPatches) {
    const int count = P - p < kPatches ? P - p : kPatches;
    T* to = scratch.out.data();
    long ldo = ld;
    if constexpr (std::is_same_v<S, T>) {
      if (ld == im.D) {
        to = im.d_patches + size_t(p) * im.D;
        ldo = im.D;
      }
    }
    if (count == kPatches)
      V::template spread<kPatches>(up, ld, 2 * K, a + p, P, x + p * ldx, ldx, scratch.radial.data() + p, ld, to, ldo);
    else
      for (int q = 0; q < count; ++q)
        V::template spread<1>(up, ld, 2 * K, a + p + q, P, x + (p + q) * ldx, ldx, scratch.radial.data() + p + q, ld,
                              to + q * ldo, ldo);
    if (to == scratch.out.data())
      for (int q = 0; q < count; ++q) narrow(to + q * ldo, im.D, im.d_patches + size_t(p + q) * im.D);
  }
}

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
  const auto wide = patches.options().dtype(patches.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  at::Tensor pooled = at::empty({N, K, D}, patches.options()), similarity = at::empty({N, K, P}, wide),
             inv_norm = at::empty({N, P}, wide);
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
