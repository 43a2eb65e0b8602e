// The layers of a network's forward pass, on a batch. Values of a sample follow each other, images with their
// channels adjacent; abi.h says what a Layer has. They throw Error.
#pragma once

#include "abi.h"

namespace hotloop {

// In the order of KINDS in infer/network.py.
enum LayerKind : int64_t {
  kNchwToNhwc, kNhwcToNchw, kLinear, kConvolution, kMaxPool, kMean, kPointwise, kSoftmax, kLayerNorm,
  kAttention
};

// Where values are that are not in the arena.
constexpr int64_t kNetworkInput = -1, kNetworkOutput = -2, kAbsent = -3;

// x W^T of each row.
void linear_layer(const Layer& layer, int64_t batch, const float* x, const float* addend,
                  float* out, int threads);
void convolution_layer(const Layer& layer, int64_t batch, const float* x, const float* addend,
                       float* out, int threads);
void max_pool_layer(const Layer& layer, int64_t batch, const float* x, float* out, int threads);
// The mean of each channel over the pixels of an image.
void mean_layer(const Layer& layer, int64_t batch, const float* x, float* out);
// A value, or the sum of two, then the activation.
void pointwise_layer(const Layer& layer, int64_t batch, const float* x, const float* addend,
                     float* out, int threads);
// Over the channels of each row, as is layer norm.
void softmax_layer(const Layer& layer, int64_t batch, const float* x, float* out, int threads);
void layer_norm(const Layer& layer, int64_t batch, const float* x, float* out, int threads);
// queries, keys, values: of the first head of the first sample.
void attention(const Attention& attention, int64_t batch, const float* queries, const float* keys,
               const float* values, float* out, int threads);

}  // namespace hotloop
