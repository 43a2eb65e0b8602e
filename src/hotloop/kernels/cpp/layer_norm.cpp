// Layer norm of a train step: forward with what the gradient needs, and backward.
#include "layer_norm.h"

#include <cstring>

#include "abi.h"
#include "error.h"
#include "parallel.h"
#include "partial_sums.h"
#include "scratch.h"

namespace hotloop {
namespace {

// Fewer elements than so many are one thread's.
constexpr int64_t kOneThreadCount = 32768;

thread_local Scratch scratch;

int threads_for(int64_t count, int64_t num_threads) {
  return count < kOneThreadCount ? 1 : static_cast<int>(num_threads);
}

void layer_norm(const LayerNormCall& call) {
  parallel_for(threads_for(call.rows * call.cols, call.num_threads), call.rows, [&](int64_t row) {
    const int64_t at = row * call.cols;
    const Moments moments = layer_norm_row(call.x + at, call.cols, call.weight, call.bias,
                                           call.epsilon, call.out + at);
    if (call.mean) call.mean[row] = moments.mean;
    if (call.rstd) call.rstd[row] = moments.rstd;
  });
}

// The gradient of a row's input: rstd (g - mean(g) - normal mean(g normal)), g = gradient * weight and
// normal = (x - mean) rstd.
void input_gradient_row(const LayerNormGradientCall& call, int64_t row) {
  const int64_t count = call.cols;
  const float *x = call.x + row * count, *gradient = call.gradient + row * count;
  const float mean = call.mean[row], rstd = call.rstd[row];
  const auto weighted = [&](int64_t c) {
    const Vector g = load(gradient + c, count - c);
    return call.weight ? g * load(call.weight + c, count - c) : g;
  };
  Vector sums{}, products{};
  for (int64_t c = 0; c < count; c += kLanes) {
    const Vector g = weighted(c);
    Vector product = g * ((load(x + c, count - c) - mean) * rstd);
    if (count - c < kLanes) product = first_lanes_of(product, count - c, 0);
    sums += g;
    products += product;
  }
  const float inverse = 1.0f / static_cast<float>(count);
  const float level = sum_of(sums) * inverse, slope = sum_of(products) * inverse;
  float* out = call.input_gradient + row * count;
  for (int64_t c = 0; c < count; c += kLanes) {
    const Vector normal = (load(x + c, count - c) - mean) * rstd;
    store(out + c, rstd * (weighted(c) - level - normal * slope), count - c);
  }
}

// Adds a row's part of the gradients of weight and bias.
void add_row(const LayerNormGradientCall& call, int64_t row, float* __restrict weight,
             float* __restrict bias) {
  const float *x = call.x + row * call.cols, *gradient = call.gradient + row * call.cols;
  const float mean = call.mean[row], rstd = call.rstd[row];
#pragma omp simd
  for (int64_t c = 0; c < call.cols; ++c) {
    weight[c] += gradient[c] * ((x[c] - mean) * rstd);
    bias[c] += gradient[c];
  }
}

void layer_norm_gradient(const LayerNormGradientCall& call) {
  const bool has_sums = call.weight_gradient || call.bias_gradient;
  const int64_t blocks = row_blocks(call.rows), cols = call.cols, partials = blocks * cols;
  float* weight = has_sums ? scratch.reserve(2 * partials) : nullptr;
  float* bias = weight + (has_sums ? partials : 0);
  parallel(threads_for(call.rows * cols, call.num_threads), [&](Worker worker) {
    const Range mine = share(blocks, 1, worker);
    for (int64_t block = mine.begin; block < mine.end; ++block) {
      const int64_t at = block * cols, end = std::min(call.rows, (block + 1) * kBlockRows);
      if (has_sums) {
        std::memset(weight + at, 0, static_cast<size_t>(cols) * sizeof(float));
        std::memset(bias + at, 0, static_cast<size_t>(cols) * sizeof(float));
      }
      for (int64_t row = block * kBlockRows; row < end; ++row) {
        if (has_sums) add_row(call, row, weight + at, bias + at);
        if (call.input_gradient) input_gradient_row(call, row);
      }
    }
    if (!has_sums) return;
    worker.barrier();
    const Range sums = share(cols, kLineFloats, worker);
    if (call.weight_gradient)
      add_by_pairs(weight, blocks, cols, sums.begin, sums.end, call.weight_gradient);
    if (call.bias_gradient)
      add_by_pairs(bias, blocks, cols, sums.begin, sums.end, call.bias_gradient);
  });
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_layer_norm(const hotloop::LayerNormCall* call) {
  return hotloop::guarded([&] { hotloop::layer_norm(*call); });
}

HOTLOOP_EXPORT int32_t hotloop_layer_norm_gradient(const hotloop::LayerNormGradientCall* call) {
  return hotloop::guarded([&] { hotloop::layer_norm_gradient(*call); });
}
