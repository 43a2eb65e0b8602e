// What direct sums of convolutions share: pieces of images with zeros around them, and blocks of a filter's taps that
// fit into registers.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "image.h"
#include "parallel.h"

namespace hotloop {

// Floats of an image's piece that is used again and again: half of a first-level cache of 48 KiB. A piece has two
// rows of results at least.
constexpr int64_t kPieceFloats = 6 * 1024;

// `rows` x `cols` pixels from (h, w) on, zeros outside the image: to[row][col][step], channels c to c + step.
inline void copy_pixels(const Image& x, int64_t n, int64_t h, int64_t w, int64_t rows, int64_t cols,
                        int64_t c, int64_t step, float* to) {
  const int64_t left = std::clamp<int64_t>(-w, 0, cols);
  const int64_t right = std::clamp<int64_t>(w + cols - x.width, 0, cols - left);
  const int64_t middle = cols - left - right, count = std::min(step, x.channels - c);
  for (int64_t i = h; i < h + rows; ++i) {
    if (i < 0 || i >= x.height || middle == 0) {
      to = std::fill_n(to, cols * step, 0.0f);
      continue;
    }
    const float* from = x.data + n * x.n_stride + i * x.h_stride + (w + left) * x.w_stride + c;
    to = std::fill_n(to, left * step, 0.0f);
    if (count == step && x.w_stride == step) {
      std::memcpy(to, from, static_cast<size_t>(middle * step) * sizeof(float));
      to += middle * step;
    } else {
      for (int64_t j = 0; j < middle; ++j, from += x.w_stride, to += step) {
        if (step == kLanes) store(to, load(from, count));
        else std::fill(std::copy_n(from, count, to), to + step, 0.0f);
      }
    }
    to = std::fill_n(to, right * step, 0.0f);
  }
}

// Rows [begin, end) of the results of image n, and where the pixels that they are made from, or belong to, begin. The
// first row is even.
struct Piece {
  int64_t n;
  Range rows;
  int64_t at;
};

constexpr int kMostPieces = 64;

// How images are cut into pieces that are used together: pairs of rows, in order.
struct Cut {
  int64_t height, taps;            // Rows of an image's results, and of a filter.
  int64_t row, results;            // Floats of a row of pixels; results of a pair of rows.
  int64_t most_results;            // Of pieces used together, unless two rows have more.
  int64_t pairs = (height + 1) / 2;  // Of an image.

  // Floats and results that pieces used together take at most.
  int64_t floats() const { return std::max(kPieceFloats, (taps + 1) * row); }
  int64_t listed() const { return std::max(most_results, results); }

  // The first pieces of pairs [range) of all images; their rows of pixels follow each other. What is left is the rest
  // of the range.
  int take(Range* range, Piece* pieces) const {
    int count = 0;
    int64_t used = 0, made = 0;
    while (range->begin < range->end && count < kMostPieces) {
      const int64_t n = range->begin / pairs, pair = range->begin % pairs;
      int64_t fit = ((kPieceFloats - used) / row - (taps - 1)) / 2;
      if (results) fit = std::min(fit, (most_results - made) / results);
      if (fit < 1 && count) break;
      const int64_t now =
          std::min({std::max<int64_t>(fit, 1), pairs - pair, range->end - range->begin});
      const Range rows{2 * pair, std::min(2 * (pair + now), height)};
      pieces[count++] = {n, rows, used};
      used += (rows.end - rows.begin + taps - 1) * row;
      made += now * results;
      range->begin += now;
    }
    return count;
  }
};

// Vectors of a filter's taps that registers hold at once, beside what they are multiplied with.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTapVectors = 28;
#else
constexpr int kTapVectors = 12;
#endif
constexpr int kTapRows = 5, kTapCols = 7;

// Calls body(integral_constant n) for n of 1 to `most`.
template <int most, class Body>
inline void with_number(int64_t n, const Body& body) {
  if constexpr (most > 1) {
    if (n < most) return with_number<most - 1>(n, body);
  }
  body(std::integral_constant<int, most>());
}

// Calls body(rows, vectors, first row, first vector), the first two as constants, for blocks of taps that registers
// hold: of `rows` rows of `vectors` (at most kTapCols) vectors.
template <class Body>
inline void for_tap_blocks(int64_t rows, int64_t vectors, const Body& body) {
  const int row_blocks = static_cast<int>((rows + kTapRows - 1) / kTapRows);
  for (int i = 0; i < row_blocks; ++i) {
    const Range down = share(rows, 1, i, row_blocks);
    with_number<kTapRows>(down.end - down.begin, [&](auto height) {
      constexpr int most = std::min(kTapCols, kTapVectors / decltype(height)::value);
      const int blocks = static_cast<int>((vectors + most - 1) / most);
      for (int j = 0; j < blocks; ++j) {
        const Range along = share(vectors, 1, j, blocks);
        with_number<most>(along.end - along.begin,
                          [&](auto width) { body(height, width, down.begin, along.begin); });
      }
    });
  }
}

}  // namespace hotloop
