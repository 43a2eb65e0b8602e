// Linear layers and convolutions of a network.
#include "convolve.h"
#include "layers.h"
#include "packed_product.h"

namespace hotloop {
namespace {

thread_local Scratch patch_scratch;

using LayerEpilogue = MatrixEpilogue<kTanhGelu>;

LayerEpilogue epilogue_of(const Layer& layer, const float* addend, float* out) {
  return {{layer.bias, addend, nullptr, layer.activation}, out, layer.output_channels};
}

// Rows of kernel_h x kernel_w x channels elements: the patches that results first to first + count are made
// from; zeros for the padding.
Rows patches(const Windows& s, const float* x, int64_t first, int64_t count, float* to) {
  const int64_t run = s.kernel_w * s.channels, depth = s.kernel_h * run;
  const Rows rows{to, depth};
  for (int64_t p = first; p < first + count; ++p) {
    const int64_t n = p / (s.output_height * s.output_width);
    const int64_t h = p / s.output_width % s.output_height * s.stride_h - s.pad_h;
    const int64_t w = p % s.output_width * s.stride_w - s.pad_w;
    const int64_t left = std::clamp<int64_t>(-w, 0, s.kernel_w);
    const int64_t right = std::clamp<int64_t>(w + s.kernel_w - s.width, 0, s.kernel_w - left);
    for (int64_t i = h; i < h + s.kernel_h; ++i, to += run) {
      const bool inside = i >= 0 && i < s.height;
      const int64_t before = inside ? left : s.kernel_w, after = inside ? right : 0;
      const int64_t copied = s.kernel_w - before - after;
      std::fill_n(to, before * s.channels, 0.0f);
      if (copied > 0)
        std::memcpy(to + before * s.channels,
                    x + ((n * s.height + i) * s.width + w + before) * s.channels,
                    static_cast<size_t>(copied * s.channels) * sizeof(float));
      std::fill_n(to + (s.kernel_w - after) * s.channels, after * s.channels, 0.0f);
    }
  }
  return rows;
}

void convolve_patches(const Layer& layer, int64_t batch, const float* x, const float* addend,
                      float* out, int threads) {
  const Windows& s = layer.windows;
  const int64_t m = batch * s.output_height * s.output_width;
  const int64_t depth = s.kernel_h * s.kernel_w * s.channels;
  const bool in_place = s.kernel_h * s.kernel_w * s.stride_h * s.stride_w == 1 && !s.pad_h &&
                        !s.pad_w;
  const int64_t most_rows = std::min(m, kMostRows) + kDirectMR;
  const Pieces gathered(patch_scratch, in_place ? 0 : most_rows * depth, threads);
  const auto source = [&](const Worker& worker, int64_t first, int64_t count) {
    return in_place ? Rows{x + first * s.channels, s.channels}
                    : patches(s, x, first, count, gathered.of(worker.index));
  };
  packed_product({layer.weight, layer.output_channels, depth, layer.panel_cols}, m, threads, source,
                 epilogue_of(layer, addend, out));
}

// By the ways for 3 x 3 filters.
Convolution small_filters(const Layer& layer, int64_t batch, const float* x, const float* addend,
                          float* out, int threads) {
  const Windows& s = layer.windows;
  const int64_t half = layer.max_pool_2x2 ? 2 : 1, O = layer.output_channels;
  const int64_t height = s.output_height / half, width = s.output_width / half;
  const Image image{batch,      s.channels, s.height, s.width, s.height * s.width * s.channels,
                    s.width * s.channels, s.channels, x};
  const ConvolutionEpilogue epilogue{
      {layer.bias, addend, nullptr, layer.activation}, out,
      ImageStrides{height * width * O, 1, width * O, O}, O, s.output_height, s.output_width,
      layer.max_pool_2x2 != 0};
  return {image, k3x3, s.pad_h, s.pad_w, {}, layer.filters, epilogue, threads};
}

}  // namespace

int64_t packed_floats(int64_t outputs, int64_t depth, int64_t panel_cols) {
  return (outputs / panel_cols * panel_cols + padded(outputs % panel_cols)) * depth;
}

void pack_panels(const float* weight, int64_t outputs, int64_t depth, int64_t panel_cols,
                 float* to) {
  for (int64_t j = 0; j < outputs; j += panel_cols) {
    const int64_t cols = std::min(panel_cols, outputs - j);
    pack(weight + j * depth, depth, 1, cols, depth, to + j * depth, padded(cols));
  }
}

int64_t best_panel_cols(int64_t outputs, int64_t threads) {
  int64_t best = kDirectNR, least = 0;
  for (int64_t wide = kDirectNR; wide >= kDirectNR / 2; wide -= kLanes) {
    const int64_t panels = (outputs + wide - 1) / wide;
    const int64_t longest = (panels + threads - 1) / threads * wide;
    if (!least || longest < least) best = wide, least = longest;
  }
  return best;
}

void linear_layer(const Layer& layer, int64_t batch, const float* x, const float* addend,
                  float* out, int threads) {
  const int64_t depth = layer.windows.channels;
  const auto source = [&](const Worker&, int64_t first, int64_t) {
    return Rows{x + first * depth, depth};
  };
  packed_product({layer.weight, layer.output_channels, depth, layer.panel_cols},
                 batch * layer.windows.height, threads, source, epilogue_of(layer, addend, out));
}

void convolution_layer(const Layer& layer, int64_t batch, const float* x, const float* addend,
                       float* out, int threads) {
  const Windows& s = layer.windows;
  if (!layer.filters) {
    convolve_patches(layer, batch, x, addend, out, threads);
  } else if (s.channels < kFewChannels) {
    convolve_directly(small_filters(layer, batch, x, addend, out, threads));
  } else if (layer.weight && has_few_tiles(batch, s.output_height, s.output_width, threads)) {
    convolve_patches(layer, batch, x, addend, out, threads);
  } else {
    convolve_winograd(small_filters(layer, batch, x, addend, out, threads));
  }
}

}  // namespace hotloop
