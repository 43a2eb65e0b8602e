// Images [batch, height, width, channels] as convolutions read them: in 2 x 2 tiles of results.
#pragma once

#include "vector.h"

namespace hotloop {

// Channels are adjacent. With `argmax`, data is instead the gradient of the result of pooling this image by
// 2 x 2: a pixel's value is that of its window if the window's argmax says so, else 0.
struct Image {
  int64_t batch, channels, height, width, n_stride, h_stride, w_stride;
  const float* data;
  const uint8_t* argmax = nullptr;
};

// The 2 x 2 tiles of results [batch, height, width], in order.
struct Tiles {
  int64_t rows, cols, count;
  Tiles(int64_t batch, int64_t height, int64_t width)
      : rows((height + 1) / 2), cols((width + 1) / 2), count(batch * rows * cols) {}
};

struct Tile {
  int64_t n, h, w;
  Tile(int64_t n, int64_t h, int64_t w) : n(n), h(h), w(w) {}
  Tile(const Tiles& tiles, int64_t at)
      : n(at / (tiles.rows * tiles.cols)), h(at / tiles.cols % tiles.rows * 2),
        w(at % tiles.cols * 2) {}
};

// Where the pixels of a size x size patch lie, from (h, w) on: their first channels, and what the argmax of
// their windows must be; null outside.
template <int size>
struct Patch {
  const float* data[size][size];
  const uint8_t* argmax[size][size];
  uint8_t wanted[size][size];

  Patch(const Image& x, int64_t n, int64_t h, int64_t w) {
    const int64_t half = x.argmax ? 1 : 0;
    const int64_t H = x.height >> half << half, W = x.width >> half << half;
    for (int64_t i = h; i < h + size; ++i)
      for (int64_t j = w; j < w + size; ++j) {
        const bool inside = i >= 0 && i < H && j >= 0 && j < W;
        const int64_t row = i >> half, col = j >> half;
        data[i - h][j - w] =
            inside ? x.data + n * x.n_stride + row * x.h_stride + col * x.w_stride : nullptr;
        wanted[i - h][j - w] = static_cast<uint8_t>((i & 1) * 2 + (j & 1));
        if (x.argmax && inside)
          argmax[i - h][j - w] =
              x.argmax + ((n * (x.height / 2) + row) * (x.width / 2) + col) * x.channels;
      }
  }

  // `count` channels from c on, or as many as there are lanes.
  void read(bool pooled, int64_t c, int64_t count, Vector d[size][size]) const {
    if (pooled) read_pooled(c, count, d);
    else if (count >= kLanes) read_values<true>(c, count, d);
    else read_values<false>(c, count, d);
  }

 private:
  template <bool whole>
  inline void read_values(int64_t c, int64_t count, Vector d[size][size]) const {
#pragma GCC unroll 4
    for (int i = 0; i < size; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < size; ++j)
        d[i][j] = data[i][j] ? load<whole>(data[i][j] + c, count) : Vector{};
  }

  // Whole windows.
  template <bool whole>
  inline void read_windows(int64_t c, int64_t count, Vector d[size][size]) const {
#pragma GCC unroll 2
    for (int i = 0; i < size; i += 2)
#pragma GCC unroll 2
      for (int j = 0; j < size; j += 2) {
        Vector value{};
        Words at{};
        if (data[i][j]) {
          value = load<whole>(data[i][j] + c, count);
          at = load_bytes<whole>(argmax[i][j] + c, count);
        }
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) d[i + p / 2][j + p % 2] = at == p ? value : Vector{};
      }
  }

  // Whole windows, or pixel by pixel.
  void read_pooled(int64_t c, int64_t count, Vector d[size][size]) const {
    if (wanted[0][0] == 0)
      return count >= kLanes ? read_windows<true>(c, count, d) : read_windows<false>(c, count, d);
    read(false, c, count, d);
    for (int i = 0; i < size; ++i)
      for (int j = 0; j < size; ++j)
        if (data[i][j])
          d[i][j] = load_bytes(argmax[i][j] + c, count) == wanted[i][j] ? d[i][j] : Vector{};
  }
};

}  // namespace hotloop
