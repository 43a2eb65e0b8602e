// softmax of one row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vector_math.h"

namespace hotloop {

// out[i] = e^(scale x[i]) / their sum, or the logarithm of that; less the greatest first. `out` may be x.
inline void softmax_row(const float* x, int64_t count, float scale, bool logarithm, float* out) {
  constexpr float kLeast = -std::numeric_limits<float>::infinity();
  Vector most = Vector{} + kLeast, sums{};
  for (int64_t c = 0; c < count; c += kLanes) {
    Vector v = load(x + c, count - c) * scale;
    if (count - c < kLanes) v = first_lanes_of(v, count - c, kLeast);
    most = (v > most) | (v != v) ? v : most;
  }
  const float top =
      reduce(most, [](float a, float b) { return b > a || b != b ? b : a; });  // A NaN wins.
  for (int64_t c = 0; c < count; c += kLanes) {
    const Vector gap = load(x + c, count - c) * scale - top;
    Vector e = exponential(gap);
    e = gap == kLeast ? Vector{} : e;
    e = gap != gap ? gap : e;
    if (!logarithm) store(out + c, e, count - c);
    sums += count - c < kLanes ? first_lanes_of(e, count - c, 0) : e;
  }
  const float sum = sum_of(sums), inverse = 1.0f / sum, log_of_sum = logarithm ? std::log(sum) : 0;
  for (int64_t c = 0; c < count; c += kLanes) {
    const Vector value = logarithm ? load(x + c, count - c) * scale - top - log_of_sum
                                   : load(out + c, count - c) * inverse;
    store(out + c, value, count - c);
  }
}

}  // namespace hotloop
