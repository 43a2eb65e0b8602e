// Exponential and error function of a Vector.
#pragma once

#include <initializer_list>

#include "vector.h"

namespace hotloop {

// e^x to 2 in 10^7: 2^n times Taylor's polynomial within half of ln 2.
inline Vector exponential(Vector x) {
  x = x > 88.0f ? Vector{} + 88.0f : x;
  x = x < -87.0f ? Vector{} - 87.0f : x;
  const Vector turns = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number.
  const Vector whole = turns - 12582912.0f;
  // ln 2 in two parts, so that the rest is exact.
  const Vector r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
  Vector p = Vector{} + 1.0f / 5040;
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = p * r + c;
  const Words bits = (__builtin_convertvector(whole, Words) + 127) << 23;
  Vector power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// x P(x^2) / Q(x^2), and 1 from 3.9 on, where float32 knows no difference. The coefficients are a least-squares
// fit of the error of erf over 4,000 points, weighted by Lawson's method ("Contributions to the theory of linear
// least maximum approximation", 1961): off by 1.5e-8, and by 5e-7 at most with the rounding of float32. It takes no
// exponential: half of the operations of Abramowitz and Stegun's 7.1.26.
inline Vector error_function(Vector x) {
  const Vector u = x * x;
  Vector p = Vector{} + 2.05038564e-6f, q = Vector{} + 3.82307153e-5f;
  for (const float c :
       {2.87457060e-4f, 3.83687337e-3f, 5.29668081e-2f, 1.91940964e-1f, 1.12837903f})
    p = p * u + c;
  for (const float c : {1.18173355e-3f, 1.51091984e-2f, 1.14758179e-1f, 5.03435028e-1f, 1.0f})
    q = q * u + c;
  const Vector one = Vector{} + 1.0f, value = x * p / q;
  return x >= 3.9f ? one : x <= -3.9f ? -one : value;  // NaN stays NaN.
}

}  // namespace hotloop
