// Convolutions of images with few channels, such as a first layer's, as direct sums.
#include "convolve.h"
#include "parallel.h"
#include "scratch.h"

namespace hotloop {
namespace {

thread_local Scratch filter_scratch, part_scratch;

// The 4 x 4 patches of the channels, for results from (h, w) - pad on; zeros outside.
inline void read_patches(const Image& x, int64_t n, int64_t h, int64_t w, float d[][4][4]) {
  const float* from = x.data + n * x.n_stride + h * x.h_stride + w * x.w_stride;
  const bool inside = h >= 0 && w >= 0 && h + 4 <= x.height && w + 4 <= x.width;
  for (int64_t c = 0; c < x.channels; ++c)
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) {
        const bool there =
            inside || (h + i >= 0 && h + i < x.height && w + j >= 0 && w + j < x.width);
        d[c][i][j] = there ? from[i * x.h_stride + j * x.w_stride + c] : 0.0f;
      }
}

// to[input][row][column][output].
void lay_out_filters(const Filters& filters, int64_t inputs, int64_t outputs, float* to) {
  const int64_t O = padded(outputs);
  for (int64_t c = 0; c < inputs; ++c)
    for (int64_t p = 0; p < 9; ++p)
      for (int64_t o = 0; o < O; ++o)
        to[(c * 9 + p) * O + o] =
            o < outputs ? filters.data[o * filters.o_stride + c * filters.i_stride +
                                       p / 3 * filters.h_stride + p % 3 * filters.w_stride]
                        : 0.0f;
}

void convolve_tiles(const Convolution& call, const Tiles& tiles, Range range,
                    const float* filters) {
  const Image& x = call.input;
  const int64_t O = padded(call.epilogue.channels);
  for (int64_t t = range.begin; t < range.end; ++t) {
    const Tile tile(tiles, t);
    float d[kFewChannels][4][4];
    read_patches(x, tile.n, tile.h - call.pad_h, tile.w - call.pad_w, d);
    for (int64_t o = 0; o < O; o += kLanes) {
      Vector r[2][2] = {};
      for (int64_t c = 0; c < x.channels; ++c)
#pragma GCC unroll 9
        for (int p = 0; p < 9; ++p) {
          const Vector w = load(filters + (c * 9 + p) * O + o);
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) r[q / 2][q % 2] += d[c][p / 3 + q / 2][p % 3 + q % 2] * w;
        }
      call.epilogue.with_kind([&](auto kind) { call.epilogue.put(kind, tile, o, r); });
    }
  }
}

// sums[c][row][column][output] of the gradients of some tiles, then the sums of the gradient itself.
void add_tiles(const FilterGradient& call, const Tiles& tiles, Range range, float* sums) {
  const Image &x = call.input, &g = call.gradient;
  const int64_t O = padded(g.channels);
  std::memset(sums, 0, static_cast<size_t>((9 * x.channels + 1) * O) * sizeof(float));
  for (int64_t t = range.begin; t < range.end; ++t) {
    const Tile tile(tiles, t);
    const Patch<2> patch(g, tile.n, tile.h, tile.w);
    float d[kFewChannels][4][4];
    read_patches(x, tile.n, tile.h - call.pad_h, tile.w - call.pad_w, d);
    for (int64_t o = 0; o < O; o += kLanes) {
      Vector e[2][2];
      patch.read(g.argmax, o, g.channels - o, e);
      for (int64_t c = 0; c < x.channels; ++c)
#pragma GCC unroll 9
        for (int p = 0; p < 9; ++p) {
          float* sum = sums + (c * 9 + p) * O + o;
          Vector value = load(sum);
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) value += d[c][p / 3 + q / 2][p % 3 + q % 2] * e[q / 2][q % 2];
          store(sum, value);
        }
      float* total = sums + x.channels * 9 * O + o;
      store(total, load(total) + ((e[0][0] + e[0][1]) + (e[1][0] + e[1][1])));
    }
  }
}

}  // namespace

void convolve_directly(const Convolution& call) {
  const ConvolutionEpilogue& epilogue = call.epilogue;
  const Tiles tiles(call.input.batch, epilogue.height, epilogue.width);
  const float* filters = call.prepared;
  if (!filters) {
    float* made = filter_scratch.reserve(9 * call.input.channels * padded(epilogue.channels));
    lay_out_filters(call.filters, call.input.channels, epilogue.channels, made);
    filters = made;
  }
  parallel(call.threads, [&](Worker worker) {
    convolve_tiles(call, tiles, share(tiles.count, 1, worker), filters);
  });
}

void filter_gradient_directly(const FilterGradient& call) {
  const Image &x = call.input, &g = call.gradient;
  const Tiles tiles(x.batch, g.height, g.width);
  const int64_t C = x.channels, O = padded(g.channels), sums = (9 * C + 1) * O;
  float* parts = part_scratch.reserve(kGradientParts * sums);
  parallel_for(call.threads, kGradientParts, [&](int64_t part) {
    add_tiles(call, tiles, share(tiles.count, 1, static_cast<int>(part), kGradientParts),
              parts + part * sums);
  });
  for (int64_t i = 0; i < sums; ++i)
    for (int64_t part = 1; part < kGradientParts; ++part) parts[i] += parts[part * sums + i];
  const FilterStrides& s = call.strides;
  for (int64_t o = 0; o < g.channels; ++o) {
    for (int64_t c = 0; c < C; ++c)
      for (int64_t p = 0; p < 9; ++p)
        call.filter_gradient[o * s.o + c * s.i + p / 3 * s.h + p % 3 * s.w] =
            parts[(c * 9 + p) * O + o];
    call.bias_gradient[o] = parts[C * 9 * O + o];
  }
}

int64_t prepared_filter_floats(int64_t outputs, int64_t inputs) {
  return inputs < kFewChannels ? 9 * inputs * padded(outputs)
                               : kPoints * padded(inputs) * padded(outputs);
}

void prepare_filters(const Filters& filters, int64_t outputs, int64_t inputs, float* to) {
  if (inputs < kFewChannels) lay_out_filters(filters, inputs, outputs, to);
  else transform_filters(filters, inputs, outputs, 0, padded(inputs), to);
}

}  // namespace hotloop
