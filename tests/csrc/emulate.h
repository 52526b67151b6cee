// The device functions of csrc/device.cuh on the CPU: every thread of a block is a fiber,
// warp and block operations are meetings of fibers.
//
// What a device leaves to luck is made unlucky here: a copy's destination is garbage until the wait that covers it,
// fibers run in random order
// from one meeting to the next, and a meeting that not everybody comes to ends the program.
#pragma once

#include <setjmp.h>
#include <ucontext.h>
#include <vector_types.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#define DREAMLIP_DEVICE inline

namespace dreamlip {
namespace emulated {

struct Copy {
  void* to;
  unsigned char data[16];
};

struct Meeting {
  int arrived = 0;
  long held = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool begun = false, done = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Meeting> warps;
  std::vector<const void*> given;
  Meeting all;
  jmp_buf scheduler;
  int current = 0;
  long progress = 0;
};

inline Block* block = nullptr;
inline std::function<void(int)>* body = nullptr;

constexpr size_t kStackBytes = 256 * 1024;
inline std::vector<std::unique_ptr<char[]>> stacks;  // kept from block to block, with what the last one left in them

// Jumps, not swapcontext: that asks the system for the signal mask each time, and takes most of the time.
inline void yield() {
  if (!_setjmp(block->fibers[block->current]->place)) _longjmp(block->scheduler, 1);
}

// Runs the fiber until it yields.
inline void resume(Fiber& fiber) {
  if (_setjmp(block->scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}

inline void meet(Meeting& meeting, int size) {
  const long held = meeting.held;
  ++block->progress;
  if (++meeting.arrived == size) {
    meeting.arrived = 0;
    ++meeting.held;
    return;
  }
  while (meeting.held == held) yield();
}

// Every lane of the warp gives a value and may read everybody's inside `use`.
template <class V, class F> void exchange(const V& mine, F use) {
  const int thread = block->current, warp = thread / 32;
  block->given[thread] = &mine;
  meet(block->warps[warp], 32);
  use([&](int lane) -> const V& { return *static_cast<const V*>(block->given[warp * 32 + lane]); });
  meet(block->warps[warp], 32);
}

inline void enter() {
  (*body)(block->current);
  block->fibers[block->current]->done = true;
  ++block->progress;
  yield();
}

// Runs `function(thread)` as a block of `threads`.
inline void run_block(int threads, unsigned seed, std::function<void(int)> function) {
  Block state;
  block = &state;
  body = &function;
  state.warps.resize(threads / 32);
  state.given.resize(threads);
  while (int(stacks.size()) < threads) stacks.emplace_back(new char[kStackBytes]);
  for (int i = 0; i < threads; ++i) {
    state.fibers.push_back(std::make_unique<Fiber>());
    ucontext_t& start = state.fibers.back()->start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks[i].get();
    start.uc_stack.ss_size = kStackBytes;
    start.uc_link = nullptr;
    makecontext(&start, enter, 0);
  }
  std::minstd_rand random(seed);
  // One round of a warp: every thread goes on to its next meeting. False when nobody could.
  const auto round = [&](int warp) {
    const long before = state.progress;
    const int first = int(random() % 32);
    for (int i = 0; i < 32; ++i) {
      const int thread = warp * 32 + (first + i) % 32;
      if (state.fibers[thread]->done) continue;
      state.current = thread;
      resume(*state.fibers[thread]);
    }
    return state.progress != before;
  };
  const int warps = threads / 32;
  for (int idle = 0;
       idle <=
       50 * warps;) {  // a random warp runs on alone for a random while, as far ahead of the others as barriers let it
    const int warp = int(random() % warps);
    bool moved = false;
    for (unsigned burst = 1 + random() % 200; burst > 0 && round(warp); --burst) moved = true;
    idle = moved ? 0 : idle + 1;
  }
  for (const auto& fiber : state.fibers)
    if (!fiber->done) {
      std::fprintf(stderr, "emulated block: some threads wait for others that never come\n");
      std::abort();
    }
  for (const auto& fiber : state.fibers)
    if (!fiber->groups.empty() || !fiber->open.empty()) {
      std::fprintf(stderr, "emulated block: it ended with copies under way\n");
      std::abort();
    }
  block = nullptr;
}

}  // namespace emulated

DREAMLIP_DEVICE void copy_async(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    std::fprintf(stderr, "emulated copy: an address that is not a multiple of 16\n");
    std::abort();
  }
  emulated::Copy copy;
  copy.to = to;
  if (valid) std::memcpy(copy.data, from, 16);
  else std::memset(copy.data, 0, 16);
  std::memset(to, 0xff, 16);  // NaN until it has landed
  emulated::block->fibers[emulated::block->current]->open.push_back(copy);
}
DREAMLIP_DEVICE void commit_copies() {
  auto& fiber = *emulated::block->fibers[emulated::block->current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int N> DREAMLIP_DEVICE void wait_copies() {
  auto& fiber = *emulated::block->fibers[emulated::block->current];
  while (fiber.groups.size() > N) {
    for (const auto& copy : fiber.groups.front()) std::memcpy(copy.to, copy.data, 16);
    fiber.groups.pop_front();
  }
}

namespace emulated {
template <int M, bool kTransposed> void load(uint32_t (&r)[M], const void* row) {
  exchange(row, [&](auto row_of) {
    const int lane = block->current % 32;
    for (int i = 0; i < M; ++i) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const int line = kTransposed ? 2 * (lane % 4) + e : lane / 4,
                  column = kTransposed ? lane / 4 : 2 * (lane % 4) + e;
        const char* address = static_cast<const char*>(row_of(8 * i + line));
        if (reinterpret_cast<uintptr_t>(address) % 16) std::abort();
        std::memcpy(&pair[e], address + 2 * column, 2);
      }
      std::memcpy(&r[i], pair, 4);
    }
  });
}
}  // namespace emulated

DREAMLIP_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) { emulated::load<4, false>(r, row); }
DREAMLIP_DEVICE void load_matrices(uint32_t (&r)[2], const void* row) { emulated::load<2, false>(r, row); }
DREAMLIP_DEVICE void load_transposed(uint32_t (&r)[2], const void* row) { emulated::load<2, true>(r, row); }

namespace emulated {
// As tensor cores round: toward zero.
inline float cut(double x) {
  const float nearest = static_cast<float>(x);
  return std::abs(double(nearest)) > std::abs(x) ? std::nextafterf(nearest, 0.f) : nearest;
}
}  // namespace emulated

template <class T> DREAMLIP_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, 16);
  std::memcpy(mine.b, b, 8);
  emulated::exchange(mine, [&](auto of) {
    const int lane = emulated::block->current % 32;
    const auto value = [](uint32_t bits, int e) {
      T pair[2];
      std::memcpy(pair, &bits, 4);
      return static_cast<float>(pair[e]);
    };
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
      double sum = c[i];
      for (int k = 0; k < 16; ++k) {
        const float x = value(of(row % 8 * 4 + k % 8 / 2).a[(row >= 8) + 2 * (k >= 8)], k % 2);
        const float y = value(of(column * 4 + k % 8 / 2).b[k >= 8], k % 2);
        sum += double(x) * y;
      }
      c[i] = emulated::cut(sum);
    }
  });
}

