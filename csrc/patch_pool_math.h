// The grouping op's maths of one row: similarities of one sub-caption with P patches -> weights,
// and the gradient back (docs/math.md, eq. 10-14).
// One definition for the CPU and CUDA kernels; no torch. Lanes says how a row's patches are shared out:
//   CPU: one lane has them all.   CUDA: 32 lanes take every 32nd, and the reductions are shuffles of a warp.
#pragma once

#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define DREAMLIP_HD __host__ __device__ __forceinline__
#else
#define DREAMLIP_HD inline __attribute__((always_inline))
#endif

namespace dreamlip {

enum Normalization { kMinMax = 0, kSoftmax = 1, kNone = 2 };

// A row's patches on one lane. It adds up a whole row by itself, so it does that in double.
struct OneLane {
  static constexpr int lane = 0, width = 1;
  template <class T> using Sum = double;
  template <class T> DREAMLIP_HD T sum(T x) const { return x; }
  template <class T> DREAMLIP_HD T min(T x) const { return x; }
  template <class T> DREAMLIP_HD T max(T x) const { return x; }
  DREAMLIP_HD bool any(bool x) const { return x; }
};

// threshold < -1e30 means 1 / (number of valid patches).
template <class T> struct RowOptions {
  T threshold;
  int normalization;
};

// What the backward pass needs to know about a row beside its similarities.
template <class T> struct Row {
  T lo;     // smallest valid similarity ("minmax")
  T scale;  // "minmax": 1 / range; "softmax": 1 / sum of exponentials
  T shift;  // "softmax": largest valid similarity
  T cut;    // what a score must reach
  T inv_total;
  T even;  // the uniform weight of a valid patch
  bool uniform;
};

// 32 ulp of one: a smaller range of cosines is rounding.
template <class T> DREAMLIP_HD T flat_tolerance() { return 32 * std::numeric_limits<T>::epsilon(); }

DREAMLIP_HD bool is_valid(const bool* valid, int p) { return valid == nullptr || valid[p]; }

DREAMLIP_HD float exp_of(float x) { return ::expf(x); }
DREAMLIP_HD double exp_of(double x) { return ::exp(x); }

// The score before the threshold (u in `value`), and the number compared with the threshold.
template <class T> DREAMLIP_HD T score(const Row<T>& row, int normalization, T w, T& compared) {
  if (normalization == kMinMax) {
    const T u = w - row.lo;
    compared = u * row.scale;
    return u;
  }
  const T u = normalization == kSoftmax ? exp_of(w - row.shift) * row.scale : w;
  compared = u;
  return u;
}

// NaN compares false with everything: a NaN score is above the threshold, so that it shows in the result.
template <class T> DREAMLIP_HD bool is_above(const Row<T>& row, T u, T compared) {
  return !(compared < row.cut) && !(u < 0);
}

template <class T, class Lanes>
DREAMLIP_HD Row<T> read_row(Lanes lanes, const T* w, const bool* valid, int patches, RowOptions<T> options) {
  using Sum = typename Lanes::template Sum<T>;
  const T inf = std::numeric_limits<T>::infinity();
  T lo = inf, hi = -inf, count = 0;
  bool nan = false;
  for (int p = lanes.lane; p < patches; p += lanes.width) {
    if (!is_valid(valid, p)) continue;
    lo = w[p] < lo ? w[p] : lo;
    hi = w[p] > hi ? w[p] : hi;
    nan = nan || w[p] != w[p];
    count += 1;
  }
  lo = lanes.min(lo);
  hi = lanes.max(hi);
  count = lanes.sum(count);
  if (lanes.any(nan)) lo = hi = std::numeric_limits<T>::quiet_NaN();
  Row<T> row{};
  row.lo = lo;
  row.shift = hi;
  row.even = 1 / (count < 1 ? T(1) : count);
  row.cut = options.threshold < T(-1e30) ? row.even : options.threshold;
  row.scale = 1;
  row.uniform = count == 0;
  if (options.normalization == kMinMax) {
    row.uniform = row.uniform || hi - lo <= flat_tolerance<T>();
    row.scale = row.uniform ? T(1) : 1 / (hi - lo);
  } else if (options.normalization == kSoftmax && count > 0) {
    Sum mass = 0;
    for (int p = lanes.lane; p < patches; p += lanes.width)
      if (is_valid(valid, p)) mass += exp_of(w[p] - hi);
    row.scale = T(1 / lanes.sum(mass));
  }
  Sum total = 0;
  for (int p = lanes.lane; p < patches; p += lanes.width) {
    T compared;
    const T u = score(row, options.normalization, w[p], compared);
    if (is_valid(valid, p) && is_above(row, u, compared)) total += u;
  }
  total = lanes.sum(total);
  row.uniform = row.uniform || total <= 0;
  row.inv_total = row.uniform ? T(1) : T(1 / total);
  return row;
}

// The weight a of one patch.
template <class T> DREAMLIP_HD T weight(const Row<T>& row, int normalization, T w, bool valid) {
  if (!valid) return 0;
  if (row.uniform) return row.even;
  T compared;
  const T u = score(row, normalization, w, compared);
  return is_above(row, u, compared) ? u * row.inv_total : T(0);
}

// da [P] (gradient of the weights) -> dw [P] (gradient of the similarities), in place; returns sum_p dw w.
template <class T, class Lanes>
DREAMLIP_HD T weights_backward(Lanes lanes, const Row<T>& row, const T* w, const bool* valid, int patches,
                               int normalization, T* da) {
  if (row.uniform) {
    for (int p = lanes.lane; p < patches; p += lanes.width) da[p] = 0;
    return 0;
  }
  using Sum = typename Lanes::template Sum<T>;
  Sum mean = 0;
  for (int p = lanes.lane; p < patches; p += lanes.width)
    mean += Sum(weight(row, normalization, w[p], is_valid(valid, p))) * da[p];
  mean = lanes.sum(mean);
  // A large mean is rounded, every patch would get that error, and what is summed over them is near zero: so the mean
  // of what is left, kept apart.
  Sum rest = 0;
  for (int p = lanes.lane; p < patches; p += lanes.width)
    rest += Sum(weight(row, normalization, w[p], is_valid(valid, p))) * T(da[p] - mean);
  rest = lanes.sum(rest);
  Sum sum = 0, along = 0;
  T lowest = 0;
  // With "minmax" the dw of a row add up to zero, so that sum dw w = sum dw (w - lo), which does not cancel.
  const T origin = normalization == kMinMax ? row.lo : T(0);
  for (int p = lanes.lane; p < patches; p += lanes.width) {
    const bool in = is_valid(valid, p);
    T compared;
    const T u = score(row, normalization, w[p], compared);
    const T slope = normalization == kSoftmax ? u * row.inv_total : row.inv_total;
    const T dw = in && is_above(row, u, compared) ? slope * T(T(da[p] - mean) - rest) : T(0);
    da[p] = dw;
    sum += dw;
    along += Sum(dw) * (w[p] - origin);
    if (normalization == kMinMax && in && w[p] == row.lo) lowest += 1;
  }
  along = lanes.sum(along);
  if (normalization != kMinMax) return T(along);
  // The smallest similarity is subtracted from all: it takes what the others give, ties equally.
  sum = lanes.sum(sum);
  lowest = lanes.sum(lowest);
  const T share = T(lowest > 0 ? sum / lowest : sum);
  for (int p = lanes.lane; p < patches; p += lanes.width)
    if (is_valid(valid, p) && w[p] == row.lo) da[p] -= share;
  return T(along);
}

}  // namespace dreamlip
