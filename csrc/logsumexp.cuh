// The kernels of bidirectional_logsumexp on a CUDA device (docs/math.md section 1). Beside them stands
// dreamlip_kernels/ops/logsumexp/kernels, the same in Triton; what surrounds both is torch code.
//
//   exp_sums    a band of rows x one tile of columns a block: both sums of exp2(slope x . y - offset) in one pass
//   finish      their totals' logarithms; again with running maxima where a total left float32's range
//   pairs       the logits of the pairs (diagonal + j, j)
//   gradient    G = a exp(z - row) + b exp(z - col), a tile a block, rounded once
//
// No atomics: each sum is one block's own, in an order that nothing changes. Logits never leave the registers.
//
// M rows, C columns, K slots, D width.
#pragma once

#include "logsumexp_tiles.cuh"

namespace dreamlip {

// What is known of the rows or of the columns: which are present, and of which images they are; either may be null.
struct Labels {
  const bool* mask;
  const int* images;
};

// x [M, D], y [K, C, D], masks [M] and [K, C] or null. Numbers of images, [M] and [C] or null: pairs of equal ones, a
// row's own too, are left out of everything.
template <class T> struct Rectangle {
  const T *x, *y;
  const bool *x_mask, *y_mask;
  const int *x_images, *y_images;
  int M, C, K, D;
  long x_row, y_slot, y_row;  // strides in elements

  DREAMLIP_HD Sides<T> slot(int k) const { return {x, y + k * y_slot, M, C, D, x_row, y_row}; }
  DREAMLIP_HD Sides<T> slot_transposed(int k) const { return {y + k * y_slot, x, C, M, D, y_row, x_row}; }
  DREAMLIP_HD const bool* mask_of(int k) const { return y_mask == nullptr ? nullptr : y_mask + long(k) * C; }
  DREAMLIP_HD Labels row_labels() const { return {x_mask, x_images}; }
  DREAMLIP_HD Labels column_labels(int k) const { return {mask_of(k), y_images}; }
  DREAMLIP_DEVICE bool keeps_row(int m) const { return m < M && is_valid(x_mask, m); }
};

// Bit 2 j + e says whether column (j, e) of this thread is of row m's image. Asked row by row: nothing is read or held
// where images are not compared.
template <class T>
DREAMLIP_DEVICE uint32_t columns_of_image(const LogitTiles<T>& tiles, int m, int first_col, const int* row_images,
                                          const int* col_images) {
  if (row_images == nullptr || m >= tiles.sides.R) return 0;
  const int image = row_images[m];
  uint32_t same = 0;
#pragma unroll
  for (int j = 0; j < tiles.kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int c = first_col + tiles.col(j, e);
      if (c < tiles.sides.S && col_images[c] == image) same |= 1u << (2 * j + e);
    }
  return same;
}

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// Binary exponents: of the largest term that unit vectors may have, and of the sums that are right to float32.
constexpr float kLargestTerm = 106, kSmallestSum = -82, kLargestSum = 126;

// exp2(slope x . y - offset). *scale bounds the logits of unit vectors; *multiplier, of the operands' products, has the
// divisors of float32 features too. The offset nearest 0 rounds least.
struct Exponent {
  const float *scale, *multiplier;

