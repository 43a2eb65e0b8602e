// What goes over rows or single values: layer norm, softmax, means, activations.
#include "epilogue.h"
#include "layer_norm.h"
#include "layers.h"
#include "parallel.h"
#include "softmax.h"

namespace hotloop {
namespace {

// Fewer elements than so many are one thread's.
constexpr int64_t kOneThreadCount = 32768;

}  // namespace

void layer_norm(const Layer& layer, int64_t batch, const float* x, float* out, int threads) {
  const int64_t C = layer.windows.channels, rows = batch * layer.windows.height;
  if (rows * C < kOneThreadCount) threads = 1;
  parallel_for(threads, rows,
               [&](int64_t row) {
                 layer_norm_row(x + row * C, C, layer.weight, layer.bias, layer.epsilon,
                                out + row * C);
               });
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
