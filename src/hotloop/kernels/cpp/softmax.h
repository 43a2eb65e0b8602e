// softmax of one row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vector_math.h"

namespace hotloop {

// The greatest of scale x[i]. A NaN wins.
inline float greatest(const float* x, int64_t count, float scale) {
  constexpr float kLeast = -std::numeric_limits<float>::infinity();
  Vector most = Vector{} + kLeast;
  for (int64_t c = 0; c < count; c += kLanes) {
    Vector v = load(x + c, count - c) * scale;
    if (count - c < kLanes) v = first_lanes_of(v, count - c, kLeast);
    most = (v > most) | (v != v) ? v : most;
  }
  return reduce(most, [](float a, float b) { return b > a || b != b ? b : a; });
}

// The sum of e^(scale x[i] - top), of no positive exponents; keep: they go to `out`, which may be x.
template <bool keep>
inline float sum_exponentials(const float* x, int64_t count, float scale, float top, float* out) {
  constexpr float kVanishes = -87.3f;  // What is smaller counts as 0.
  Vector sums{};
  for (int64_t c = 0; c < count; c += kLanes) {
    const Vector gap = load(x + c, count - c) * scale - top;
    Vector e = exponential(gap);
    e = gap < kVanishes ? Vector{} : e;
    e = gap != gap ? gap : e;
    if (keep) store(out + c, e, count - c);
    sums += count - c < kLanes ? first_lanes_of(e, count - c, 0) : e;
  }
  return sum_of(sums);
}

// out[i] = e^(scale x[i]) / their sum, or the logarithm of that; less the greatest first. `out` may be x.
inline void softmax_row(const float* x, int64_t count, float scale, bool logarithm, float* out) {
  const float top = greatest(x, count, scale);
  const float sum = logarithm ? sum_exponentials<false>(x, count, scale, top, nullptr)
                              : sum_exponentials<true>(x, count, scale, top, out);
  const float inverse = 1.0f / sum, log_of_sum = logarithm ? std::log(sum) : 0;
  for (int64_t c = 0; c < count; c += kLanes) {
    const Vector value = logarithm ? load(x + c, count - c) * scale - top - log_of_sum
                                   : load(out + c, count - c) * inverse;
    store(out + c, value, count - c);
  }
}

}  // namespace hotloop
