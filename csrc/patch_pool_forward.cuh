// The grouping's forward kernel, an image at a time (patch_pool.cuh tells the whole).
#pragma once

#include "patch_pool_ring.cuh"

namespace dreamlip {

template <class T, int KT> struct PoolForward {
  using Pool = PatchPool<T, KT>;
  const PoolShape& s;
  const Pool& pool;
  const Ring<T, KT>& ring;
  float* inv;  // [P] inverse patch norms, in shared memory

  // Pass 1 of one image: similarities [K, P] and inverse norms [P] into shared memory, the norms also to inv_norm [P].
  DREAMLIP_DEVICE void similarities(int image, float* inv_norm) const {
    for (int row_box = 0; row_box < s.row_boxes(); ++row_box) {
      float acc[2][KT][4] = {}, square[2][2] = {};
      for (int cb = 0; cb < s.column_boxes(); ++cb) {
        char* box = ring.take(image, row_box * s.column_boxes() + cb);
        pool.template dots<true>(box, pool.rows_of(row_box), cb, 0, acc, square);
      }
      const auto inverse = [&](int tile, int half) {  // of the norm of the patch that four lanes have the squares of
        float sum = square[tile][half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        return sum == 0 ? 0.f : 1.f / sqrtf(sum);
      };
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float inv_p = inverse(tile, half);
          const int p = pool.patch_of(row_box, tile, half);
          if (p < 0) continue;
          if (pool.lane % 4 == 0) inv[p] = inv_norm[p] = inv_p;
          pool.each_text(acc[tile], half,
                         [&](int k, float dot) { pool.sims(k)[p] = dot * pool.inv_text()[k] * inv_p; });
        }
    }
  }

  // The rows between the passes: similarities [K, P] to memory, and weights over norms as coefficients of the patches.
  DREAMLIP_DEVICE void rows(const bool* valid, float* similarity) const {
    for (int k = pool.warp; k < s.K; k += kWarps) {
      float* w = pool.sims(k);
      const Row<float> row = read_row(WarpLanes{pool.lane}, w, valid, s.P, s.options);
      for (int p = pool.lane; p < s.P; p += 32) {
        similarity[k * s.P + p] = w[p];
        w[p] = weight(row, s.options.normalization, w[p], is_valid(valid, p));
      }
      pool.put_coefs(k, inv);
    }
  }

  // Pass 2: pooled [K, D] = coefficients @ patches.
  DREAMLIP_DEVICE void pooled(int image, T* out) const {
    for (int cb = 0; cb < s.column_boxes(); ++cb) {
      float acc[4] = {};
      for (int row_box = 0; row_box < s.row_boxes(); ++row_box) {
        const int step = s.boxes() + cb * s.row_boxes() + row_box;
        char* box = ring.take(image, step);
        pool.pool(box, pool.rows_of(row_box), row_box, acc);
        ring.give(image, step);
      }
      pool.each_pooled(acc, cb, [&](int k, int d, float first, float second) {
        *reinterpret_cast<Pair<T>*>(out + k * s.D + d) = Pair<T>{{from_float<T>(first), from_float<T>(second)}};
      });
    }
  }
};

template <class T, int KT>
DREAMLIP_DEVICE void pool_forward(const PoolShape& s, const T* patches, const T* texts, const bool* mask, T* out,
                                  float* similarity, float* inv_norm, char* shared, int thread, int block, int blocks) {
  const PatchPool<T, KT> pool(s, false, shared, thread);
  const Ring<T, KT> ring{pool, patches, block, blocks};
  const PoolForward<T, KT> forward{s, pool, ring, pool.weights(0)};
  pool.clear();
  sync_block();
  ring.prologue();
  for (int image = 0; image < ring.images(); ++image) {
    const long n = block + long(image) * blocks;
    pool.load_rows(0, texts + n * s.t_image, s.t_row);
    sync_block();
    pool.text_norms(0);
    sync_block();
    forward.similarities(image, inv_norm + n * s.P);
    sync_block();
    forward.rows(mask == nullptr ? nullptr : mask + n * s.P, similarity + n * s.K * s.P);
    sync_block();
    forward.pooled(image, out + n * s.K * s.D);
  }
  wait_copies<0>();
}

}  // namespace dreamlip