DREAMLIP_DEVICE void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    float a[4], b[2];
  } mine;
  for (int i = 0; i < 6; ++i) {
    const uint32_t word = (i < 4 ? a[i] : b[i - 4]) & 0xffffe000u;  // the rest is not read
    std::memcpy(i < 4 ? mine.a + i : mine.b + i - 4, &word, 4);
  }
  emulated::exchange(mine, [&](auto of) {
    const int lane = emulated::block->current % 32;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
      double sum = c[i];
      for (int k = 0; k < 8; ++k)
        sum += double(of(row % 8 * 4 + k % 4).a[(row >= 8) + 2 * (k >= 4)]) * of(column * 4 + k % 4).b[k >= 4];
      c[i] = emulated::cut(sum);
    }
  });
}

DREAMLIP_DEVICE float power_of_two(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.f : y;  // a NaN stays one
}

DREAMLIP_DEVICE float shuffle_xor(float x, int mask) {
  float y = 0;
  emulated::exchange(x, [&](auto of) { y = of(emulated::block->current % 32 ^ mask); });
  return y;
}
DREAMLIP_DEVICE bool any_lane(bool x) {
  bool any = false;
  emulated::exchange(x, [&](auto of) {
    for (int i = 0; i < 32; ++i) any = any || of(i);
  });
  return any;
}
DREAMLIP_DEVICE void sync_warp() {
  emulated::exchange(0, [](auto) {});
}
DREAMLIP_DEVICE void sync_block() { emulated::meet(emulated::block->all, int(emulated::block->fibers.size())); }

}  // namespace dreamlip
