// csrc/logsumexp.cuh and csrc/logsumexp_gradient.cuh compiled for the CPU: tests/support/kernels calls these where
// csrc/logsumexp.cu would launch, with the same arguments.
#define DREAMLIP_EMULATE
#include "logsumexp_gradient.cuh"

namespace {

using namespace dreamlip;

// The tensors of a call, as ctypes fills them in.
struct Call {
  const void *x, *y;
  const bool *x_mask, *y_mask;
  const int *x_images, *y_images;
  const float *scale, *multiplier;
  int dtype, M, C, K, D;
  unsigned seed;
  long x_row, y_slot, y_row;
};

template <class T> Rectangle<T> rectangle(const Call& c) {
  return {static_cast<const T*>(c.x),
          static_cast<const T*>(c.y),
          c.x_mask,
          c.y_mask,
          c.x_images,
          c.y_images,
          c.M,
          c.C,
          c.K,
          c.D,
          c.x_row,
          c.y_slot,
          c.y_row};
}

// f(T{}, shared memory of NaN, thread) on every thread of a block.
template <class F> void block(const Call& call, F f) {
  static unsigned count = 0;
  const auto with = [&](auto type) {
    using Tiles = LogitTiles<decltype(type)>;
    std::vector<uint4> shared(Tiles::kSharedBytes / 16 + 8);
    std::memset(shared.data(), 0xff, shared.size() * 16);
    char* memory = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared.data()) + 127) / 128 * 128);
    emulated::run_block(Tiles::kThreads, call.seed + ++count, [&](int thread) { f(type, memory, thread); });
  };
  if (call.dtype == 0) with(__nv_bfloat16{});
  if (call.dtype == 1) with(__half{});
  if (call.dtype == 2) with(float{});
}

int tiles_of(int n) { return (n + 127) / 128; }

}  // namespace

extern "C" void emulate_exp_sums(const Call* call, int first_tile, int tiles, int band_rows, float* row, float* col) {
  for (int k = 0; k < call->K; ++k)
    for (int tile = 0; tile < tiles; ++tile)
      for (int band = 0; band * band_rows < call->M; ++band)
        block(*call, [&](auto type, char* shared, int thread) {
          exp_sums(rectangle<decltype(type)>(*call), Exponent{call->scale, call->multiplier},
                   Bands{first_tile, tiles, band_rows}, row, col, shared, thread, band, tile, k);
        });
}

extern "C" void emulate_finish(const Call* call, const Parts* parts, int transposed, float* out) {
  const int rows = transposed ? call->C : call->M;
  for (int k = 0; k < call->K; ++k)
    for (int tile = 0; tile < tiles_of(rows); ++tile)
      block(*call, [&](auto type, char* shared, int thread) {
        const auto r = rectangle<decltype(type)>(*call);
        Parts own = *parts;
        own.sums += k * own.slot_stride;
        finish(transposed ? r.slot_transposed(k) : r.slot(k), transposed ? r.column_labels(k) : r.row_labels(),
               transposed ? r.row_labels() : r.column_labels(k), Exponent{call->scale, call->multiplier}, own,
               out + long(k) * rows, shared, thread, tile * 128);
      });
}

extern "C" void emulate_pairs(const Call* call, int diagonal, float* out) {
  const int first = diagonal < 0 ? -diagonal : 0, stop = call->C < call->M - diagonal ? call->C : call->M - diagonal;
  for (int k = 0; k < call->K; ++k)
    for (int col = first; col < stop; col += 128)
      block(*call, [&](auto type, char* shared, int thread) {
        pairs(rectangle<decltype(type)>(*call), Exponent{call->scale, call->multiplier}, diagonal,
              out + long(k) * call->C, shared, thread, col, k);
      });
}

extern "C" void emulate_gradient(const Call* call, int flag, const Coefficients* coefficients, const Chunk* chunk,
                                 void* g) {
  for (int slot = 0; slot < chunk->slots; ++slot)
    for (int row = 0; row < tiles_of(chunk->rows); ++row)
      for (int col = 0; col < tiles_of(chunk->cols); ++col)
        block(*call, [&](auto type, char* shared, int thread) {
          using T = decltype(type);
          gradient(rectangle<T>(*call), *coefficients, *chunk, Exponent{call->scale, call->multiplier}, flag != 0,
                   static_cast<T*>(g), shared, thread, row, col, slot);
        });
}
