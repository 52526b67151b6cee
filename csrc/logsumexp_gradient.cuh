// The gradient's coefficients G of bidirectional_logsumexp (logsumexp.cuh tells the whole).
#pragma once

#include "logsumexp.cuh"

#include <type_traits>

namespace dreamlip {

// What G is made of. rows [3, K, M]: the coefficient of exp2(z - offset); for the exact path the log-sum-exp in powers
// of two and the upstream gradient. cols [3, K, C] likewise.
struct Coefficients {
  const float *rows, *cols;
  long row_part, row_slot, col_part, col_slot;  // strides in floats
};

// The rectangle of G that a launch makes: rows from first_row, columns from first_col, slots from first_slot.
struct Chunk {
  int first_row, rows, first_col, cols, first_slot, slots;
  long pitch, slot_pitch;  // elements from row to row of G, and from slot to slot
  int diagonal;            // the pairs (diagonal + j, j) are left 0
  bool has_diagonal;
};

// The tile `acc` into g at (first_row, first_col), through the ring: rows leave in pieces of 16 bytes.
template <class T>
DREAMLIP_DEVICE void store_tile(const LogitTiles<T>& logits, const typename LogitTiles<T>::Logits& acc, T* g,
                                const Chunk& chunk, int first_row, int first_col) {
  using Tiles = LogitTiles<T>;
  constexpr int kParts = sizeof(T) / 2, kRows = Tiles::kTile / kParts;  // float32 in two halves, of 64 rows each
  constexpr int kPitch = Tiles::kTile + Tiles::kChunk, kChunks = Tiles::kTile / Tiles::kChunk;
  static_assert(kRows * kPitch * sizeof(T) <= Tiles::kRingBytes);
  T* staged = reinterpret_cast<T*>(logits.memory);
  const bool aligned = chunk.pitch % Tiles::kChunk == 0 && chunk.slot_pitch % Tiles::kChunk == 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    sync_block();
    if (kParts == 1 || logits.warp_row == part)
      Tiles::each_logit([&](int i, int half, int j, int e) {
        if (e == 0)
          *reinterpret_cast<Pair<T>*>(staged + (logits.row(i, half) - part * kRows) * kPitch + logits.col(j, 0)) =
              Pair<T>{{from_float<T>(acc[i][j][2 * half]), from_float<T>(acc[i][j][2 * half + 1])}};
      });
    sync_block();
    for (int q = logits.thread; q < kRows * kChunks; q += Tiles::kThreads) {
      const int r = q / kChunks, c = q % kChunks * Tiles::kChunk, row = first_row + part * kRows + r;
      if (row >= chunk.rows) break;
      const T* from = staged + r * kPitch + c;
      T* to = g + row * chunk.pitch + first_col + c;
      const int left = chunk.cols - first_col - c;
      if (aligned && left >= Tiles::kChunk) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      else
        for (int e = 0; e < Tiles::kChunk && e < left; ++e) to[e] = from[e];
    }
  }
}

// The tile (tile_row, tile_col) of G for slot chunk.first_slot + slot.
template <class T>
DREAMLIP_DEVICE void gradient(const Rectangle<T>& r, const Coefficients& coefficients, const Chunk& chunk,
                              Exponent exponent, bool flag, T* g, char* shared, int thread, int tile_row, int tile_col,
                              int slot) {
  using Tiles = LogitTiles<T>;
  const int k = chunk.first_slot + slot;
  const Sides<T> sides = r.slot(k);
  const Tiles logits(sides, shared, thread);
  const float *of_row = coefficients.rows + k * coefficients.row_slot,
              *of_col = coefficients.cols + k * coefficients.col_slot;

  // acc -> G, by one power of two a pair, or exactly by two that are always in range.
  const auto coefficients_of = [&](Corner at, typename Tiles::Logits& acc, auto exact) {
    constexpr bool kExact = decltype(exact)::value;
    constexpr int kVectors = kExact ? 2 : 1, kFirst = kExact ? 1 : 0;
    const float slope = exponent.slope(), offset = exponent.offset();
    const uint32_t present = present_columns(logits, at.col, r.mask_of(k));
    float col[kVectors][Tiles::kColTiles][2];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
      for (int j = 0; j < Tiles::kColTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          col[v][j][e] = present >> (2 * j + e) & 1
                             ? of_col[(kFirst + v) * coefficients.col_part + at.col + logits.col(j, e)]
                             : 0.f;
    const bool crossed = chunk.has_diagonal && at.row < at.col + chunk.diagonal + Tiles::kTile &&
                         at.col + chunk.diagonal < at.row + Tiles::kTile;
    uint32_t present_here = 0;
    Tiles::each_logit([&](int i, int half, int j, int e) {
      const int m = at.row + logits.row(i, half);
      if (j == 0 && e == 0) present_here = present & ~columns_of_image(logits, m, at.col, r.x_images, r.y_images);
      const bool keep = r.keeps_row(m) && (present_here >> (2 * j + e) & 1) &&
                        !(crossed && m == at.col + logits.col(j, e) + chunk.diagonal);
      const float* row = of_row + kFirst * coefficients.row_part + (m < r.M ? m : 0);
      float& value = acc[i][j][2 * half + e];
      const float z = value * slope;
      if constexpr (kExact)
        value = power_of_two(z - row[0]) * row[coefficients.row_part] + power_of_two(z - col[0][j][e]) * col[1][j][e];
      else value = power_of_two(z - offset) * (row[0] + col[0][j][e]);
      if (!keep) value = 0;
    });
  };
  const auto corner = [&](int) {
    return Corner{chunk.first_row + tile_row * Tiles::kTile, chunk.first_col + tile_col * Tiles::kTile};
  };
  logits.stream(1, corner, [&](Corner at, typename Tiles::Logits& acc) {
    if (flag) coefficients_of(at, acc, std::true_type{});
    else coefficients_of(at, acc, std::false_type{});
    store_tile(logits, acc, g + slot * chunk.slot_pitch, chunk, tile_row * Tiles::kTile, tile_col * Tiles::kTile);
  });
}

#ifdef __CUDACC__
// A block a tile; eight rows of tiles go down before the next column, so that what they share stays in the L2 cache.
template <class T>
__global__ void __launch_bounds__(LogitTiles<T>::kThreads, 2)
    gradient_kernel(const __grid_constant__ Rectangle<T> r, const __grid_constant__ Coefficients coefficients,
                    const __grid_constant__ Chunk chunk, Exponent exponent, const int* flag, T* g) {
  extern __shared__ __align__(128) char shared[];
  constexpr int kGroup = 8, kTile = LogitTiles<T>::kTile;
  const int down = (chunk.rows + kTile - 1) / kTile, across = (chunk.cols + kTile - 1) / kTile;
  const int group = blockIdx.x / (kGroup * across), first = group * kGroup;
  const int rows = down - first < kGroup ? down - first : kGroup, within = blockIdx.x - group * kGroup * across;
  gradient(r, coefficients, chunk, exponent, *flag != 0, g, shared, threadIdx.x, first + within % rows, within / rows,
           blockIdx.y);
}
#endif

}  // namespace dreamlip
