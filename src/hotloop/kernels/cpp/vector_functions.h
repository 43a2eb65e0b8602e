// Functions of a Vector to a few units of the last place, for every float32: infinity, NaN and the smallest
// numbers too. vector_math.h has faster ones for less.
#pragma once

#include <cmath>
#include <initializer_list>
#include <limits>

#include "vector.h"

namespace hotloop {

inline Words bits_of(Vector x) {
  Words bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline Vector from_bits(Words bits) {
  Vector x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

constexpr int32_t kSignBit = std::numeric_limits<int32_t>::min();

inline Vector absolute(Vector x) { return from_bits(bits_of(x) & ~kSignBit); }

// The size of x with the sign of y.
inline Vector with_sign(Vector x, Vector y) {
  return from_bits((bits_of(x) & ~kSignBit) | (bits_of(y) & kSignBit));
}

inline Vector square_root(Vector x) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);  // As for widen: GCC's bug 105593.
#elif defined(__AVX__)
  return (Vector)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Vector)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// As `exponential`, but what is too large becomes infinite, and what is small all the way to 0.
inline Vector full_exponential(Vector x) {
  x = x > 89.0f ? Vector{} + 89.0f : x;
  x = x < -104.0f ? Vector{} - 104.0f : x;
  const Vector turns = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number.
  const Vector whole = turns - 12582912.0f;
  const Vector r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
  Vector p = Vector{} + 1.0f / 5040;
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = p * r + c;
  // 2^whole as two factors: it may be larger or smaller than any number.
  const Words power = __builtin_convertvector(whole, Words), half = power >> 1;
  return p * from_bits((half + 127) << 23) * from_bits((power - half + 127) << 23);
}

// x = 2^e m with m around 1; the polynomial is that of Cephes' logf.
inline Vector logarithm(Vector x) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const Words tiny = x < std::numeric_limits<float>::min();
  const Words bits = bits_of(tiny ? x * 8388608.0f : x);
  // Halves of m up to the root of 2 count as m.
  const Words up = (bits - 0x3F3504F3) >> 23;
  const Vector e = __builtin_convertvector(up - (tiny & 23), Vector);
  const Vector m = from_bits(bits - (up << 23)) - 1.0f, square = m * m;
  Vector p = Vector{} + 7.0376836292e-2f;
  for (const float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                        -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
    p = p * m + c;
  Vector value = p * m * square - 2.12194440e-4f * e - 0.5f * square;
  value = m + value + 0.693359375f * e;
  value = x == 0.0f ? Vector{} - kInfinity : value;
  value = x < 0.0f ? Vector{} + kNan : value;
  return (x == kInfinity) | (x != x) ? x : value;
}

// Near 0 the polynomial of Cephes' tanhf; beyond, 1 less what an exponential leaves.
inline Vector hyperbolic_tangent(Vector x) {
  const Vector size = absolute(x), u = x * x;
  Vector p = Vector{} - 5.70498872745e-3f;
  for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    p = p * u + c;
  const Vector near = p * u * x + x;
  const Vector far = 1.0f - 2.0f / (full_exponential(2.0f * size) + 1.0f);
  return size < 0.625f ? near : with_sign(far, x);
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + full_exponential(-x)); }

// Two polynomials that Norbert Juffa published (stackoverflow.com/a/35148199): odd near 0, the logarithm of
// what is missing from 1 beyond.
inline Vector full_error_function(Vector x) {
  const Vector size = absolute(x), u = x * x;
  Vector near = Vector{} - 5.96761703e-4f;
  for (const float c :
       {4.99119423e-3f, -2.67681349e-2f, 1.12819925e-1f, -3.76125336e-1f, 1.28379166e-1f})
    near = near * u + c;
  near = near * x + x;
  Vector far = Vector{} - 1.72853470e-5f;
  for (const float c : {3.83197126e-4f, -3.88396438e-3f, 2.42546219e-2f, -1.06777877e-1f,
                        -6.34846687e-1f, -1.28717512e-1f})
    far = far * size + c;
  far = 1.0f - full_exponential(far * size - size);
  return size > 0.927734375f ? with_sign(far, x) : near;  // NaN stays NaN.
}

}  // namespace hotloop
