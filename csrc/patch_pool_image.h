// One image of the grouping op on the CPU, forward and backward, while its patches are in the cache: no intermediate of
// their size. Everything here is inlined into functions compiled for one instruction set.
//
// P patches, K texts, D width; ld is D rounded up to whole vectors, ldx the stride of the patches.
#pragma once

#include "patch_pool_kernels.h"
#include "patch_pool_math.h"

#include <cmath>
#include <type_traits>
#include <vector>

namespace dreamlip {

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

// dw [K, P]: gradients of the weights -> gradients of the similarities; a [K, P]: the weights. Both leave with the
// 1 / |x_p| of the normalized patch. Fills scratch.along (sum_p dw w of each text) and scratch.radial (each patch's
// gradient along itself).
template <class S, class T>
DREAMLIP_INLINE void similarity_gradients(const Image<S, T>& im, Scratch<T>& scratch, T* a, T* dw) {
  const int P = im.P;
  for (int p = 0; p < P; ++p) scratch.radial[p] = 0;
  for (int k = 0; k < im.K; ++k) {
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
      dwk[p] *= im.inv_norm[p];
    }
  }
  for (int p = 0; p < P; ++p) scratch.radial[p] *= im.inv_norm[p] * im.inv_norm[p];
}

// d_texts: the gradient of the unit text without its part along the text, over the text's norm.
template <class S, class T, int kBytes>
DREAMLIP_INLINE void text_gradients(const Image<S, T>& im, Scratch<T>& scratch, const T* x, long ldx, const T* unit,
                                    int ld, const T* dw) {
  Simd<T, kBytes>::pool(x, ldx, im.P, dw, im.P, im.K, ld, scratch.out.data(), ld);
  for (int k = 0; k < im.K; ++k) {
    const T *d_unit = scratch.out.data() + size_t(k) * ld, *t = unit + size_t(k) * ld;
    S* to = im.d_texts + size_t(k) * im.D;
    for (int i = 0; i < im.D; ++i) to[i] = static_cast<S>((d_unit[i] - t[i] * scratch.along[k]) * scratch.text_inv[k]);
  }
}

// d_patches, four patches at a time: where they belong if rows are whole vectors of the stored type, else by way of
// scratch. `rows` are the K upstream gradients and the K unit texts, `coef` their coefficients.
template <class S, class T, int kBytes>
DREAMLIP_INLINE void patch_gradients(const Image<S, T>& im, Scratch<T>& scratch, const T* x, long ldx, const T* rows,
                                     int ld, const T* coef) {
  using V = Simd<T, kBytes>;
  const int P = im.P, count_rows = 2 * im.K;
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
    const T* radial = scratch.radial.data() + p;
    if (count == kPatches)
      V::template spread<kPatches>(rows, ld, count_rows, coef + p, P, x + p * ldx, ldx, radial, ld, to, ldo);
    else
      for (int q = 0; q < count; ++q)
        V::template spread<1>(rows, ld, count_rows, coef + p + q, P, x + (p + q) * ldx, ldx, radial + q, ld,
                              to + q * ldo, ldo);
    if (to == scratch.out.data())
      for (int q = 0; q < count; ++q) narrow(to + q * ldo, im.D, im.d_patches + size_t(p + q) * im.D);
  }
}

template <class S, class T, int kBytes>
DREAMLIP_INLINE void backward_image(const Image<S, T>& im, Scratch<T>& scratch) {
  using V = Simd<T, kBytes>;
  const int P = im.P, K = im.K, ld = (im.D + V::width - 1) / V::width * V::width;
  scratch.reserve(P, K, ld);
  long ldx;
  const T* x = rows_of<S, T, kBytes>(im, scratch, ld, ldx);
  T *up = scratch.rows.data(), *unit = up + size_t(K) * ld;
  for (int k = 0; k < K; ++k) widen(im.d_pooled + k * im.up_stride, im.up_step, im.D, up + size_t(k) * ld);
  unit_texts<S, T, kBytes>(im, ld, unit, scratch.text_inv.data());
  T *a = scratch.coef.data(), *dw = a + size_t(K) * P;
  V::all_dots(x, ldx, P, up, ld, K, ld, dw, P, nullptr);
  similarity_gradients(im, scratch, a, dw);
  text_gradients<S, T, kBytes>(im, scratch, x, ldx, unit, ld, dw);
  patch_gradients<S, T, kBytes>(im, scratch, x, ldx, up, ld, a);
}

#undef DREAMLIP_INLINE

}  // namespace dreamlip
