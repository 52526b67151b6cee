// csrc/patch_pool.cuh compiled for the CPU, for tests/kernels/grouping/test_cuda_emulated.py: the kernels' own code,
// a block after the other.
#define DREAMLIP_EMULATE
#include "patch_pool.cuh"

namespace {

using namespace dreamlip;

template <class T, int KT>
void run(const PoolShape& s, const void* x, const void* t, const void* up, const bool* mask, void* out,
         float* similarity, float* inv_norm, void* dx, void* dt, int blocks, unsigned seed) {
  const bool backward = up != nullptr;
  const PoolLayout layout(s, KT, backward);
  std::vector<uint4> shared(layout.total / 16 + 16);
  char* memory = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared.data()) + 127) / 128 * 128);
  for (int b = 0; b < blocks; ++b) {
    std::memset(shared.data(), 0xff, shared.size() * 16);
    emulated::run_block(kThreads, seed + b, [&](int thread) {
      if (backward)
        pool_backward<T, KT>(s, static_cast<const T*>(x), static_cast<const T*>(t), static_cast<const T*>(up), mask,
                             similarity, inv_norm, static_cast<T*>(dx), static_cast<T*>(dt), memory, thread, b, blocks);
      else
        pool_forward<T, KT>(s, static_cast<const T*>(x), static_cast<const T*>(t), mask, static_cast<T*>(out),
                            similarity, inv_norm, memory, thread, b, blocks);
    });
  }
}

}  // namespace

extern "C" int emulate(int N, int P, int K, int D, int dtype, double threshold, int normalization, int slots, int tall,
                       int blocks, unsigned seed, const void* x, const void* t, const void* up, const bool* mask,
                       void* out, float* similarity, float* inv_norm, void* dx, void* dt) {
  PoolShape s{};
  s.N = N;
  s.P = P;
  s.K = K;
  s.D = D;
  s.x_row = s.t_row = s.up_row = D;
  s.x_image = long(P) * D;
  s.t_image = s.up_image = long(K) * D;
  s.options = {float(threshold), normalization};
  s.element = dtype == 2 ? 4 : 2;
  s.tall = tall;
  s.resident = slots == 0;
  if (s.resident && P > tall) return 1;
  s.slots = s.resident ? s.boxes() : slots;
  if (K > kMostTexts) return 2;
  const auto with = [&](auto element) {
    using T = decltype(element);
    if (K <= 8) run<T, 1>(s, x, t, up, mask, out, similarity, inv_norm, dx, dt, blocks, seed);
    else run<T, 2>(s, x, t, up, mask, out, similarity, inv_norm, dx, dt, blocks, seed);
  };
  if (dtype == 0) with(__nv_bfloat16{});
  if (dtype == 1) with(__half{});
  if (dtype == 2) with(float{});
  return 0;
}

// The tiles of a launch with `limit` bytes of shared memory: {bytes, slots, tall, resident}.
extern "C" void plan(int P, int K, int D, int element, int backward, int limit, int* out) {
  PoolShape s{};
  s.P = P;
  s.K = K;
  s.D = D;
  s.element = element;
  out[0] = plan_pool(s, backward, limit);
  out[1] = s.slots;
  out[2] = s.tall;
  out[3] = s.resident;
}
