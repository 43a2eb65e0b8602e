// What goes over rows or single values: layer norm, softmax, means, activations.
#include <cmath>

#include "epilogue.h"
#include "layers.h"
#include "parallel.h"
#include "softmax.h"

namespace hotloop {
namespace {

// Fewer elements than so many are one thread's.
constexpr int64_t kOneThreadCount = 32768;

void normalize_row(const Layer& layer, const float* x, float* out) {
  const int64_t C = layer.windows.channels;
  // Two passes: the sum of squares of what is left is not a difference of large numbers.
  Vector sums{}, squares{};
  for (int64_t c = 0; c < C; c += kLanes) sums += load(x + c, C - c);
  const float mean = sum_of(sums) / static_cast<float>(C);
  for (int64_t c = 0; c < C; c += kLanes) {
    Vector gap = load(x + c, C - c) - mean;
    if (C - c < kLanes) gap = first_lanes_of(gap, C - c, 0);
    squares += gap * gap;
  }
  const float variance = sum_of(squares) / static_cast<float>(C);
  const float inverse = 1.0f / std::sqrt(variance + layer.epsilon);
  for (int64_t c = 0; c < C; c += kLanes) {
    Vector value = (load(x + c, C - c) - mean) * inverse;
    if (layer.weight) value *= load(layer.weight + c, C - c);
    if (layer.bias) value += load(layer.bias + c, C - c);
    store(out + c, value, C - c);
  }
}

}  // namespace

void layer_norm(const Layer& layer, int64_t batch, const float* x, float* out, int threads) {
  const int64_t C = layer.windows.channels, rows = batch * layer.windows.height;
  if (rows * C < kOneThreadCount) threads = 1;
  parallel_for(threads, rows,
               [&](int64_t row) { normalize_row(layer, x + row * C, out + row * C); });
}

void softmax_layer(const Layer& layer, int64_t batch, const float* x, float* out, int threads) {
  const int64_t C = layer.windows.channels, rows = batch * layer.windows.height;
  if (rows * C < kOneThreadCount) threads = 1;
  parallel_for(threads, rows, [&](int64_t row) {
    softmax_row(x + row * C, C, 1, layer.logarithm, out + row * C);
  });
}

void mean_layer(const Layer& layer, int64_t batch, const float* x, float* out) {
  const int64_t C = layer.windows.channels, pixels = layer.windows.height * layer.windows.width;
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t c = 0; c < C; c += kLanes) {
      Vector sum{};
      for (int64_t p = 0; p < pixels; ++p) sum += load(x + (n * pixels + p) * C + c, C - c);
      store(out + n * C + c, sum / static_cast<float>(pixels), C - c);
    }
}

void pointwise_layer(const Layer& layer, int64_t batch, const float* x, const float* addend,
                     float* out, int threads) {
  const Windows& s = layer.windows;
  const int64_t count = batch * s.height * s.width * s.channels;
  if (count < kOneThreadCount) threads = 1;
  const Epilogue epilogue{nullptr, addend, nullptr, layer.activation};
  parallel(threads, [&](Worker worker) {
    const Range mine = share(count, kLineFloats, worker);
    epilogue.with_kind([&](auto kind) {
      using Kind = decltype(kind);
      for (int64_t i = mine.begin; i < mine.end; i += kLanes) {
        const int64_t lanes = mine.end - i;
        const Vector value = apply_epilogue<Kind, false>(
            load(x + i, lanes), nullptr, Kind::kAddend ? addend + i : nullptr, nullptr, lanes);
        store(out + i, value, lanes);
      }
    });
  });
}

}  // namespace hotloop
