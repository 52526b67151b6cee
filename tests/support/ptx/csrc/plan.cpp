// What csrc/patch_pool.cu would launch with: the struct that its kernels take, and the shared memory of a block.
#include "patch_pool_plan.h"

#include <cstring>

extern "C" int shape_bytes() { return sizeof(dreamlip::PoolShape); }

extern "C" int plan(const long* sizes, double threshold, int limit, int backward, void* bytes) {
  dreamlip::PoolShape s{};
  s.N = int(sizes[0]), s.P = int(sizes[1]), s.K = int(sizes[2]), s.D = int(sizes[3]);
  s.x_row = s.t_row = s.up_row = s.D;
  s.x_image = long(s.P) * s.D;
  s.t_image = s.up_image = long(s.K) * s.D;
  s.element = int(sizes[4]);
  s.options = {float(threshold), int(sizes[5])};
  const int total = dreamlip::plan_pool(s, backward != 0, limit);
  std::memcpy(bytes, &s, sizeof s);
  return total;
}
