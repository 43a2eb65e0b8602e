// Panels: the operands of a product, laid out in the order in which a micro-kernel reads them.
#pragma once

#include <algorithm>

#include "vector.h"

namespace hotloop {

#if defined(__AVX__)
// to[c * to_ld + r] = from[r * from_ld + c] of 8 x 8 elements.
inline void transpose8x8(const float* from, int64_t from_ld, float* to, int64_t to_ld) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_ld);
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int h = 0; h < 2; ++h) {
    const __m256 *a = t + 4 * h, *b = t + 4 * h + 2;
    r[4 * h + 0] = _mm256_shuffle_ps(a[0], b[0], 0x44);
    r[4 * h + 1] = _mm256_shuffle_ps(a[0], b[0], 0xEE);
    r[4 * h + 2] = _mm256_shuffle_ps(a[1], b[1], 0x44);
    r[4 * h + 3] = _mm256_shuffle_ps(a[1], b[1], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// to[c * to_ld + r] = from[r * from_ld + c].
inline void transpose(const float* from, int64_t from_ld, int64_t rows, int64_t cols, float* to,
                      int64_t to_ld) {
  int64_t c = 0;
#if defined(__AVX__)
  for (; c + 8 <= cols; c += 8) {
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8)
      transpose8x8(from + r * from_ld + c, from_ld, to + c * to_ld + r, to_ld);
    for (int64_t i = c; i < c + 8; ++i)
      for (int64_t rest = r; rest < rows; ++rest)
        to[i * to_ld + rest] = from[rest * from_ld + i];
  }
#endif
  for (; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) to[c * to_ld + r] = from[r * from_ld + c];
}

// A panel of `rows` rows, or of so many columns of a right side, over `depth` elements of the sum:
// to[k * width + r] = from[r * row_stride + k * depth_stride], zeros for r from `rows` up to `width`.
void pack(const float* from, int64_t row_stride, int64_t depth_stride, int64_t rows, int64_t depth,
          float* to, int64_t width);

}  // namespace hotloop
