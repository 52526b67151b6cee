// The parts of the grouping's CUDA kernels: a block's products with one box of patches (patch_pool.cuh is the whole).
#pragma once

#include "device.cuh"
#include "patch_pool_plan.h"

namespace dreamlip {

// The power of two that numbers up to `largest` are divided by before they are split into two of 16 bits:
// float16 has its full precision only from 2^-14 on, and a low part lies 2^11 below its number.
struct Divisor {
  float value, inverse;

  DREAMLIP_DEVICE explicit Divisor(float largest) {
    constexpr int kExponent = 12;                // of the largest over its divisor
    int exponent = int(word_of(largest) >> 23);  // biased by 127; both powers must be normal numbers
    exponent = exponent < kExponent + 1 ? kExponent + 1 : exponent > 253 ? 253 : exponent;
    value = float_of(uint32_t(exponent - kExponent) << 23);
    inverse = float_of(uint32_t(254 + kExponent - exponent) << 23);
  }
};

template <class T, int KT> struct PatchPool {
  static constexpr int kTexts = 8 * KT;
  static constexpr int kColumns = kRowBytes / sizeof(T);  // of a box
  static constexpr int kChunk = 16 / sizeof(T);           // elements of 16 bytes
  static constexpr int kStep = 32 / sizeof(T);            // terms of a tensor-core product
  static constexpr bool kSplit = sizeof(T) == 2;          // coefficients as a high and a low part
  const PoolShape& s;
  const PoolLayout layout;
  char* memory;
  const int thread, warp, lane;

  DREAMLIP_DEVICE PatchPool(const PoolShape& shape, bool backward, char* shared, int tid)
      : s(shape), layout(shape, KT, backward), memory(shared), thread(tid), warp(tid / 32), lane(tid % 32) {}

  DREAMLIP_DEVICE char* box(int slot) const { return memory + slot * PoolLayout::up(s.box_rows() * kRowBytes); }
  DREAMLIP_DEVICE T* row(int r) const { return reinterpret_cast<T*>(memory + layout.rows) + r * layout.row_pitch; }
  DREAMLIP_DEVICE T* coef(int r) const { return reinterpret_cast<T*>(memory + layout.coef) + r * layout.coef_pitch; }
  DREAMLIP_DEVICE float* sims(int k) const { return reinterpret_cast<float*>(memory + layout.sims) + k * s.p16(); }
  DREAMLIP_DEVICE float* weights(int k) const {
    return reinterpret_cast<float*>(memory + layout.weights) + k * s.p16();
  }
  DREAMLIP_DEVICE float* along() const { return reinterpret_cast<float*>(memory + layout.along); }
  DREAMLIP_DEVICE float* inv_text() const { return along() + kTexts; }
  DREAMLIP_DEVICE float* divisor() const { return along() + 2 * kTexts; }

  // c [16 rows, 8] += a b: fragments of T.
  DREAMLIP_DEVICE static void product(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (kSplit) multiply(c, a, b, T{});
    else multiply<true>(c, a, b, T{});
  }

  // Where chunk c (8 columns) of a box's row r lies; a row beyond the image's patches reads as zeros.
  DREAMLIP_DEVICE char* chunk(char* box, int r, int c) const { return box + r * kRowBytes + ((c ^ (r & 7)) << 4); }
  DREAMLIP_DEVICE const char* chunk_or_zero(char* box, int r, int rows, int c) const {
    return r < rows ? chunk(box, r, c) : memory + layout.zero;
  }

  DREAMLIP_DEVICE int rows_of(int row_box) const {
    return s.P - row_box * s.tall < s.tall ? s.P - row_box * s.tall : s.tall;
  }

  // Starts the copy of one box; every thread calls it, then commits.
  DREAMLIP_DEVICE void fetch(const T* image, int slot, int column_box, int row_box) const {
    const int rows = rows_of(row_box);
    char* to = box(slot);
    for (int i = thread; i < rows * 8; i += kThreads) {
      const int r = i / 8, c = i % 8, column = column_box * kColumns + c * kChunk;
      const bool valid = column < s.D;
      copy_async(chunk(to, r, c), image + (row_box * s.tall + r) * s.x_row + (valid ? column : 0), valid);
    }
  }

  // Zeros the parts that are read beyond what is ever written.
  DREAMLIP_DEVICE void clear() const {
    uint32_t* words = reinterpret_cast<uint32_t*>(memory + layout.zero);
    for (int i = thread; i < (layout.total - layout.zero) / 4; i += kThreads) words[i] = 0;
  }

  // K rows of `stride` elements, D of them used, to row(first ..). By plain loads: copies would have to be counted
  // among the boxes' groups.
  DREAMLIP_DEVICE void load_rows(int first, const T* from, long stride) const {
    const int chunks = s.D / kChunk;
    for (int i = thread; i < s.K * chunks; i += kThreads) {
      const int k = i / chunks, column = i % chunks * kChunk;
      *reinterpret_cast<uint4*>(row(first + k) + column) = *reinterpret_cast<const uint4*>(from + k * stride + column);
    }
  }

  // inv_text[k] = 1 / |t_k| of the rows from `first`; a warp a text.
  DREAMLIP_DEVICE void text_norms(int first) const {
    for (int k = warp; k < s.K; k += kWarps) {
      float square = 0;
      for (int i = lane; i < int(s.D * sizeof(T) / 4); i += 32)
        square += squares<T>(reinterpret_cast<const uint32_t*>(row(first + k))[i]);
      square = WarpLanes{lane}.sum(square);
      if (lane == 0) inv_text()[k] = square == 0 ? 0.f : 1.f / sqrtf(square);
    }
  }

  // Products of one box with the texts at row(first ..): acc[tile][text tile] += 16 patches x 8 texts;
  // with norms also the patches' squares.
  template <bool kNorms>
  DREAMLIP_DEVICE void dots(char* box, int rows, int column_box, int first, float (&acc)[2][KT][4],
                            float (&square)[2][2]) const {
#pragma unroll
    for (int step = 0; step < kColumns / kStep; ++step) {
      uint32_t b[KT][2];
#pragma unroll
      for (int j = 0; j < KT; ++j)
        load_matrices(
            b[j], row(first + 8 * j + (lane & 7)) + column_box * kColumns + step * kStep + ((lane >> 3) & 1) * kChunk);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int r = (warp + tile * kWarps) * 16;
        if (r >= rows) continue;
        uint32_t a[4];
        load_matrices(a, chunk_or_zero(box, r + (lane & 7) + ((lane >> 3) & 1) * 8, rows, step * 2 + (lane >> 4)));
        if (kNorms) {
          square[tile][0] += squares<T>(a[0]) + squares<T>(a[2]);
          square[tile][1] += squares<T>(a[1]) + squares<T>(a[3]);
        }
#pragma unroll
        for (int j = 0; j < KT; ++j) product(acc[tile][j], a, b[j]);
      }
    }
  }

