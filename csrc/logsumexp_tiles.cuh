// Tiles of logits on tensor cores: what the kernels of logsumexp.cuh have in common.
//
// A block of four warps makes tiles of 128 x 128 logits, 64 x 64 a warp, one after the other as one stream: while it is
// busy with a step of 64 bytes of depth (32 elements of 16 bits, 16 of float32), the copies of the next two are under
// way, those of the next tile too. Two blocks share a processor, so that the exponentials of one meet the products of
// the other; 49 KB a block let them do so even where a processor has 100 KB.
//
// R rows, S columns, D width.
#pragma once

#include "device.cuh"

namespace dreamlip {

// The operands of a stream: rows [R, D] and columns [S, D], D a multiple of 16 bytes, every row aligned to 16 bytes.
template <class T> struct Sides {
  const T *rows, *cols;
  int R, S, D;
  long row_stride, col_stride;  // in elements
};

// The first row and the first column of a tile.
struct Corner {
  int row, col;
};

template <class T> struct LogitTiles {
  static constexpr int kTile = 128, kThreads = 128, kStages = 3;
  static constexpr int kStepBytes = 64, kDepth = kStepBytes / sizeof(T), kChunk = 16 / sizeof(T);
  static constexpr int kSideBytes = kTile * kStepBytes, kStageBytes = 2 * kSideBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kRingBytes + 2 * kTile * sizeof(float);  // and a value a row for two warps
  static constexpr int kRowTiles = 4, kColTiles = 8;  // of 16 rows and of 8 columns, in a warp's 64 x 64

  using Logits = float[kRowTiles][kColTiles][4];  // a thread's part: rows r and r + 8, two neighboring columns of each

  const Sides<T>& sides;
  char* memory;
  const int thread, lane, warp_row, warp_col;

  DREAMLIP_DEVICE LogitTiles(const Sides<T>& s, char* shared, int tid)
      : sides(s), memory(shared), thread(tid), lane(tid % 32), warp_row(tid / 64), warp_col(tid / 32 % 2) {}

  // Where in the tile this thread's logits [i][j][2 half + e] lie.
  DREAMLIP_DEVICE int row(int i, int half) const { return warp_row * 64 + i * 16 + half * 8 + lane / 4; }
  DREAMLIP_DEVICE int col(int j, int e) const { return warp_col * 64 + j * 8 + 2 * (lane % 4) + e; }
  // [2][128] floats beside the ring.
  DREAMLIP_DEVICE float* exchange(int half) const {
    return reinterpret_cast<float*>(memory + kRingBytes) + half * kTile;
  }

  DREAMLIP_DEVICE int depth_steps() const { return sides.D > kDepth ? (sides.D + kDepth - 1) / kDepth : 1; }

  // Chunk c of row r of one side in a stage. Two rows share a line of 128 bytes: permuted by the pair, eight rows meet
  // every bank once.
  DREAMLIP_DEVICE static int place(int r, int c) { return r * kStepBytes + ((c ^ (r >> 1 & 3)) << 4); }

  DREAMLIP_DEVICE void fetch_side(char* to, const T* from, int first, int count, long stride, int depth) const {
    const int c = thread % 4, d = depth + c * kChunk;
#pragma unroll
    for (int i = 0; i < kTile / 32; ++i) {
      const int r = thread / 4 + 32 * i;
      const bool valid = first + r < count && d < sides.D;
      copy_async(to + place(r, c), valid ? from + long(first + r) * stride + d : from, valid);
    }
  }

  // acc += the product of one stage.
  DREAMLIP_DEVICE void multiply_stage(const char* stage, Logits& acc) const {
    const int chunk = lane >> 4, row_of_a = warp_row * 64 + (lane & 15);
    const int chunk_of_b = lane >> 3 & 1, row_of_b = warp_col * 64 + (lane & 7) + (lane >> 4) * 8;
#pragma unroll
    for (int step = 0; step < kStepBytes / 32; ++step) {
      uint32_t a[kRowTiles][4], b[kColTiles / 2][4];  // b: two tiles of columns at once
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) load_matrices(a[i], stage + place(row_of_a + 16 * i, 2 * step + chunk));
#pragma unroll
      for (int j = 0; j < kColTiles / 2; ++j)
        load_matrices(b[j], stage + kSideBytes + place(row_of_b + 16 * j, 2 * step + chunk_of_b));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
          const uint32_t of_b[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply(acc[i][j], a[i], of_b, T{});
        }
    }
  }

  // use(corner(i), the logits there) for each tile i < `tiles`.
  template <class Place, class Use> DREAMLIP_DEVICE void stream(int tiles, Place corner, Use use) const {
    const int steps = depth_steps();
    int next_tile = 0, next_step = 0, next_stage = 0, stage = 0;
    const auto start = [&] {  // the next copies, if any are left, and a group of them in any case
      if (next_tile < tiles) {
        const Corner at = corner(next_tile);
        char* to = memory + next_stage * kStageBytes;
        fetch_side(to, sides.rows, at.row, sides.R, sides.row_stride, next_step * kDepth);
        fetch_side(to + kSideBytes, sides.cols, at.col, sides.S, sides.col_stride, next_step * kDepth);
        if (++next_step == steps) {
          next_step = 0;
          ++next_tile;
        }
        next_stage = next_stage == kStages - 1 ? 0 : next_stage + 1;
      }
      commit_copies();
    };
    for (int i = 0; i < kStages - 1; ++i) start();
    for (int tile = 0; tile < tiles; ++tile) {
      Logits acc = {};
      for (int step = 0; step < steps; ++step) {
        wait_copies<kStages - 2>();
        sync_block();  // everybody has the stage, and has left the one before it, which is refilled now
        start();
        multiply_stage(memory + stage * kStageBytes, acc);
        stage = stage == kStages - 1 ? 0 : stage + 1;
      }
      use(corner(tile), acc);
    }
    wait_copies<0>();
    sync_block();  // the ring is free
  }

  // f(i, half, j, e) for each logit of this thread.
  template <class F> DREAMLIP_DEVICE static void each_logit(F f) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kColTiles; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) f(i, half, j, e);
  }
};

// Bit 2 j + e says whether column (j, e) of this thread is inside and present.
template <class T>
DREAMLIP_DEVICE uint32_t present_columns(const LogitTiles<T>& tiles, int first_col, const bool* mask) {
  uint32_t present = 0;
#pragma unroll
  for (int j = 0; j < tiles.kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int c = first_col + tiles.col(j, e);
      if (c < tiles.sides.S && is_valid(mask, c)) present |= 1u << (2 * j + e);
    }
  return present;
}

}  // namespace dreamlip
