// How much shared memory a block of the grouping's CUDA kernels takes, and the largest tiles that fit; host and device,
// and no CUDA header, so that a build without CUDA can answer for a shape too.
#pragma once

#include "patch_pool_math.h"

namespace dreamlip {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRowBytes = 128;  // of a box
constexpr int kMostBoxRows = 256, kLeastBoxRows = 32;
constexpr int kMostTexts = 16;  // a pass over the patches

struct PoolShape {
  int N, P, K, D;
  long x_image, x_row, t_image, t_row, up_image, up_row;  // strides in elements; the last dimension's is 1
  RowOptions<float> options;
  int element;    // bytes of one
  int slots;      // boxes in the ring
  bool resident;  // all boxes of an image are in it (P <= 256)
  int tall;       // patches of a box at most, a multiple of 16

  DREAMLIP_HD int box_columns() const { return kRowBytes / element; }
  DREAMLIP_HD int column_boxes() const { return (D + box_columns() - 1) / box_columns(); }
  DREAMLIP_HD int row_boxes() const { return (P + tall - 1) / tall; }
  DREAMLIP_HD int boxes() const { return column_boxes() * row_boxes(); }
  DREAMLIP_HD int box_rows() const { return P < tall ? P : tall; }
  DREAMLIP_HD int p16() const { return (P + 15) / 16 * 16; }
};

// Offsets in bytes of the parts of shared memory, after the ring.
struct PoolLayout {
  int zero;     // 128 bytes of zeros
  int rows;     // [texts, D] forward; [2 texts, D] backward: upstream gradients, texts
  int coef;     // [texts, P], of 16 bits [2 texts, P]: high parts, low parts
  int sims;     // [texts, p16] float: similarities; backward: gradients of the weights, then of the similarities
  int weights;  // float: forward [p16] inverse norms; backward [texts, p16] weights, [p16] radial, [p16] inverse norms
  int along;    // [texts] float, then [texts] inverse norms of the texts, then [texts] divisors of their coefficients
  int total;
  int row_pitch, coef_pitch;  // in elements: 16 bytes more than whole, so that a matrix' rows lie in different banks

  DREAMLIP_HD static int up(int bytes) { return (bytes + 127) / 128 * 128; }
  DREAMLIP_HD PoolLayout(const PoolShape& s, int KT, bool backward) {
    row_pitch = s.column_boxes() * s.box_columns() + 16 / s.element;
    coef_pitch = s.p16() + 16 / s.element;
    const int texts = 8 * KT, parts = s.element == 2 ? 2 : 1;
    zero = s.slots * up(s.box_rows() * kRowBytes);
    rows = zero + 128;
    coef = rows + up((backward ? 2 : 1) * texts * row_pitch * s.element);
    sims = coef + up(parts * texts * coef_pitch * s.element);
    weights = sims + up(texts * s.p16() * 4);
    along = weights + up((backward ? texts + 2 : 1) * s.p16() * 4);
    total = along + up(3 * texts * 4);
  }
};

// Tiles of 8 sub-captions of a pass.
inline int text_tiles(int K) { return K <= 8 ? 1 : 2; }

// Chooses ring and boxes of `s` for `limit` bytes of shared memory; returns the bytes to launch with, which exceed the
// limit where even the smallest do not fit.
inline int plan_pool(PoolShape& s, bool backward, int limit) {
  const auto bytes = [&](int tall, int slots) {
    s.tall = tall;
    s.slots = slots;
    return PoolLayout(s, text_tiles(s.K), backward).total;
  };
  s.tall = kMostBoxRows;
  s.resident = s.row_boxes() == 1 && s.boxes() <= 9 && bytes(kMostBoxRows, s.boxes()) <= limit;
  if (s.resident) return bytes(kMostBoxRows, s.boxes());
  // At least two boxes under way while one is worked on, rather than tall ones.
  for (int tall = kMostBoxRows; tall >= kLeastBoxRows; tall /= 2)
    for (int slots = 8; slots >= 3; --slots)
      if (bytes(tall, slots) <= limit) return bytes(tall, slots);
  return bytes(kLeastBoxRows, 2);
}

// The least that forward and backward both can do with, for one image of P patches and K sub-captions of D elements.
inline int least_pool_bytes(int P, int K, int D, int element) {
  PoolShape s{};
  s.P = P;
  s.K = K < kMostTexts ? K : kMostTexts;
  s.D = (D + 7) / 8 * 8;
  s.element = element;
  const int forward = plan_pool(s, false, 0), backward = plan_pool(s, true, 0);
  return forward > backward ? forward : backward;
}

}  // namespace dreamlip
