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

#include "device.cuh"

namespace dreamlip {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRowBytes = 128, kBoxRows = 256;  // of a box

struct PoolShape {
  int N, P, K, D;
  long x_image, x_row, t_image, t_row, up_image, up_row;  // strides in elements; the last dimension's is 1
  RowOptions<float> options;
  int element;    // bytes of one
  int slots;      // boxes in the ring
  bool resident;  // all boxes of an image are in it (P <= 256)

  DREAMLIP_HD int box_columns() const { return kRowBytes / element; }
  DREAMLIP_HD int column_boxes() const { return (D + box_columns() - 1) / box_columns(); }
  DREAMLIP_HD int row_boxes() const { return (P + kBoxRows - 1) / kBoxRows; }
  DREAMLIP_HD int boxes() const { return column_boxes() * row_boxes(); }
  DREAMLIP_HD int box_rows() const { return P < kBoxRows ? P : kBoxRows; }
  DREAMLIP_HD int p16() const { return (P + 15) / 16 * 16; }
};

// Offsets in bytes of the parts of shared memory.
struct PoolLayout {
  int zero, rows, coef, sims, weights, along, total;
  int row_pitch, coef_pitch;  // in elements: 16 bytes more than whole, so that the rows of a matrix lie in different banks

  DREAMLIP_HD static int up(int bytes) { return (bytes + 127) / 128 * 128; }
  DREAMLIP_HD PoolLayout(const PoolShape& s, int KT, bool backward) {
    row_pitch = s.column_boxes() * s.box_columns() + 16 / s.element;
    coef_pitch = s.p16() + 16 / s.element;
    const int texts = 8 * KT;
    zero = s.slots * up(s.box_rows() * kRowBytes);
    rows = zero + 128;                                                         // texts, backward: upstream gradients then texts
    coef = rows + up((backward ? 2 : 1) * texts * row_pitch * s.element);              // [2 texts, P]: high parts, low parts
    sims = coef + up(2 * texts * coef_pitch * s.element);                              // [texts, p16] float: similarities, backward: da then dw
    weights = sims + up(texts * s.p16() * 4);                                  // backward: [texts, p16] float: weights; then [p16] radial, [p16] inverse norms
    along = weights + (backward ? up((texts + 2) * s.p16() * 4) : up(s.p16() * 4));  // forward: [p16] inverse norms at `weights`
    total = along + up(2 * texts * 4);                                         // [texts] along, [texts] inverse norms of the texts
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
  DREAMLIP_DEVICE float* weights(int k) const { return reinterpret_cast<float*>(memory + layout.weights) + k * s.p16(); }
  DREAMLIP_DEVICE float* along() const { return reinterpret_cast<float*>(memory + layout.along); }
  DREAMLIP_DEVICE float* inv_text() const { return along() + kTexts; }

  // Where chunk c (8 columns) of a box's row r lies; a row beyond the image's patches reads as zeros.
  DREAMLIP_DEVICE char* chunk(char* box, int r, int c) const { return box + r * kRowBytes + ((c ^ (r & 7)) << 4); }
  DREAMLIP_DEVICE const char* chunk_or_zero(char* box, int r, int rows, int c) const { return r < rows ? chunk(box, r, c) : memory + layout.zero; }

  DREAMLIP_DEVICE int rows_of(int row_box) const { return s.P - row_box * kBoxRows < kBoxRows ? s.P - row_box * kBoxRows : kBoxRows; }

  // Starts the copy of one box; every thread calls it, then commits.
  DREAMLIP_DEVICE void fetch(const T* image, int slot, int column_box, int row_box) const {
    const int rows = rows_of(row_box);
    char* to = box(slot);
    for (int i = thread; i < rows * 8; i += kThreads) {
      const int r = i / 8, c = i % 8, column = column_box * kColumns + c * kChunk;
      const bool valid = column < s.D;
      copy_async(chunk(to, r, c), image + (row_box * kBoxRows + r) * s.x_row + (valid ? column : 0), valid);
    }
  }

  // Zeros the parts that are read beyond what is ever written.
  DREAMLIP_DEVICE void clear() const {
    uint32_t* words = reinterpret_cast<uint32_t*>(memory + layout.zero);
    for (int i = thread; i < (layout.total - layout.zero) / 4; i += kThreads) words[i] = 0;
  }

  // inv_text[k] = 1 / |t_k| of the rows from `first`; a warp a text.
  DREAMLIP_DEVICE void text_norms(int first) const {
    for (int k = warp; k < s.K; k += kWarps) {
      float square = 0;
      for (int i = lane; i < int(s.D * sizeof(T) / 4); i += 32) square += squares<T>(reinterpret_cast<const uint32_t*>(row(first + k))[i]);
      square = WarpLanes{lane}.sum(square);
      if (lane == 0) inv_text()[k] = square == 0 ? 0.f : 1.f / sqrtf(square);
    }
  }

  // Products of one box with the texts at row(first ..): acc[tile][text tile] += 16 patches x 8 texts; with norms also the patches' squares.
  template <bool kNorms>
  DREAMLIP_DEVICE void dots(char* box, int rows, int column_box, int first, float (&acc)[2][KT][4], float (&square)[2][2]) const {
#pragma unroll
    for (int step = 0; step < kColumns / kStep; ++step) {
      uint32_t b[KT][2];
#pragma unroll
      for (int j = 0; j < KT; ++j) load_matrices(b[j], row(first + 8 * j + (lane & 7)) + column_box * kColumns + step * kStep + ((lane >> 3) & 1) * kChunk);
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
        for (int j = 0; j < KT; ++j) multiply(acc[tile][j], a, b[j], T{});
      }
    }
  }

