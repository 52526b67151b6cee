// The few instructions the CUDA kernels are made of, one function each: copies past the registers, matrix loads,
// the tensor cores' product.
// Layouts are PTX's (mma.m16n8k16, ldmatrix). With DREAMLIP_EMULATE a header of the tests gives the same functions on
// the CPU, lane by lane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "patch_pool_math.h"

#ifdef DREAMLIP_EMULATE
#include "emulate.h"
#else
namespace dreamlip {

#define DREAMLIP_DEVICE __device__ __forceinline__

DREAMLIP_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, asynchronously; zeros where `valid` is false.
DREAMLIP_DEVICE void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
DREAMLIP_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N groups of this thread's copies are under way.
template <int N> DREAMLIP_DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8x8 matrices of 16-bit values, one row from each lane's address: matrix i from lanes 8 i .. 8 i + 7.
DREAMLIP_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Two, from lanes 0 .. 15.
DREAMLIP_DEVICE void load_matrices(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
DREAMLIP_DEVICE void load_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], float32 sums.
DREAMLIP_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DREAMLIP_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c [16, 8] += a [16, 8] b [8, 8] of float32, of which the upper 19 bits count.
DREAMLIP_DEVICE void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2^x, denormal results as 0.
DREAMLIP_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DREAMLIP_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DREAMLIP_DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
DREAMLIP_DEVICE void sync_warp() { __syncwarp(); }
DREAMLIP_DEVICE void sync_block() { __syncthreads(); }

}  // namespace dreamlip
#endif

namespace dreamlip {

DREAMLIP_DEVICE float float_of(uint32_t word) {
  union {
    uint32_t word;
    float value;
  } both = {word};
  return both.value;
}
DREAMLIP_DEVICE uint32_t word_of(float value) {
  union {
    float value;
    uint32_t word;
  } both = {value};
  return both.word;
}

// float32 as two of TF32's. With a nearest high part the low one has either sign, and errors do not add up;
// a cut one takes fewer registers.
template <bool kNearest> DREAMLIP_DEVICE void split_tf32(uint32_t word, uint32_t& high, uint32_t& low) {
  high = (kNearest ? word + 0x1000u : word) & 0xffffe000u;
  low = word_of(float_of(word) - float_of(high));
}
// c [16, 8] += a [16, 8] b [8, 8] of float32, as three products of TF32: what is left out is below 2^-21 of a product.
// a's high parts are nearest, b's are cut (nearest ones spill in exp_sums on sm_80); low parts are rounded, or errors
// of one sign would add up.
template <bool kNearest = false>
DREAMLIP_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  constexpr uint32_t kHalf = kNearest ? 0u : 0x1000u;
  uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) split_tf32<true>(a[i], a_high[i], a_low[i]), a_low[i] += kHalf;
#pragma unroll
  for (int i = 0; i < 2; ++i) split_tf32<kNearest>(b[i], b_high[i], b_low[i]), b_low[i] += kHalf;
  multiply_tf32(c, a_low, b_high);
  multiply_tf32(c, a_high, b_low);
  multiply_tf32(c, a_high, b_high);
}

// A row's patches shared out to the 32 lanes of a warp.
struct WarpLanes {
  int lane;
  static constexpr int width = 32;
  template <class T> using Sum = T;
  template <class T> DREAMLIP_DEVICE T sum(T x) const {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
  }
  template <class T> DREAMLIP_DEVICE T min(T x) const {
    for (int mask = 16; mask > 0; mask /= 2) {
      const T y = shuffle_xor(x, mask);
      x = y < x ? y : x;
    }
    return x;
  }
  template <class T> DREAMLIP_DEVICE T max(T x) const {
    for (int mask = 16; mask > 0; mask /= 2) {
      const T y = shuffle_xor(x, mask);
      x = y > x ? y : x;
    }
    return x;
  }
  DREAMLIP_DEVICE bool any(bool x) const { return any_lane(x); }
};

DREAMLIP_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
DREAMLIP_DEVICE float to_float(__half x) { return __half2float(x); }
DREAMLIP_DEVICE float to_float(float x) { return x; }
template <class T> DREAMLIP_DEVICE T from_float(float x);
template <> DREAMLIP_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16(x); }
template <> DREAMLIP_DEVICE __half from_float<__half>(float x) { return __float2half(x); }
template <> DREAMLIP_DEVICE float from_float<float>(float x) { return x; }

// Two neighbouring elements, loaded and stored at once.
template <class T> struct alignas(2 * sizeof(T)) Pair {
  T values[2];
};

// The 32 bits of two 16-bit values, or of one float32.
template <class T> DREAMLIP_DEVICE uint32_t bits_of(const T* values) {
  union {
    uint32_t bits;
    T values[4 / sizeof(T)];
  } both;
  for (int i = 0; i < int(4 / sizeof(T)); ++i) both.values[i] = values[i];
  return both.bits;
}

// The sum of squares of what a 32-bit word holds.
template <class T> DREAMLIP_DEVICE float squares(uint32_t word) {
  union {
    uint32_t bits;
    T values[4 / sizeof(T)];
  } both;
  both.bits = word;
  float sum = 0;
  for (int i = 0; i < int(4 / sizeof(T)); ++i) sum += to_float(both.values[i]) * to_float(both.values[i]);
  return sum;
}

}  // namespace dreamlip
