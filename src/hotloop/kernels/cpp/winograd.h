// The transforms of Winograd's minimal filtering for 3 x 3 filters with stride 1: Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks" (CVPR 2016), F(2x2, 3x3), and F(3x3, 2x2) for the
// gradient of the filters. 16 products stand for 36, and the transforms add and halve only, so float32
// results stay within a small factor of a direct sum's rounding.
//
// Transformed values lie point by point: those of the 4 x 4 points of a tile are `step` floats apart.
#pragma once

#include "image.h"
#include "microkernel.h"

namespace hotloop {

constexpr int64_t kPoints = 16;

// Filters [outputs, inputs, 3, 3]; strides in elements, negative ones for filters turned by 180 degrees.
struct Filters {
  const float* data;
  int64_t o_stride, i_stride, h_stride, w_stride;
};

// B^T d B of the patches of `count` tiles of x, for results from -pad on:
// to[p * step + t * padded(channels) + channel].
void transform_input(const Image& x, const Tiles& tiles, int64_t first, int64_t count,
                     int64_t pad_h, int64_t pad_w, float* to, int64_t step);

// G g G^T of the filters of inputs [begin, end): to[p][block of kDirectNR outputs][input][output].
void transform_filters(const Filters& filters, int64_t inputs, int64_t outputs, int64_t begin,
                       int64_t end, float* to);

// G g G^T of 2 x 2 gradients, G = [1 0; 1/2 1/2; 1/2 -1/2; 0 1]: to[p * step + block * most][t][output].
// Their sums are added to `total`.
void transform_gradient(const Image& g, const Tiles& tiles, int64_t first, int64_t count, float* to,
                        int64_t most, int64_t step, float* total);

// A^T m A with A^T = [1 1 1 0; 0 1 -1 0; 0 1 1 -1]: the 3 x 3 gradient of filters.
void inverse_filter_transform(const Vector m[4][4], Vector out[3][3]);

// A^T m A: the 2 x 2 results of one tile from m[p * step].
inline void inverse_transform(const float* m, int64_t step, Vector out[2][2]) {
  Vector r[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector a = load(m + j * step), b = load(m + (4 + j) * step);
    const Vector c = load(m + (8 + j) * step), e = load(m + (12 + j) * step);
    r[0][j] = a + b + c;
    r[1][j] = b - c - e;
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    out[i][0] = r[i][0] + r[i][1] + r[i][2];
    out[i][1] = r[i][1] - r[i][2] - r[i][3];
  }
}

}  // namespace hotloop
