// The gradients of pooled results as lists of those that are not 0.
#pragma once

#include "direct_sums.h"
#include "running_max.h"

namespace hotloop {

// Gradients in one list, or those of one row if they are more.
constexpr int64_t kListed = 512;

struct Gradient {
  int32_t at;  // Of the first pixel of the result that was pooled.
  float value;
};
static_assert(sizeof(Gradient) == 2 * sizeof(float));

// Those of output o in rows of an image, whose pixels lie `row` and `pixel` floats apart. How many there are; adds
// them to `sum`.
inline int64_t list_gradients(const Image& g, int64_t o, const Piece& piece, int64_t row,
                              int64_t pixel, Gradient* list, float* sum) {
  const int64_t height = g.height / 2, width = g.width / 2, first = piece.rows.begin / 2;
  const int64_t to[4] = {0, pixel, row, row + pixel};
  Gradient* next = list;
  float total = *sum;
  for (int64_t h = first; h < std::min(piece.rows.end / 2, height); ++h) {
    const float* from = g.data + piece.n * g.n_stride + h * g.h_stride + o;
    const uint8_t* place = g.argmax + (piece.n * height + h) * width * g.channels + o;
    int64_t at = piece.at + 2 * (h - first) * row;
    for (int64_t w = 0; w < width; ++w, at += 2 * pixel) {
      // Without a branch: which values are cut off is as good as random.
      uint32_t bits;
      std::memcpy(&bits, from, sizeof bits);
      bits &= static_cast<uint32_t>(*place == kCutOff) - 1;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      *next = {static_cast<int32_t>(at + to[*place & 3]), value};
      next += (bits << 1) != 0;  // Neither 0 nor -0.
      total += value;
      from += g.w_stride, place += g.channels;
    }
  }
  *sum = total;
  return next - list;
}

}  // namespace hotloop