  DREAMLIP_DEVICE float slope() const { return *multiplier * kLog2E; }
  DREAMLIP_DEVICE float offset() const {
    const float bound = fabsf(*scale) * kLog2E;
    return fmaxf(bound - kLargestTerm, fminf(0.f, -kSmallestSum - bound));
  }
};

// Which part of the sums a launch makes: `tiles` tiles of columns from first_tile, bands of band_rows rows.
struct Bands {
  int first_tile, tiles, band_rows;
};

// row [K, tiles, M]: sums over each tile of columns; col [bands, K, C]: sums over each band of rows.
template <class T>
DREAMLIP_DEVICE void exp_sums(const Rectangle<T>& r, Exponent exponent, Bands bands, float* row, float* col,
                              char* shared, int thread, int band, int tile, int k) {
  using Tiles = LogitTiles<T>;
  const Sides<T> sides = r.slot(k);
  const Tiles logits(sides, shared, thread);
  const int first_col = (bands.first_tile + tile) * Tiles::kTile, first = band * bands.band_rows;
  const int rows = r.M - first < bands.band_rows ? r.M - first : bands.band_rows;
  const float slope = exponent.slope(), offset = exponent.offset();
  const uint32_t present = present_columns(logits, first_col, r.mask_of(k));
  row += (long(k) * bands.tiles + tile) * r.M;
  col += (long(band) * r.K + k) * r.C;
  float columns[Tiles::kColTiles][2] = {};

  const auto both_sums = [&](Corner at, const typename Tiles::Logits& acc) {
    float sums[Tiles::kRowTiles][2] = {};
    uint32_t present_here = 0;
    Tiles::each_logit([&](int i, int half, int j, int e) {
      const int m = at.row + logits.row(i, half);
      if (j == 0 && e == 0) present_here = present & ~columns_of_image(logits, m, at.col, r.x_images, r.y_images);
      const float term = power_of_two(acc[i][j][2 * half + e] * slope - offset);
      const bool keep = r.keeps_row(m) && (present_here >> (2 * j + e) & 1);
      sums[i][half] += keep ? term : 0.f;
      columns[j][e] += keep ? term : 0.f;
    });
#pragma unroll
    for (int i = 0; i < Tiles::kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& sum = sums[i][half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (logits.lane % 4 == 0) logits.exchange(logits.warp_col)[logits.row(i, half)] = sum;
      }
    sync_block();  // the next tile's sums come after the barriers of its products
    if (at.row + thread < r.M) row[at.row + thread] = logits.exchange(0)[thread] + logits.exchange(1)[thread];
  };
  const auto corner = [&](int i) { return Corner{first + i * Tiles::kTile, first_col}; };
  logits.stream((rows + Tiles::kTile - 1) / Tiles::kTile, corner, both_sums);

#pragma unroll
  for (int j = 0; j < Tiles::kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& sum = columns[j][e];
      for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
      if (logits.lane < 4) logits.exchange(logits.warp_row)[logits.col(j, e)] = sum;
    }
  sync_block();
  if (first_col + thread < r.C) col[first_col + thread] = logits.exchange(0)[thread] + logits.exchange(1)[thread];
}

// A sum of powers of two, total * 2^top with top its largest exponent.
struct ScaledSum {
  float top, total;

  DREAMLIP_DEVICE static float shift(float top) { return top == -INFINITY ? 0.f : top; }
  DREAMLIP_DEVICE void add(float other_top, float other_total) {
    const float largest = fmaxf(top, other_top), by = shift(largest);
    total = total * power_of_two(top - by) + other_total * power_of_two(other_top - by);
    top = largest;
  }
};

// out[r] = log(sum over s of exp2(slope rows[r] . cols[s])) for the 128 rows from first_row; -inf where masked.
template <class T>
DREAMLIP_DEVICE void exact_rows(const Sides<T>& sides, const Labels& row_labels, const Labels& col_labels, float slope,
                                float* out, char* shared, int thread, int first_row) {
  using Tiles = LogitTiles<T>;
  const Tiles logits(sides, shared, thread);
  ScaledSum sums[Tiles::kRowTiles][2];
#pragma unroll
  for (int i = 0; i < Tiles::kRowTiles; ++i) sums[i][0] = sums[i][1] = {-INFINITY, 0.f};

  const auto corner = [&](int i) { return Corner{first_row, i * Tiles::kTile}; };
  logits.stream((sides.S + Tiles::kTile - 1) / Tiles::kTile, corner, [&](Corner at, typename Tiles::Logits& acc) {
    const uint32_t present = present_columns(logits, at.col, col_labels.mask);
    uint32_t present_here = 0;
    float top[Tiles::kRowTiles][2], total[Tiles::kRowTiles][2] = {};
#pragma unroll
    for (int i = 0; i < Tiles::kRowTiles; ++i) top[i][0] = top[i][1] = -INFINITY;
    Tiles::each_logit([&](int i, int half, int j, int e) {
      if (j == 0 && e == 0)
        present_here = present & ~columns_of_image(logits, at.row + logits.row(i, half), at.col, row_labels.images,
                                                   col_labels.images);
      float& z = acc[i][j][2 * half + e];
      z = present_here >> (2 * j + e) & 1 ? z * slope : -INFINITY;
      top[i][half] = fmaxf(top[i][half], z);
    });
    Tiles::each_logit([&](int i, int half, int j, int e) {
      total[i][half] += power_of_two(acc[i][j][2 * half + e] - ScaledSum::shift(top[i][half]));
    });
#pragma unroll
    for (int i = 0; i < Tiles::kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) sums[i][half].add(top[i][half], total[i][half]);
  });

  ScaledSum* parts = reinterpret_cast<ScaledSum*>(shared);  // [2, 128]: of the two warps that share a row
#pragma unroll
  for (int i = 0; i < Tiles::kRowTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ScaledSum& sum = sums[i][half];
      for (int mask = 1; mask <= 2; mask *= 2) {
        const float top = shuffle_xor(sum.top, mask), total = shuffle_xor(sum.total, mask);
        sum.add(top, total);
      }
      if (logits.lane % 4 == 0) parts[logits.warp_col * Tiles::kTile + logits.row(i, half)] = sum;
    }
  sync_block();
  ScaledSum sum = parts[thread];
  sum.add(parts[Tiles::kTile + thread].top, parts[Tiles::kTile + thread].total);
  const float value = (ScaledSum::shift(sum.top) + log2f(sum.total)) * kLn2;
  if (first_row + thread < sides.R)
    out[first_row + thread] = is_valid(row_labels.mask, first_row + thread) ? value : -INFINITY;
}

// Partial sums [K, parts, rows] of one side: elements from part to part, and from slot to slot.
struct Parts {
  const float* sums;
  int parts;
  long part_stride, slot_stride;
};

// out[r] = log-sum-exps of the 128 rows from first_row, from the parts of one slot; -inf where masked.
template <class T>
DREAMLIP_DEVICE void finish(const Sides<T>& sides, const Labels& row_labels, const Labels& col_labels,
                            Exponent exponent, Parts parts, float* out, char* shared, int thread, int first_row) {
  const LogitTiles<T> logits(sides, shared, thread);
  const int r = first_row + thread;
  const bool keep = r < sides.R && is_valid(row_labels.mask, r);
  float total = 0;
  for (int part = 0; keep && part < parts.parts; ++part) total += parts.sums[part * parts.part_stride + r];
  const float exponent_of_sum = log2f(total);  // a NaN is out of range too
  const bool left = any_lane(keep && !(exponent_of_sum >= kSmallestSum && exponent_of_sum <= kLargestSum));
  if (logits.lane == 0) logits.exchange(0)[thread / 32] = left;
  if (r < sides.R) out[r] = keep ? (exponent_of_sum + exponent.offset()) * kLn2 : -INFINITY;
  sync_block();
  const float* warps = logits.exchange(0);
  if (warps[0] + warps[1] + warps[2] + warps[3] != 0)
    exact_rows(sides, row_labels, col_labels, exponent.slope(), out, shared, thread, first_row);
}

// pos[c] = *multiplier x[diagonal + c] . y[c] for the 128 columns from first_col that have a row: the diagonal of a
// tile, so that a pair's logit is the same sum here and in exp_sums. A tensor core cuts what it adds, and a positive
// without that error is no part of the sum that it is divided by: the scale's gradient, left over where positives and
// sums cancel, would be off by hundreds of the error of a logit.
template <class T>
DREAMLIP_DEVICE void pairs(const Rectangle<T>& r, Exponent exponent, int diagonal, float* pos, char* shared, int thread,
                           int first_col, int k) {
  using Tiles = LogitTiles<T>;
  const Sides<T> sides = r.slot(k);
  const Tiles logits(sides, shared, thread);
  const float multiplier = *exponent.multiplier;
  const int stop = r.C < r.M - diagonal ? r.C : r.M - diagonal;
  const auto corner = [&](int) { return Corner{first_col + diagonal, first_col}; };
  logits.stream(1, corner, [&](Corner at, const typename Tiles::Logits& acc) {
    Tiles::each_logit([&](int i, int half, int j, int e) {
      const int c = logits.col(j, e);
      if (logits.row(i, half) == c && at.col + c < stop) pos[at.col + c] = acc[i][j][2 * half + e] * multiplier;
    });
  });
}

#ifdef __CUDACC__
template <class T>
__global__ void __launch_bounds__(LogitTiles<T>::kThreads, 2)
    exp_sums_kernel(const __grid_constant__ Rectangle<T> r, Exponent exponent, Bands bands, float* row, float* col) {
  extern __shared__ __align__(128) char shared[];
  exp_sums(r, exponent, bands, row, col, shared, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}

// out [K, M], or with `transposed` [K, C].
template <class T>
__global__ void __launch_bounds__(LogitTiles<T>::kThreads, 2)
    finish_kernel(const __grid_constant__ Rectangle<T> r, Exponent exponent, Parts parts, bool transposed, float* out) {
  extern __shared__ __align__(128) char shared[];
  const int k = blockIdx.y;
  parts.sums += k * parts.slot_stride;
  if (transposed)
    finish(r.slot_transposed(k), r.column_labels(k), r.row_labels(), exponent, parts, out + long(k) * r.C, shared,
           threadIdx.x, blockIdx.x * LogitTiles<T>::kTile);
  else
    finish(r.slot(k), r.row_labels(), r.column_labels(k), exponent, parts, out + long(k) * r.M, shared, threadIdx.x,
           blockIdx.x * LogitTiles<T>::kTile);
}

// out [K, C], from column first_col on.
template <class T>
__global__ void __launch_bounds__(LogitTiles<T>::kThreads, 2)
    pairs_kernel(const __grid_constant__ Rectangle<T> r, Exponent exponent, int diagonal, int first_col, float* out) {
  extern __shared__ __align__(128) char shared[];
  const int k = blockIdx.y;
  pairs(r, exponent, diagonal, out + long(k) * r.C, shared, threadIdx.x, first_col + blockIdx.x * LogitTiles<T>::kTile,
        k);
}
#endif

}  // namespace dreamlip
