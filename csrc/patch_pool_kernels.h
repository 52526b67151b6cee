// The four dense loops of the grouping op on the CPU, for one image: vectors of `kBytes` bytes,
// several texts or patches at a time in registers.
// Rows are padded with zeros to whole vectors by the caller.
// Everything here is inlined into functions compiled for one instruction set.
#pragma once

#include <cstring>

namespace dreamlip {

template <class T, int kBytes> struct Simd {
  typedef T vec __attribute__((vector_size(kBytes)));
  static constexpr int width = kBytes / sizeof(T);

  static inline __attribute__((always_inline)) vec load(const T* p) {
    vec v;
    __builtin_memcpy(&v, p, kBytes);
    return v;
  }
  static inline __attribute__((always_inline)) void store(T* p, vec v) { __builtin_memcpy(p, &v, kBytes); }
  static inline __attribute__((always_inline)) T sum(vec v) {  // pairwise, so that rounding grows with the logarithm
    T lanes[width];
    __builtin_memcpy(lanes, &v, kBytes);
    for (int half = width / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
  }

  // out[k][p] = rows[k] . x[p] for k < KB and PB patches; with norms also squares[p] = x[p] . x[p].
  template <int KB, int PB, bool kNorms>
  static inline __attribute__((always_inline)) void dots(const T* x, long ldx, const T* rows, long ldr, int d, T* out,
                                                         long ldo, T* squares) {
    vec acc[KB][PB], own[PB];
    for (int p = 0; p < PB; ++p) {
      own[p] = vec{};
      for (int k = 0; k < KB; ++k) acc[k][p] = vec{};
    }
    for (int i = 0; i < d; i += width) {
      vec xs[PB];
      for (int p = 0; p < PB; ++p) {
        xs[p] = load(x + p * ldx + i);
        if (kNorms) own[p] += xs[p] * xs[p];
      }
      for (int k = 0; k < KB; ++k) {
        const vec r = load(rows + k * ldr + i);
        for (int p = 0; p < PB; ++p) acc[k][p] += r * xs[p];
      }
    }
    for (int p = 0; p < PB; ++p) {
      if (kNorms) squares[p] = sum(own[p]);
      for (int k = 0; k < KB; ++k) out[k * ldo + p] = sum(acc[k][p]);
    }
  }

  // 32 vector registers hold the sums of two patches, 16 those of one.
  static constexpr int kTwo = kBytes >= 64 ? 2 : 1;

  template <int KB, bool kNorms>
  static inline __attribute__((always_inline)) void block_dots(const T* x, long ldx, int patches, const T* rows,
                                                               long ldr, int d, T* out, long ldo, T* squares) {
    int p = 0;
    for (; p + kTwo <= patches; p += kTwo)
      dots<KB, kTwo, kNorms>(x + p * ldx, ldx, rows, ldr, d, out + p, ldo, squares + p);
    for (; p < patches; ++p) dots<KB, 1, kNorms>(x + p * ldx, ldx, rows, ldr, d, out + p, ldo, squares + p);
  }

  // out[k][p] for all `count` rows, and squares[p] unless it is null.
  static inline __attribute__((always_inline)) void all_dots(const T* x, long ldx, int patches, const T* rows, long ldr,
                                                             int count, int d, T* out, long ldo, T* squares) {
    int k = 0;
    while (k < count) {
      const T* r = rows + k * ldr;
      T* o = out + k * ldo;
      const bool norms = squares != nullptr && k == 0;
      const int left = count - k;
      if (left >= 8) {
        if (norms) block_dots<8, true>(x, ldx, patches, r, ldr, d, o, ldo, squares);
        else block_dots<8, false>(x, ldx, patches, r, ldr, d, o, ldo, o);
        k += 8;
      } else if (left >= 4) {
        if (norms) block_dots<4, true>(x, ldx, patches, r, ldr, d, o, ldo, squares);
        else block_dots<4, false>(x, ldx, patches, r, ldr, d, o, ldo, o);
        k += 4;
      } else {
        if (norms) block_dots<1, true>(x, ldx, patches, r, ldr, d, o, ldo, squares);
        else block_dots<1, false>(x, ldx, patches, r, ldr, d, o, ldo, o);
        k += 1;
      }
    }
  }

  template <int KB, int S>
  static inline __attribute__((always_inline)) void strip(const T* x, long ldx, int patches, const T* coef, long ldc,
                                                          T* out, long ldo) {
    vec acc[KB][S];
    for (int k = 0; k < KB; ++k)
      for (int s = 0; s < S; ++s) acc[k][s] = vec{};
    for (int p = 0; p < patches; ++p) {
      vec xs[S];
      for (int s = 0; s < S; ++s) xs[s] = load(x + p * ldx + s * width);
      for (int k = 0; k < KB; ++k)
        for (int s = 0; s < S; ++s) acc[k][s] += coef[k * ldc + p] * xs[s];
    }
    for (int k = 0; k < KB; ++k)
      for (int s = 0; s < S; ++s) store(out + k * ldo + s * width, acc[k][s]);
  }

  // out[k] = sum_p coef[k][p] x[p] for KB texts: strips of kTwo vectors, sums in registers.
  template <int KB>
  static inline __attribute__((always_inline)) void block_pool(const T* x, long ldx, int patches, const T* coef,
                                                               long ldc, int d, T* out, long ldo) {
    int i = 0;
    for (; i + kTwo * width <= d; i += kTwo * width) strip<KB, kTwo>(x + i, ldx, patches, coef, ldc, out + i, ldo);
    for (; i < d; i += width) strip<KB, 1>(x + i, ldx, patches, coef, ldc, out + i, ldo);
  }

  static inline __attribute__((always_inline)) void pool(const T* x, long ldx, int patches, const T* coef, long ldc,
                                                         int count, int d, T* out, long ldo) {
    int k = 0;
    for (; k + 8 <= count; k += 8) block_pool<8>(x, ldx, patches, coef + k * ldc, ldc, d, out + k * ldo, ldo);
    for (; k + 4 <= count; k += 4) block_pool<4>(x, ldx, patches, coef + k * ldc, ldc, d, out + k * ldo, ldo);
    for (; k < count; ++k) block_pool<1>(x, ldx, patches, coef + k * ldc, ldc, d, out + k * ldo, ldo);
  }

  // out[p] = sum_r coef[r][p] rows[r] - radial[p] x[p] for PB patches.
  template <int PB>
  static inline __attribute__((always_inline)) void spread(const T* rows, long ldr, int count, const T* coef, long ldc,
                                                           const T* x, long ldx, const T* radial, int d, T* out,
                                                           long ldo) {
    for (int i = 0; i < d; i += width) {
      vec acc[PB];
      for (int p = 0; p < PB; ++p) acc[p] = -radial[p] * load(x + p * ldx + i);
      for (int r = 0; r < count; ++r) {
        const vec v = load(rows + r * ldr + i);
        for (int p = 0; p < PB; ++p) acc[p] += coef[r * ldc + p] * v;
      }
      for (int p = 0; p < PB; ++p) store(out + p * ldo + i, acc[p]);
    }
  }
};

}  // namespace dreamlip