  // The patch whose dots with the texts this lane has in acc[tile] at `half`; -1 beyond the patches.
  DREAMLIP_DEVICE int patch_of(int row_box, int tile, int half) const {
    const int r = (warp + tile * kWarps) * 16 + half * 8 + lane / 4;
    return r < rows_of(row_box) ? row_box * s.tall + r : -1;
  }

  // f(text k, its dot with the patch of `half`) for this lane's texts.
  template <class F> DREAMLIP_DEVICE void each_text(const float (&acc)[KT][4], int half, F f) const {
#pragma unroll
    for (int j = 0; j < KT; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int k = 8 * j + 2 * (lane % 4) + e;
        if (k < s.K) f(k, acc[j][2 * half + e]);
      }
  }

  // Text k's coefficients of the patches, sims(k)[p] * inv[p], over the row's divisor; of 16 bits as high and low
  // parts. A warp's work; a lane reads the similarities that it wrote itself.
  DREAMLIP_DEVICE void put_coefs(int k, const float* inv) const {
    const float* value = sims(k);
    float largest = 0;
    for (int p = lane; p < s.P; p += 32) largest = fmaxf(largest, fabsf(value[p] * inv[p]));
    const Divisor of_row(WarpLanes{lane}.max(largest));
    if (lane == 0) divisor()[k] = of_row.value;
    for (int p = lane; p < s.P; p += 32) {
      const float scaled = value[p] * inv[p] * of_row.inverse;
      const T high = from_float<T>(scaled);
      coef(k)[p] = high;
      if (kSplit) coef(kTexts + k)[p] = from_float<T>(scaled - to_float(high));
    }
  }

  // Where column `column` (even) of a box's row r lies.
  DREAMLIP_DEVICE char* cell(char* box, int r, int column) const {
    return chunk(box, r, column / kChunk) + column % kChunk * sizeof(T);
  }

  // acc += coefficients [texts, patches of the box] @ the eight columns of this warp.
  // With KT = 1 rows 0-7 are the high parts and 8-15 the low ones.
  DREAMLIP_DEVICE void pool(char* box, int rows, int row_box, float (&acc)[4]) const {
    if (warp >= kColumns / 8) return;
    for (int step = 0; step * kStep < rows; ++step) {
      float sum[4] = {};  // a tensor core cuts what it adds to a large sum: the long sum is float32's own
      uint32_t b[2];
      if constexpr (kSplit) {
        load_transposed(b, chunk_or_zero(box, step * kStep + (lane & 15), rows, warp));
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = step * kStep + half * 4 + lane % 4;
          const T zero = from_float<T>(0);
          b[half] = bits_of<T>(r < rows ? reinterpret_cast<const T*>(cell(box, r, warp * 8 + lane / 4)) : &zero);
        }
      }
#pragma unroll
      for (int part = 0; part < (kSplit ? KT : 1); ++part) {
        uint32_t a[4];
        const int k = part * 16 + (lane & 7) + ((lane >> 3) & 1) * 8;
        const T* from = coef(k) + row_box * s.tall + step * kStep + (lane >> 4) * kChunk;
        if (!kSplit && k >= kTexts) from = reinterpret_cast<const T*>(memory + layout.zero);
        load_matrices(a, from);
        product(sum, a, b);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[i] += sum[i];
    }
  }

  // f(text k, columns d and d + 1 of D: their pooled values) for what this lane has of column box `cb`.
  template <class F> DREAMLIP_DEVICE void each_pooled(const float (&acc)[4], int cb, F f) const {
    const int d = cb * kColumns + warp * 8 + 2 * (lane % 4);
    if (warp >= kColumns / 8 || d >= s.D) return;
#pragma unroll
    for (int j = 0; j < KT; ++j) {
      const int k = 8 * j + lane / 4;
      if (k >= s.K) continue;
      const float u = divisor()[k];
      if (KT == 1) f(k, d, (acc[0] + acc[2]) * u, (acc[1] + acc[3]) * u);  // high parts and low parts
      else f(k, d, acc[2 * j] * u, acc[2 * j + 1] * u);
    }
  }
};

}  // namespace dreamlip
