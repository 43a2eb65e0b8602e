// A network's forward pass, layer by layer. It needs neither torch nor Python: what it computes, and where
// each value lies, infer/network.py has laid down. Values of one sample lie in the arena at an offset,
// those of a batch of N at N times that.
#include "layers.h"

#include "convolve.h"
#include "error.h"
#include "layout.h"
#include "packed_product.h"
#include "pooling.h"

namespace hotloop {
namespace {

thread_local Scratch arena_scratch;
// Floats of values between the layers, of all samples that are on their way: 64 MiB.
constexpr int64_t kMostArena = 16 * 1024 * 1024;

// Floats of one sample that a layer reads, and that it makes.
int64_t floats_read(const Layer& l) {
  if (l.kind == kAttention) return l.attention.operands[0].sample_floats;
  return l.windows.height * l.windows.width * l.windows.channels;
}

int64_t floats_made(const Layer& l) {
  const Windows& s = l.windows;
  switch (l.kind) {
    case kLinear: return s.height * l.output_channels;
    case kMean: return s.channels;
    case kAttention: return l.attention.queries * l.attention.heads * l.attention.value_size;
    case kConvolution:
    case kMaxPool: {
      const int64_t half = l.max_pool_2x2 ? 2 : 1;
      return s.output_height / half * (s.output_width / half) * l.output_channels;
    }
    default: return floats_read(l);
  }
}

void run_layer(const Layer& l, int64_t batch, const float* in, const float* addend, float* out,
               int threads) {
  const Windows& s = l.windows;
  const int64_t pixels = s.height * s.width, C = s.channels;
  switch (l.kind) {
    case kNchwToNhwc: return nchw_to_nhwc(in, batch, C, pixels, C * pixels, pixels, out, threads);
    case kNhwcToNchw: return nhwc_to_nchw(in, batch, C, pixels, out, threads);
    case kLinear: return linear_layer(l, batch, in, addend, out, threads);
    case kConvolution: return convolution_layer(l, batch, in, addend, out, threads);
    case kMaxPool: return max_pool_layer(l, batch, in, out, threads);
    case kMean: return mean_layer(l, batch, in, out);
    case kPointwise: return pointwise_layer(l, batch, in, addend, out, threads);
    case kSoftmax: return softmax_layer(l, batch, in, out, threads);
    case kLayerNorm: return layer_norm(l, batch, in, out, threads);
    default: throw Error("a network has layers of the kinds that this library knows");
  }
}

void run(const Network& network, int64_t batch, const float* x, float* y) {
  const int threads = static_cast<int>(network.num_threads);
  float* arena = arena_scratch.reserve(network.arena_floats * batch);
  const auto place = [&](int64_t at) -> float* {
    if (at == kNetworkInput) return const_cast<float*>(x);
    if (at == kNetworkOutput) return y;
    return at == kAbsent ? nullptr : arena + at * batch;
  };
  for (int64_t i = 0; i < network.num_layers; ++i) {
    const Layer& l = network.layers[i];
    float* out = place(l.output);
    if (l.kind != kAttention) {
      run_layer(l, batch, place(l.input), place(l.addend), out, threads);
      continue;
    }
    const float* operands[3];
    for (int k = 0; k < 3; ++k)
      operands[k] = place(l.attention.operands[k].input) + l.attention.operands[k].offset;
    attention(l.attention, batch, operands[0], operands[1], operands[2], out, threads);
  }
}

// A large batch goes in equal parts, so that memory stays as it is. Samples of the largest part.
int64_t samples_at_once(int64_t arena_floats, int64_t batch) {
  const int64_t most = std::max<int64_t>(kMostArena / std::max<int64_t>(arena_floats, 1), 1);
  const int64_t parts = std::max<int64_t>((batch + most - 1) / most, 1);
  return (batch + parts - 1) / parts;
}

void run_in_parts(const Network& network, int64_t batch, const float* x, float* y) {
  const int64_t once = samples_at_once(network.arena_floats, batch);
  const int64_t parts = once ? (batch + once - 1) / once : 0;
  const int64_t in = floats_read(network.layers[0]);
  const int64_t out = floats_made(network.layers[network.num_layers - 1]);
  for (int64_t part = 0; part < parts; ++part) {
    const Range mine = share(batch, 1, static_cast<int>(part), static_cast<int>(parts));
    run(network, mine.end - mine.begin, x + mine.begin * in, y + mine.begin * out);
  }
}

}  // namespace

void max_pool_layer(const Layer& l, int64_t batch, const float* x, float* out, int threads) {
  PoolCall call{};
  call.windows = l.windows;
  call.windows.batch = batch;
  const int64_t row = l.windows.width * l.windows.channels;
  call.input = x;
  call.input_strides = {l.windows.height * row, 1, row, l.windows.channels};
  call.output = out;
  call.channels_last = 1;
  call.activation = l.activation;
  call.num_threads = threads;
  pool(call);
}

}  // namespace hotloop

using namespace hotloop;

HOTLOOP_EXPORT int32_t hotloop_network_run(const Network* network, int64_t batch, const float* input,
                                           float* output) {
  return guarded([&] { run_in_parts(*network, batch, input, output); });
}

HOTLOOP_EXPORT int64_t hotloop_network_values_bytes(int64_t arena_floats, int64_t batch) {
  return samples_at_once(arena_floats, batch) * arena_floats * static_cast<int64_t>(sizeof(float));
}

HOTLOOP_EXPORT int64_t hotloop_panel_cols(int64_t outputs, int64_t num_threads) {
  return best_panel_cols(outputs, num_threads);
}

HOTLOOP_EXPORT int64_t hotloop_packed_floats(int64_t outputs, int64_t depth, int64_t panel_cols) {
  return packed_floats(outputs, depth, panel_cols);
}

HOTLOOP_EXPORT void hotloop_pack_panels(const float* weight, int64_t outputs, int64_t depth,
                                        int64_t panel_cols, float* to) {
  pack_panels(weight, outputs, depth, panel_cols, to);
}

HOTLOOP_EXPORT int64_t hotloop_prepared_filter_floats(int64_t outputs, int64_t channels) {
  return prepared_filter_floats(outputs, channels);
}

HOTLOOP_EXPORT void hotloop_prepare_filters(const float* filters, int64_t outputs, int64_t channels,
                                            float* to) {
  prepare_filters({filters, 9 * channels, 1, 3 * channels, channels}, outputs, channels, to);
}

HOTLOOP_EXPORT int32_t hotloop_needs_panels(int64_t channels, int64_t output_height,
                                            int64_t output_width, int64_t num_threads) {
  return channels >= kFewChannels && has_few_tiles(1, output_height, output_width, num_threads);
}