  // A coefficient of text k and patch p; of 16 bits as its high and low parts.
  DREAMLIP_DEVICE void put_coef(int k, int p, float value) const {
    const T high = from_float<T>(value);
    coef(k)[p] = high;
    if (kSplit) coef(kTexts + k)[p] = from_float<T>(value - to_float(high));
  }

  // Where column `column` (even) of a box's row r lies.
  DREAMLIP_DEVICE char* cell(char* box, int r, int column) const {
    return chunk(box, r, column / kChunk) + column % kChunk * sizeof(T);
  }

  // acc += coefficients [texts, patches of the box] @ the eight columns of this warp. With KT = 1 rows 0-7 are the high parts and 8-15 the low ones.
  DREAMLIP_DEVICE void pool(char* box, int rows, int row_box, float (&acc)[4]) const {
    if (warp >= kColumns / 8) return;
    for (int step = 0; step * kStep < rows; ++step) {
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
        load_matrices(a, coef(part * 16 + (lane & 7) + ((lane >> 3) & 1) * 8) + row_box * kBoxRows + step * kStep + (lane >> 4) * kChunk);
        multiply(acc, a, b, T{});
      }
    }
  }

  // The pooled value of text k = lane / 4 (+ 8) at columns 2 (lane % 4), + 1 of this warp's eight: KT values of two.
  DREAMLIP_DEVICE void pooled(const float (&acc)[4], float (&out)[KT][2]) const {
    if (KT == 1) {
      out[0][0] = acc[0] + acc[2];
      out[0][1] = acc[1] + acc[3];
    } else {
#pragma unroll
      for (int j = 0; j < KT; ++j) {
        out[j][0] = acc[2 * j];
        out[j][1] = acc[2 * j + 1];
      }
    }
  }
};

// Until at most n (known only at run time) groups are under way.
DREAMLIP_DEVICE void wait_pending(int n) {
  switch (n) {
    case 0: wait_copies<0>(); break;
    case 1: wait_copies<1>(); break;
    case 2: wait_copies<2>(); break;
    case 3: wait_copies<3>(); break;
    case 4: wait_copies<4>(); break;
    case 5: wait_copies<5>(); break;
    case 6: wait_copies<6>(); break;
    case 7: wait_copies<7>(); break;
    case 8: wait_copies<8>(); break;
    default: wait_copies<9>(); break;  // waits for more than it must: correct, and nobody has so many boxes in shared memory
  }
}

// The order in which a block's boxes are needed, and their way through the ring. Step t of an image: pass t / boxes, box t % boxes.
template <class T, int KT> struct Ring {
  const PatchPool<T, KT>& pool;
  const T* patches;
  int first, stride;  // images first, first + stride, ...

  DREAMLIP_DEVICE int images() const { return first < pool.s.N ? (pool.s.N - first - 1) / stride + 1 : 0; }

  // Box (column, row) of a step: pass 1 goes along the columns of a row of boxes, pass 2 down each column.
  DREAMLIP_DEVICE void place(int step, int& column_box, int& row_box) const {
    const int boxes = pool.s.boxes(), columns = pool.s.column_boxes(), rows = pool.s.row_boxes();
    const int i = step % boxes;
    const bool second = step / boxes % 2;
    column_box = second ? i / rows : i % columns;
    row_box = second ? i % rows : i / columns;
  }

  // Starts the copy for global step t, if there is one, and commits a group in any case.
  DREAMLIP_DEVICE void start(int t) const {
    const int steps = 2 * pool.s.boxes();
    if (t < images() * steps) {
      int column_box, row_box;
      place(t % steps, column_box, row_box);
      pool.fetch(patches + (first + long(t / steps) * stride) * pool.s.x_image, t % pool.s.slots, column_box, row_box);
    }
    commit_copies();
  }

  // Resident: box i of image number `image` into slot i.
  DREAMLIP_DEVICE void start_box(int image, int i) const {
    if (image < images()) pool.fetch(patches + (first + long(image) * stride) * pool.s.x_image, i, i, 0);
    commit_copies();
  }

  DREAMLIP_DEVICE void prologue() const {
    if (pool.s.resident)
      for (int i = 0; i < pool.s.boxes(); ++i) start_box(0, i);
    else
      for (int t = 0; t < pool.s.slots - 1; ++t) start(t);
  }

  // The box of step t of image number `image`, landed for all threads.
  DREAMLIP_DEVICE char* take(int image, int step) const {
    const int boxes = pool.s.boxes();
    if (pool.s.resident) {
      if (step < boxes) {
        wait_pending(boxes - 1 - step);
        sync_block();
      }
      return pool.box(step % boxes);
    }
    const int t = image * 2 * boxes + step;
    wait_pending(pool.s.slots - 2);
    sync_block();  // everybody has the box, and has left the one before it, which is refilled now
    start(t + pool.s.slots - 1);
    return pool.box(t % pool.s.slots);
  }

  // After the last use of a box.
  DREAMLIP_DEVICE void give(int image, int step) const {
    if (!pool.s.resident) return;
    sync_block();
    start_box(image + 1, step % pool.s.boxes());
  }
};

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
