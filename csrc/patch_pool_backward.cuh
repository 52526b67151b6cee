// The grouping's backward kernel, an image at a time (patch_pool.cuh tells the whole).
#pragma once

#include "patch_pool_ring.cuh"

namespace dreamlip {

template <class T, int KT> struct PoolBackward {
  using Pool = PatchPool<T, KT>;
  static constexpr int kTexts = Pool::kTexts, kStep = Pool::kStep;
  static constexpr int kTiles = Pool::kColumns / 8;  // of 8 columns in a box
  static constexpr int kParts = 2 * kTexts / kStep;  // of the rows (upstream | texts), each the depth of one product
  static constexpr int kWord = 4 / sizeof(T);        // elements of 32 bits
  const PoolShape& s;
  const Pool& pool;
  const Ring<T, KT>& ring;
  // [P] in shared memory: inverse patch norms, and after rows() the divisors of the patches' coefficients;
  // coefficients of the patches in their own gradients.
  float *inv, *radial;

  // Pass 1 of one image: the gradients of the weights [K, P] into shared memory.
  DREAMLIP_DEVICE void weight_gradients(int image) const {
    for (int row_box = 0; row_box < s.row_boxes(); ++row_box) {
      float acc[2][KT][4] = {}, unused[2][2];
      for (int cb = 0; cb < s.column_boxes(); ++cb) {
        char* box = ring.take(image, row_box * s.column_boxes() + cb);
        pool.template dots<false>(box, pool.rows_of(row_box), cb, 0, acc, unused);
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int p = pool.patch_of(row_box, tile, half);
          if (p >= 0) pool.each_text(acc[tile], half, [&](int k, float dot) { pool.sims(k)[p] = dot * inv[p]; });
        }
    }
  }

  DREAMLIP_DEVICE Row<float> read(const float* w, const bool* valid) const {
    return read_row(WarpLanes{pool.lane}, w, valid, s.P, s.options);
  }

  // The rows between the passes. sims(k): gradients of the weights -> of the similarities, whose coefficients dt needs.
  // In the end weights(k) and sims(k) are the coefficients of the upstream and text rows in dx, over the patch's
  // divisor.
  DREAMLIP_DEVICE void rows(const bool* valid, const float* similarity, int thread) const {
    const int kind = s.options.normalization;
    for (int k = pool.warp; k < s.K; k += kWarps) {
      const float* w = similarity + k * s.P;
      float *along_patch = pool.weights(k), *dw = pool.sims(k);
      const Row<float> row = read(w, valid);
      for (int p = pool.lane; p < s.P; p += 32) along_patch[p] = weight(row, kind, w[p], is_valid(valid, p)) * dw[p];
      sync_warp();
      const float along = weights_backward(WarpLanes{pool.lane}, row, w, valid, s.P, kind, dw);
      if (pool.lane == 0) pool.along()[k] = along;
      // What text k adds to the gradient along the patch.
      for (int p = pool.lane; p < s.P; p += 32) along_patch[p] += dw[p] * w[p];
      pool.put_coefs(k, inv);
    }
    sync_block();
    for (int p = thread; p < s.P; p += kThreads) {
      float sum = 0;
      for (int k = 0; k < s.K; ++k) sum += pool.weights(k)[p];
      radial[p] = sum * inv[p] * inv[p];
    }
    sync_block();
    for (int k = pool.warp; k < s.K; k += kWarps) {
      const float* w = similarity + k * s.P;
      const Row<float> row = read(w, valid);
      for (int p = pool.lane; p < s.P; p += 32) {
        pool.weights(k)[p] = weight(row, kind, w[p], is_valid(valid, p)) * inv[p];
        pool.sims(k)[p] *= inv[p] * pool.inv_text()[k];
      }
    }
    sync_block();
    for (int p = thread; p < s.P; p += kThreads) {
      float largest = 0;
      for (int k = 0; k < s.K; ++k) largest = fmaxf(largest, fmaxf(fabsf(pool.weights(k)[p]), fabsf(pool.sims(k)[p])));
      const Divisor of_patch(largest);
      inv[p] = of_patch.value;
      for (int k = 0; k < s.K; ++k) {
        pool.weights(k)[p] *= of_patch.inverse;
        pool.sims(k)[p] *= of_patch.inverse;
      }
    }
  }

  // The coefficient of row `row` of (upstream | texts) in the gradient of patch p, over the patch's divisor.
  DREAMLIP_DEVICE float coefficient(int row, int p) const {
    const int k = row % kTexts;
    if (k >= s.K || p >= s.P) return 0;
    return row < kTexts ? pool.weights(k)[p] : pool.sims(k)[p];
  }

  // Coefficients [16 patches from p0, rows of (upstream | texts)] as A fragments of the product: high and low parts.
  DREAMLIP_DEVICE void fragments(int p0, uint32_t (&high)[kParts][4], uint32_t (&low)[kParts][4]) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int p = p0 + pool.lane / 4 + (q & 1) * 8;
        const int row = part * kStep + (q >> 1) * (kStep / 2) + pool.lane % 4 * kWord;
        T hi[2], lo[2];
#pragma unroll
        for (int e = 0; e < kWord; ++e) {
          const float value = coefficient(row + e, p);
          hi[e] = from_float<T>(value);
          lo[e] = from_float<T>(value - to_float(hi[e]));
        }
        high[part][q] = bits_of<T>(hi);
        low[part][q] = bits_of<T>(lo);
      }
  }

  // Rows part * kStep .. of (upstream | texts) at eight columns from d, as a B fragment.
  DREAMLIP_DEVICE void load_part(uint32_t (&b)[2], int part, int d) const {
    if constexpr (Pool::kSplit) {
      load_transposed(b, pool.row(part * kStep + (pool.lane & 15)) + d);
    } else {
      b[0] = bits_of<T>(pool.row(part * kStep + pool.lane % 4) + d + pool.lane / 4);
      b[1] = bits_of<T>(pool.row(part * kStep + 4 + pool.lane % 4) + d + pool.lane / 4);
    }
  }

  // dx of 16 patches from row r0 of a box, into registers: coefficients @ (upstream | texts) - radial x.
  DREAMLIP_DEVICE void patch_gradients(char* box, int rows, int row_box, int cb, int r0,
                                       Pair<T> (&dx)[kTiles][2]) const {
    uint32_t high[kParts][4], low[kParts][4];
    fragments(row_box * s.tall + r0, high, low);
    const int r = r0 + pool.lane / 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int column = tile * 8 + 2 * (pool.lane % 4);
      float d[4] = {};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint32_t b[2];
        load_part(b, part, cb * Pool::kColumns + tile * 8);
        Pool::product(d, high[part], b);
        if constexpr (Pool::kSplit) Pool::product(d, low[part], b);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (r + 8 * half >= rows) continue;
        const int p = row_box * s.tall + r + 8 * half;
        const Pair<T> x = *reinterpret_cast<const Pair<T>*>(pool.cell(box, r + 8 * half, column));
#pragma unroll
        for (int e = 0; e < 2; ++e)
          dx[tile][half].values[e] = from_float<T>(d[2 * half + e] * inv[p] - radial[p] * to_float(x.values[e]));
      }
    }
  }

  // dx of one box to d_patches [P, D], through the box: it leaves in rows of 128 bytes.
  DREAMLIP_DEVICE void spread(char* box, int row_box, int cb, T* d_patches) const {
    const int rows = pool.rows_of(row_box);
    Pair<T> dx[2][kTiles][2];  // of this warp's patches
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int r0 = (pool.warp + tile * kWarps) * 16;
      if (r0 < rows) patch_gradients(box, rows, row_box, cb, r0, dx[tile]);
    }
    sync_block();  // nobody reads the patches any more: their box takes the gradients
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = (pool.warp + tile * kWarps) * 16 + half * 8 + pool.lane / 4;
        if (r >= rows) continue;
