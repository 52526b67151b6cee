// The grouping op on a CUDA device: a block an image, its patches through a ring of boxes in shared memory, tensor cores for every product.
//
//   forward    pass 1  similarities and norms      box by box, sums in registers, a warp has 16 patches
//              rows    range, threshold, weights   a warp a sub-caption (patch_pool_math.h)
//              pass 2  pooled = weights @ patches  box by box, a warp has 8 columns
//   backward   pass 1  gradients of the weights; rows; pass 2: dt as the pooling, dx through the box it came from, written once
//
// A box is up to 256 patches x 128 bytes of columns (64 of 16 bits, 32 of float32), its 16-byte chunks permuted by the row so that ldmatrix meets no bank twice. Where all boxes
// of an image fit (P = 196, D = 512: 8 boxes, 196 KB) the second pass finds them still there, and each box it has finished is refilled for the next image;
// else both passes stream, the second one from L2. Copies are cp.async on every architecture: 16 bytes a thread, many in flight.
// A block's images are its own from first to last: no atomics, the same bits each time.
//
// float32 products are three TF32 ones.
//
// N images, P patches, K <= 8 KT sub-captions, D width (a multiple of 8).
#pragma once

#include "patch_pool_ring.cuh"

namespace dreamlip {

template <class T, int KT>
DREAMLIP_DEVICE void pool_forward(const PoolShape& s, const T* patches, const T* texts, const bool* mask, T* out, float* similarity, float* inv_norm,
                                  char* shared, int thread, int block, int blocks) {
  using Pool = PatchPool<T, KT>;
  constexpr int kColumns = Pool::kColumns, kChunk = Pool::kChunk;
  const Pool pool(s, false, shared, thread);
  const Ring<T, KT> ring{pool, patches, block, blocks};
  const int lane = pool.lane, warp = pool.warp, boxes = s.boxes(), columns = s.column_boxes(), row_boxes = s.row_boxes();
  float* inv = pool.weights(0);
  pool.clear();
  sync_block();
  ring.prologue();
  for (int image = 0; image < ring.images(); ++image) {
    const long n = block + long(image) * blocks;
    const bool* valid = mask == nullptr ? nullptr : mask + n * s.P;
    // Texts go by plain loads: their copies would have to be counted among the boxes' groups.
    for (int i = thread; i < s.K * (s.D / kChunk); i += kThreads) {
      const int k = i / (s.D / kChunk), c = i % (s.D / kChunk);
      *reinterpret_cast<uint4*>(pool.row(k) + c * kChunk) = *reinterpret_cast<const uint4*>(texts + n * s.t_image + k * s.t_row + c * kChunk);
    }
    sync_block();
    pool.text_norms(0);
    sync_block();
    for (int rb = 0; rb < row_boxes; ++rb) {
      float acc[2][KT][4] = {}, square[2][2] = {};
      for (int cb = 0; cb < columns; ++cb) {
        char* box = ring.take(image, rb * columns + cb);
        pool.template dots<true>(box, pool.rows_of(rb), cb, 0, acc, square);
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = square[tile][half];
          sum += shuffle_xor(sum, 1);
          sum += shuffle_xor(sum, 2);
          const int r = (warp + tile * kWarps) * 16 + half * 8 + lane / 4, p = rb * kBoxRows + r;
          if (r >= pool.rows_of(rb)) continue;
          const float inv_p = sum == 0 ? 0.f : 1.f / sqrtf(sum);
          if (lane % 4 == 0) {
            inv[p] = inv_p;
            inv_norm[n * s.P + p] = inv_p;
          }
#pragma unroll
          for (int j = 0; j < KT; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int k = 8 * j + 2 * (lane % 4) + e;
              if (k < s.K) pool.sims(k)[p] = acc[tile][j][2 * half + e] * pool.inv_text()[k] * inv_p;
            }
        }
    }
    sync_block();
    for (int k = warp; k < s.K; k += kWarps) {
      const float* w = pool.sims(k);
      const Row<float> row = read_row(WarpLanes{lane}, w, valid, s.P, s.options);
      for (int p = lane; p < s.P; p += 32) {
        pool.put_coef(k, p, weight(row, s.options.normalization, w[p], is_valid(valid, p)) * inv[p]);
        similarity[(n * s.K + k) * s.P + p] = w[p];
      }
    }
    sync_block();
    for (int cb = 0; cb < columns; ++cb) {
      float acc[4] = {};
      for (int rb = 0; rb < row_boxes; ++rb) {
        const int step = boxes + cb * row_boxes + rb;
        char* box = ring.take(image, step);
        pool.pool(box, pool.rows_of(rb), rb, acc);
        ring.give(image, step);
      }
      float value[KT][2];
      pool.pooled(acc, value);
      const int d = cb * kColumns + warp * 8 + 2 * (lane % 4);
#pragma unroll
      for (int j = 0; j < KT; ++j) {
        const int k = 8 * j + lane / 4;
        if (warp < kColumns / 8 && k < s.K && d < s.D)
          *reinterpret_cast<Pair<T>*>(out + (n * s.K + k) * s.D + d) = Pair<T>{{from_float<T>(value[j][0]), from_float<T>(value[j][1])}};
      }
    }
  }
  wait_copies<0>();
}

template <class T, int KT>
DREAMLIP_DEVICE void pool_backward(const PoolShape& s, const T* patches, const T* texts, const T* upstream, const bool* mask, const float* similarity,
                                   const float* inv_norm, T* d_patches, T* d_texts, char* shared, int thread, int block, int blocks) {
  using Pool = PatchPool<T, KT>;
  constexpr int kTexts = 8 * KT, kColumns = Pool::kColumns, kChunk = Pool::kChunk, kStep = Pool::kStep;
  constexpr int kTiles = kColumns / 8, kParts = 2 * kTexts / kStep;  // of 8 columns; of the rows (upstream | texts)
  const Pool pool(s, true, shared, thread);
  const Ring<T, KT> ring{pool, patches, block, blocks};
  const int lane = pool.lane, warp = pool.warp, boxes = s.boxes(), columns = s.column_boxes(), row_boxes = s.row_boxes();
  float *radial = pool.weights(kTexts), *inv = pool.weights(kTexts + 1);
  pool.clear();
  sync_block();
  ring.prologue();
  for (int image = 0; image < ring.images(); ++image) {
    const long n = block + long(image) * blocks;
    const bool* valid = mask == nullptr ? nullptr : mask + n * s.P;
    for (int i = thread; i < 2 * s.K * (s.D / kChunk); i += kThreads) {
      const int r = i / (s.D / kChunk), c = i % (s.D / kChunk), k = r % s.K;
      const T* from = r < s.K ? upstream + n * s.up_image + k * s.up_row : texts + n * s.t_image + k * s.t_row;
      *reinterpret_cast<uint4*>(pool.row(r < s.K ? k : kTexts + k) + c * kChunk) = *reinterpret_cast<const uint4*>(from + c * kChunk);
    }
    for (int p = thread; p < s.P; p += kThreads) inv[p] = inv_norm[n * s.P + p];
    sync_block();
    pool.text_norms(kTexts);
    for (int rb = 0; rb < row_boxes; ++rb) {
      float acc[2][KT][4] = {}, unused[2][2];
      for (int cb = 0; cb < columns; ++cb) {
        char* box = ring.take(image, rb * columns + cb);
        pool.template dots<false>(box, pool.rows_of(rb), cb, 0, acc, unused);
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = (warp + tile * kWarps) * 16 + half * 8 + lane / 4, p = rb * kBoxRows + r;
          if (r >= pool.rows_of(rb)) continue;
#pragma unroll
          for (int j = 0; j < KT; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int k = 8 * j + 2 * (lane % 4) + e;
              if (k < s.K) pool.sims(k)[p] = acc[tile][j][2 * half + e] * inv[p];
            }
        }
    }
    sync_block();
    // Rows: weights a stay for the radial part, da becomes dw, whose coefficients are what dt needs.
    for (int k = warp; k < s.K; k += kWarps) {
      const float* w = similarity + (n * s.K + k) * s.P;
      float *a = pool.weights(k), *dw = pool.sims(k);
      const Row<float> row = read_row(WarpLanes{lane}, w, valid, s.P, s.options);
      for (int p = lane; p < s.P; p += 32) a[p] = weight(row, s.options.normalization, w[p], is_valid(valid, p)) * dw[p];  // a da
      sync_warp();
      const float along = weights_backward(WarpLanes{lane}, row, w, valid, s.P, s.options.normalization, dw);
      if (lane == 0) pool.along()[k] = along;
      for (int p = lane; p < s.P; p += 32) {
        a[p] += dw[p] * w[p];  // what text k adds to the gradient along the patch
        pool.put_coef(k, p, dw[p] * inv[p]);
      }
    }
    sync_block();
    for (int p = thread; p < s.P; p += kThreads) {
      float sum = 0;
      for (int k = 0; k < s.K; ++k) sum += pool.weights(k)[p];
      radial[p] = sum * inv[p] * inv[p];
    }
    sync_block();
    // From here weights(k) are the coefficients of the upstream rows: a inv.
    for (int k = warp; k < s.K; k += kWarps) {
      const float* w = similarity + (n * s.K + k) * s.P;
      const Row<float> row = read_row(WarpLanes{lane}, w, valid, s.P, s.options);
      for (int p = lane; p < s.P; p += 32) pool.weights(k)[p] = weight(row, s.options.normalization, w[p], is_valid(valid, p)) * inv[p];
    }
    sync_block();
    for (int cb = 0; cb < columns; ++cb) {
      float acc[4] = {};
      for (int rb = 0; rb < row_boxes; ++rb) {
        const int step = boxes + cb * row_boxes + rb, rows = pool.rows_of(rb);
        char* box = ring.take(image, step);
        pool.pool(box, rows, rb, acc);
        Pair<T> kept[2][kTiles][2];  // dx of this warp's patches
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const int r0 = (warp + tile * kWarps) * 16;
          if (r0 >= rows) continue;
          // Coefficients [16 patches, rows of (upstream | texts)] built from the floats, as A fragments of mma: high and, of 16 bits, low parts.
          uint32_t high[kParts][4], low[kParts][4];
#pragma unroll
          for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int q = 0; q < 4; ++q) {
              T hi[2], lo[2];
#pragma unroll
              for (int e = 0; e < int(4 / sizeof(T)); ++e) {
                const int p = rb * kBoxRows + r0 + lane / 4 + (q & 1) * 8;
                const int row = part * kStep + (q >> 1) * (kStep / 2) + lane % 4 * int(4 / sizeof(T)) + e, k = row % kTexts;
                float value = 0;
                if (k < s.K && p < s.P) value = row < kTexts ? pool.weights(k)[p] : pool.sims(k)[p] * inv[p] * pool.inv_text()[k];
                hi[e] = from_float<T>(value);
                lo[e] = from_float<T>(value - to_float(hi[e]));
              }
              high[part][q] = bits_of<T>(hi);
              low[part][q] = bits_of<T>(lo);
            }
          const int r = r0 + lane / 4;
          const float radial_0 = r < rows ? radial[rb * kBoxRows + r] : 0, radial_1 = r + 8 < rows ? radial[rb * kBoxRows + r + 8] : 0;
#pragma unroll
          for (int c = 0; c < kTiles; ++c) {
            const int column = c * 8 + 2 * (lane % 4);
            Pair<T> x0 = {{from_float<T>(0), from_float<T>(0)}}, x1 = x0;
            if (r < rows) x0 = *reinterpret_cast<const Pair<T>*>(pool.cell(box, r, column));
            if (r + 8 < rows) x1 = *reinterpret_cast<const Pair<T>*>(pool.cell(box, r + 8, column));
            float d[4] = {-radial_0 * to_float(x0.values[0]), -radial_0 * to_float(x0.values[1]), -radial_1 * to_float(x1.values[0]),
                          -radial_1 * to_float(x1.values[1])};
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
              uint32_t b[2];
              if constexpr (Pool::kSplit) {
                load_transposed(b, pool.row(part * kStep + (lane & 15)) + cb * kColumns + c * 8);
              } else {
                b[0] = bits_of<T>(pool.row(part * kStep + lane % 4) + cb * kColumns + c * 8 + lane / 4);
                b[1] = bits_of<T>(pool.row(part * kStep + 4 + lane % 4) + cb * kColumns + c * 8 + lane / 4);
              }
              multiply(d, high[part], b, T{});
              if constexpr (Pool::kSplit) multiply(d, low[part], b, T{});
            }
            kept[tile][c][0] = Pair<T>{{from_float<T>(d[0]), from_float<T>(d[1])}};
            kept[tile][c][1] = Pair<T>{{from_float<T>(d[2]), from_float<T>(d[3])}};
          }
        }
        sync_block();  // nobody reads the patches any more: their box takes the gradients, and leaves in rows of 128 bytes
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const int r = (warp + tile * kWarps) * 16 + lane / 4;
#pragma unroll
          for (int c = 0; c < kTiles; ++c) {
            const int column = c * 8 + 2 * (lane % 4);
            if (r < rows) *reinterpret_cast<Pair<T>*>(pool.cell(box, r, column)) = kept[tile][c][0];
            if (r + 8 < rows) *reinterpret_cast<Pair<T>*>(pool.cell(box, r + 8, column)) = kept[tile][c][1];
          }
        }
        sync_block();
        for (int i = thread; i < rows * 8; i += kThreads) {
          const int r = i / 8, c = i % 8, column = cb * kColumns + c * kChunk;
          if (column < s.D)
            *reinterpret_cast<uint4*>(d_patches + (n * s.P + rb * kBoxRows + r) * s.D + column) = *reinterpret_cast<const uint4*>(pool.chunk(box, r, c));
        }
        ring.give(image, step);
      }
      float value[KT][2];
      pool.pooled(acc, value);
      const int d = cb * kColumns + warp * 8 + 2 * (lane % 4);
