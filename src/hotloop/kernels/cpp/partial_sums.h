// Sums over rows in an order that the number of threads does not change: rows go in blocks of kBlockRows, each
// block has a row of partial sums, and these are added by pairs.
#pragma once

#include "vector.h"

namespace hotloop {

constexpr int64_t kBlockRows = 64;

inline int64_t row_blocks(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// out[c] = the sum of column c of partials [blocks, cols], for c in [begin, end); partials are used up.
inline void add_by_pairs(float* partials, int64_t blocks, int64_t cols, int64_t begin, int64_t end,
                         float* out) {
  for (int64_t gap = 1; gap < blocks; gap *= 2)
    for (int64_t b = 0; b + gap < blocks; b += 2 * gap) {
      float* __restrict to = partials + b * cols;
      const float* __restrict from = partials + (b + gap) * cols;
#pragma omp simd
      for (int64_t c = begin; c < end; ++c) to[c] += from[c];
    }
  for (int64_t c = begin; c < end; ++c) out[c] = blocks ? partials[c] : 0;
}

}  // namespace hotloop
