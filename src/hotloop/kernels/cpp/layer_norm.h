// Layer norm of one row.
#pragma once

#include <cmath>

#include "vector.h"

namespace hotloop {

struct Moments {
  float mean, rstd;
};

// out = (x - mean) / sqrt(variance + epsilon) * weight + bias; weight and bias may be null.
inline Moments layer_norm_row(const float* x, int64_t count, const float* weight,
                              const float* bias, float epsilon, float* out) {
  // Two passes: the sum of squares of what is left is not a difference of large numbers.
  Vector sums{}, squares{};
  for (int64_t c = 0; c < count; c += kLanes) sums += load(x + c, count - c);
  const float mean = sum_of(sums) / static_cast<float>(count);
  for (int64_t c = 0; c < count; c += kLanes) {
    Vector gap = load(x + c, count - c) - mean;
    if (count - c < kLanes) gap = first_lanes_of(gap, count - c, 0);
    squares += gap * gap;
  }
  const float variance = sum_of(squares) / static_cast<float>(count);
  const float rstd = 1.0f / std::sqrt(variance + epsilon);
  for (int64_t c = 0; c < count; c += kLanes) {
    Vector value = (load(x + c, count - c) - mean) * rstd;
    if (weight) value *= load(weight + c, count - c);
    if (bias) value += load(bias + c, count - c);
    store(out + c, value, count - c);
  }
  return {variance != variance ? variance : mean, rstd};  // Of infinity too, torch's mean is NaN.
}

}  // namespace hotloop