#pragma unroll
      for (int j = 0; j < KT; ++j) {
        const int k = 8 * j + lane / 4;
        if (warp < kColumns / 8 && k < s.K && d < s.D) {
          const float inv_t = pool.inv_text()[k], scale = inv_t * pool.along()[k];
          const T* t = pool.row(kTexts + k) + d;
          *reinterpret_cast<Pair<T>*>(d_texts + (n * s.K + k) * s.D + d) =
              Pair<T>{{from_float<T>((value[j][0] - to_float(t[0]) * scale) * inv_t), from_float<T>((value[j][1] - to_float(t[1]) * scale) * inv_t)}};
        }
      }
    }
    sync_block();  // the next image's texts and rows overwrite this one's
  }
  wait_copies<0>();
}

#ifdef __CUDACC__
template <class T, int KT>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ PoolShape shape, const T* patches, const T* texts, const bool* mask, T* pooled,
                                                           float* similarity, float* inv_norm) {
  extern __shared__ __align__(128) char shared[];
  pool_forward<T, KT>(shape, patches, texts, mask, pooled, similarity, inv_norm, shared, threadIdx.x, blockIdx.x, gridDim.x);
}

template <class T, int KT>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ PoolShape shape, const T* patches, const T* texts, const T* upstream,
                                                            const bool* mask, const float* similarity, const float* inv_norm, T* d_patches, T* d_texts) {
  extern __shared__ __align__(128) char shared[];
  pool_backward<T, KT>(shape, patches, texts, upstream, mask, similarity, inv_norm, d_patches, d_texts, shared, threadIdx.x, blockIdx.x, gridDim.x);
}
#endif

}  // namespace dreamlip
