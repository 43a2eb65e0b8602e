// The two ways to convolve, for the calls of convolution.h and for layers, which keep their filters prepared:
// Winograd's transforms for 3 x 3 filters of enough channels, else direct sums.
#pragma once

#include <algorithm>

#include "abi.h"
#include "epilogue.h"
#include "running_max.h"
#include "winograd.h"

namespace hotloop {

// Images of fewer channels are convolved directly: transforms would cost more than they save.
constexpr int64_t kFewChannels = 8;

struct FilterSize {
  int64_t height, width;

  int64_t taps() const { return height * width; }
  bool is_for_winograd(int64_t channels) const {
    return height == 3 && width == 3 && channels >= kFewChannels;
  }
};
constexpr FilterSize k3x3{3, 3};

// What becomes of a tile's 2 x 2 results.
struct ConvolutionEpilogue {
  Epilogue terms;  // An addend and a mask are laid out as the output. relu or no activation.
  float* output;
  ImageStrides strides;
  int64_t channels, height, width;  // Of the results, before they are pooled.
  bool pooled = false;              // By 2 x 2; then there is neither addend nor mask.
  uint8_t* argmax = nullptr;        // Of pooled results, where it is wanted.

  // Calls body(kind) with what `put` is to be told.
  template <class Body>
  void with_kind(const Body& body) const {
    if (pooled) body(Pooled());
    else terms.with_kind<kRelu>(body);
  }

  // The results of a tile for a vector of channels from o on.
  template <class Kind>
  inline void put(Kind, const Tile& tile, int64_t o, const Vector r[2][2]) const {
    const int64_t count = channels - o;
    const int64_t at = tile.n * strides.n + tile.h * strides.h + tile.w * strides.w + o;
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        if (tile.h + i >= height || tile.w + j >= width) continue;
        const int64_t pixel = at + i * strides.h + j * strides.w;
        const Vector value = apply_epilogue<Kind, false>(
            r[i][j], Kind::kBias ? terms.bias + o : nullptr,
            Kind::kAddend ? terms.addend + pixel : nullptr,
            Kind::kMask ? terms.mask + pixel : nullptr, count);
        store(output + pixel, value, count);
      }
  }

  struct Pooled {};

  inline void put(Pooled, const Tile& tile, int64_t o, const Vector r[2][2]) const {
    if (tile.h + 1 >= height || tile.w + 1 >= width) return;
    const int64_t count = channels - o, h = tile.h / 2, w = tile.w / 2;
    const Vector bias = terms.bias ? load(terms.bias + o, count) : Vector{};
    RunningMax<LaneByLane, true> most(r[0][0] + bias, 0);
    most.take(r[0][1] + bias, 1);
    most.take(r[1][0] + bias, 2);
    most.take(r[1][1] + bias, 3);
    if (terms.activation == kRelu) most.relu();
    if (argmax)
      store_bytes(argmax + ((tile.n * (height / 2) + h) * (width / 2) + w) * channels + o,
                  most.place, count);
    float* to = output + tile.n * strides.n + h * strides.h + w * strides.w + o * strides.c;
    if (strides.c == 1) {
      store(to, most.best, count);
    } else {
      for (int64_t l = 0; l < std::min<int64_t>(count, kLanes); ++l)
        to[l * strides.c] = most.best[l];
    }
  }
};

struct Convolution {
  Image input;
  FilterSize size;
  int64_t pad_h, pad_w;
  Filters filters;
  const float* prepared;  // The filters as prepare_filters makes them; null: they are made in the call.
  ConvolutionEpilogue epilogue;
  int threads;
};

// By Winograd's transforms, and as a direct sum of an input without argmax; prepared filters are those of the
// way. Throw Error.
void convolve_winograd(const Convolution& convolution);
void convolve_directly(const Convolution& convolution);

// 3 x 3 filters as the way that fits so many inputs reads them, and how many floats they take.
int64_t prepared_filter_floats(int64_t outputs, int64_t inputs);
void prepare_filters(const Filters& filters, int64_t outputs, int64_t inputs, float* to);

// Whether so few tiles leave the micro-kernel waiting; patches of the image as rows are better then. Results of the
// two ways differ by rounding, so a layer that has both depends on the number of threads as on the batch.
bool has_few_tiles(int64_t batch, int64_t height, int64_t width, int64_t threads);

// The gradients of filters (their strides are those of filter_gradient) and bias from that of the results.
struct FilterGradient {
  Image input, gradient;
  FilterSize size;
  int64_t pad_h, pad_w;
  float *filter_gradient, *bias_gradient;
  FilterStrides strides;
  int threads;
};

void filter_gradient_winograd(const FilterGradient& call);
void filter_gradient_directly(const FilterGradient& call);
// Of a gradient with argmax. Products with gradients of 0 are not made.
void pooled_filter_gradient(const FilterGradient& call);

// The gradient of an image from that of the pooled results: each value that is not 0 is given back to the pixels it
// came from. Throws Error.
struct PooledInputGradient {
  Image gradient;  // With its argmax.
  FilterSize size;
  int64_t pad_h, pad_w;
  Filters filters;               // Of the convolution itself.
  ConvolutionEpilogue epilogue;  // Of the image: a mask or nothing, and its size.
  int threads;
};

void pooled_input_gradient(const PooledInputGradient& call);

// The gradient of a weight is added up in so many parts, each from its own tiles, and these in order:
// the same sums whatever the number of threads.
constexpr int64_t kGradientParts = 8;

}  // namespace hotloop
