#include "winograd.h"

#include <algorithm>

namespace hotloop {
namespace {

// B^T d B of a 4 x 4 patch; point p of the result goes to out[p * step].
inline void transform_patch(Vector d[4][4], float* out, int64_t step) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector a = d[0][j], b = d[1][j], c = d[2][j], e = d[3][j];
    d[0][j] = a - c;
    d[1][j] = b + c;
    d[2][j] = c - b;
    d[3][j] = b - e;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store(out + (4 * i + 0) * step, d[i][0] - d[i][2]);
    store(out + (4 * i + 1) * step, d[i][1] + d[i][2]);
    store(out + (4 * i + 2) * step, d[i][2] - d[i][1]);
    store(out + (4 * i + 3) * step, d[i][1] - d[i][3]);
  }
}

// The filters of one input for a vector of outputs from o on; zeros for those that are not there.
void read_filters(const Filters& w, int64_t input, int64_t inputs, int64_t o, int64_t outputs,
                  Vector g[3][3]) {
  for (int64_t a = 0; a < 3; ++a)
    for (int64_t b = 0; b < 3; ++b) g[a][b] = Vector{};
  if (input >= inputs) return;
  for (int64_t l = 0; l < std::min<int64_t>(kLanes, outputs - o); ++l)
    for (int64_t a = 0; a < 3; ++a)
      for (int64_t b = 0; b < 3; ++b)
        g[a][b][l] = w.data[(o + l) * w.o_stride + input * w.i_stride + a * w.h_stride +
                            b * w.w_stride];
}

}  // namespace

void transform_input(const Image& x, const Tiles& tiles, int64_t first, int64_t count,
                     int64_t pad_h, int64_t pad_w, float* to, int64_t step) {
  const int64_t channels = padded(x.channels);
  for (int64_t t = first; t < first + count; ++t, to += channels) {
    const Tile tile(tiles, t);
    const Patch<4> patch(x, tile.n, tile.h - pad_h, tile.w - pad_w);
    Vector d[4][4];
    for (int64_t c = 0; c < channels; c += kLanes) {
      patch.read(x.argmax, c, x.channels - c, d);
      transform_patch(d, to + c, step);
    }
  }
}

void transform_filters(const Filters& filters, int64_t inputs, int64_t outputs, int64_t begin,
                       int64_t end, float* to) {
  const int64_t depth = padded(inputs), all = padded(outputs);
  for (int64_t i = begin; i < end; ++i)
    for (int64_t o = 0; o < all; o += kLanes) {
      const int64_t block = o / kDirectNR * kDirectNR, width = std::min(kDirectNR, all - block);
      float* point = to + block * depth + i * width + (o - block);
      Vector g[3][3], r[4][3];
      read_filters(filters, i, inputs, o, outputs, g);
      for (int b = 0; b < 3; ++b) {
        const Vector ends = (g[0][b] + g[2][b]) * 0.5f, middle = g[1][b] * 0.5f;
        r[0][b] = g[0][b];
        r[1][b] = ends + middle;
        r[2][b] = ends - middle;
        r[3][b] = g[2][b];
      }
      for (int a = 0; a < 4; ++a) {
        const Vector ends = (r[a][0] + r[a][2]) * 0.5f, middle = r[a][1] * 0.5f;
        const Vector row[4] = {r[a][0], ends + middle, ends - middle, r[a][2]};
        for (int b = 0; b < 4; ++b) store(point + (4 * a + b) * depth * all, row[b]);
      }
    }
}

void transform_gradient(const Image& g, const Tiles& tiles, int64_t first, int64_t count, float* to,
                        int64_t most, int64_t step, float* total) {
  const int64_t all = padded(g.channels);
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile(tiles, first + t);
    const Patch<2> patch(g, tile.n, tile.h, tile.w);
    for (int64_t o = 0; o < all; o += kLanes) {
      Vector d[2][2], r[4][2];
      patch.read(g.argmax, o, g.channels - o, d);
      store(total + o, load(total + o) + ((d[0][0] + d[0][1]) + (d[1][0] + d[1][1])));
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        r[0][j] = d[0][j];
        r[1][j] = (d[0][j] + d[1][j]) * 0.5f;
        r[2][j] = (d[0][j] - d[1][j]) * 0.5f;
        r[3][j] = d[1][j];
      }
      const int64_t block = o / kDirectNR * kDirectNR, width = std::min(kDirectNR, all - block);
      float* point = to + block * most + t * width + (o - block);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vector row[4] = {r[i][0], (r[i][0] + r[i][1]) * 0.5f, (r[i][0] - r[i][1]) * 0.5f,
                               r[i][1]};
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store(point + (4 * i + j) * step, row[j]);
      }
    }
  }
}

void inverse_filter_transform(const Vector m[4][4], Vector out[3][3]) {
  Vector r[3][4];
  for (int j = 0; j < 4; ++j) {
    const Vector both = m[1][j] + m[2][j];
    r[0][j] = m[0][j] + both;
    r[1][j] = m[1][j] - m[2][j];
    r[2][j] = both - m[3][j];
  }
  for (int i = 0; i < 3; ++i) {
    const Vector both = r[i][1] + r[i][2];
    out[i][0] = r[i][0] + both;
    out[i][1] = r[i][1] - r[i][2];
    out[i][2] = both - r[i][3];
  }
}

}  // namespace hotloop