#pragma unroll
        for (int c = 0; c < kTiles; ++c)
          *reinterpret_cast<Pair<T>*>(pool.cell(box, r, c * 8 + 2 * (pool.lane % 4))) = dx[tile][c][half];
      }
    sync_block();
    for (int i = pool.thread; i < rows * 8; i += kThreads) {
      const int r = i / 8, c = i % 8, column = cb * Pool::kColumns + c * Pool::kChunk;
      T* to = d_patches + long(row_box * s.tall + r) * s.D + column;
      if (column < s.D) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(pool.chunk(box, r, c));
    }
  }

  // Pass 2: dt [K, D] as forward pools, dx [P, D] box by box.
  DREAMLIP_DEVICE void gradients(int image, T* d_patches, T* d_texts) const {
    for (int cb = 0; cb < s.column_boxes(); ++cb) {
      float acc[4] = {};
      for (int row_box = 0; row_box < s.row_boxes(); ++row_box) {
        const int step = s.boxes() + cb * s.row_boxes() + row_box;
        char* box = ring.take(image, step);
        pool.pool(box, pool.rows_of(row_box), row_box, acc);
        spread(box, row_box, cb, d_patches);
        ring.give(image, step);
      }
      pool.each_pooled(acc, cb, [&](int k, int d, float first, float second) {  // through the text's normalization
        const float inv_t = pool.inv_text()[k], scale = inv_t * pool.along()[k];
        const T* t = pool.row(kTexts + k) + d;
        *reinterpret_cast<Pair<T>*>(d_texts + k * s.D + d) =
            Pair<T>{{from_float<T>((first - to_float(t[0]) * scale) * inv_t),
                     from_float<T>((second - to_float(t[1]) * scale) * inv_t)}};
      });
    }
  }
};

template <class T, int KT>
DREAMLIP_DEVICE void pool_backward(const PoolShape& s, const T* patches, const T* texts, const T* upstream,
                                   const bool* mask, const float* similarity, const float* inv_norm, T* d_patches,
                                   T* d_texts, char* shared, int thread, int block, int blocks) {
  constexpr int kTexts = 8 * KT;
  const PatchPool<T, KT> pool(s, true, shared, thread);
  const Ring<T, KT> ring{pool, patches, block, blocks};
  float* inv = pool.weights(kTexts + 1);
  const PoolBackward<T, KT> backward{s, pool, ring, inv, pool.weights(kTexts)};
  pool.clear();
  sync_block();
  ring.prologue();
  for (int image = 0; image < ring.images(); ++image) {
    const long n = block + long(image) * blocks;
    pool.load_rows(0, upstream + n * s.up_image, s.up_row);
    pool.load_rows(kTexts, texts + n * s.t_image, s.t_row);
    for (int p = thread; p < s.P; p += kThreads) inv[p] = inv_norm[n * s.P + p];
    sync_block();
    pool.text_norms(kTexts);
    backward.weight_gradients(image);
    sync_block();
    backward.rows(mask == nullptr ? nullptr : mask + n * s.P, similarity + n * s.K * s.P, thread);
    sync_block();
    backward.gradients(image, d_patches + n * s.P * s.D, d_texts + n * s.K * s.D);
    sync_block();  // the next image's texts and rows overwrite this one's
  }
  wait_copies<0>();
}

}  // namespace dreamlip
