// The layers of a network, one at a time and one after the other, against plain loops; the same bits for one to
// three threads.
#include <algorithm>

#include "kernel_check.h"

using namespace hotloop;

namespace {

enum Kind { kNchwToNhwc, kNhwcToNchw, kLinear, kConvolution, kMaxPool, kMean, kPointwise, kSoftmax,
            kLayerNorm, kAttention };

double activated(double x, int64_t activation) {
  if (activation == 1) return relu(x);
  if (activation == 2) return x * 0.5 * (1 + std::erf(x / std::sqrt(2.0)));
  if (activation == 3)
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  return x;
}

Layer layer_of(Kind kind, const Windows& windows, int64_t outputs) {
  Layer layer{};
  layer.kind = kind, layer.input = -1, layer.addend = -3, layer.output = -2;
  layer.windows = windows, layer.output_channels = outputs;
  return layer;
}

// Rows of so many channels.
Windows rows_of(int64_t rows, int64_t channels) {
  return {0, channels, rows, 1, 1, 1, 1, 1, 1, 1, 0, 0};
}

// Runs one layer on `batch` samples by one to three threads. one_way: the number of threads does not choose
// another way to compute it.
void check_layer(const char* what, Layer layer, int64_t batch, const Floats& x, const Doubles& want,
                 double size, bool one_way = true) {
  Floats first;
  for (int64_t threads = 1; threads <= 3; ++threads) {
    Floats y(want.size(), -7.0f);
    const Network network{&layer, 1, 0, threads};
    check_status(hotloop_network_run(&network, batch, x.data(), y.data()));
    check_close(what, y, want, size);
    if (threads == 1) first = y;
    if (one_way) check_equal(what, y, first);
  }
}

Floats panels_of(const Floats& weight, int64_t outputs, int64_t depth, int64_t panel_cols) {
  Floats panels(at(hotloop_packed_floats(outputs, depth, panel_cols)));
  hotloop_pack_panels(weight.data(), outputs, depth, panel_cols, panels.data());
  return panels;
}

void check_linear(Draw& draw) {
  const int64_t batch = from_to(draw, 1, 40), rows = from_to(draw, 1, 5);
  const int64_t depth = from_to(draw, 1, 900), outputs = from_to(draw, 1, 150);
  const Floats x = drawn(draw, batch * rows * depth), w = drawn(draw, outputs * depth);
  const Floats bias = drawn(draw, outputs);
  Layer layer = layer_of(kLinear, rows_of(rows, depth), outputs);
  layer.panel_cols = hotloop_panel_cols(outputs, from_to(draw, 1, 3));
  layer.activation = static_cast<int32_t>(draw.below(4));
  const Floats panels = panels_of(w, outputs, depth, layer.panel_cols);
  layer.weight = panels.data(), layer.bias = draw.below(2) ? bias.data() : nullptr;
  Doubles want(at(batch * rows * outputs));
  for (int64_t i = 0; i < batch * rows; ++i)
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = layer.bias ? bias[at(o)] : 0;
      for (int64_t k = 0; k < depth; ++k)
        sum += static_cast<double>(x[at(i * depth + k)]) * w[at(o * depth + k)];
      want[at(i * outputs + o)] = activated(sum, layer.activation);
    }
  check_layer("a linear layer", layer, batch, x, want, std::sqrt(static_cast<double>(depth)));
}

void check_convolution(Draw& draw) {
  const int64_t batch = from_to(draw, 1, 4), C = from_to(draw, 1, 30), O = from_to(draw, 1, 70);
  Windows s{0, C, from_to(draw, 3, 12), from_to(draw, 3, 12), 0, 0, 3, 3, 1, 1, 0, 0};
  const bool small = draw.below(2) != 0;
  if (!small) {
    s.kernel_h = from_to(draw, 1, 3), s.kernel_w = from_to(draw, 1, 3);
    s.stride_h = from_to(draw, 1, 2), s.stride_w = from_to(draw, 1, 2);
  }
  s.pad_h = from_to(draw, 0, s.kernel_h - 1), s.pad_w = from_to(draw, 0, s.kernel_w - 1);
  s.output_height = (s.height + 2 * s.pad_h - s.kernel_h) / s.stride_h + 1;
  s.output_width = (s.width + 2 * s.pad_w - s.kernel_w) / s.stride_w + 1;
  const int64_t depth = s.kernel_h * s.kernel_w * C;
  const Floats x = drawn(draw, batch * s.height * s.width * C), w = drawn(draw, O * depth);
  const Floats bias = drawn(draw, O);
  Layer layer = layer_of(kConvolution, s, O);
  layer.panel_cols = hotloop_panel_cols(O, 2), layer.bias = bias.data();
  layer.activation = static_cast<int32_t>(draw.below(2));
  const Floats panels = panels_of(w, O, depth, layer.panel_cols);
  Floats prepared(at(small ? hotloop_prepared_filter_floats(O, C) : 0));
  if (small) hotloop_prepare_filters(w.data(), O, C, prepared.data());
  if (small) layer.filters = prepared.data();
  if (!small || hotloop_needs_panels(C, s.output_height, s.output_width, 2))
    layer.weight = panels.data();
  Doubles want(at(batch * s.output_height * s.output_width * O));
  size_t to = 0;
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t h = 0; h < s.output_height; ++h)
      for (int64_t v = 0; v < s.output_width; ++v)
        for (int64_t o = 0; o < O; ++o) {
          double sum = bias[at(o)];
          for (int64_t p = 0; p < s.kernel_h * s.kernel_w; ++p) {
            const int64_t i = h * s.stride_h - s.pad_h + p / s.kernel_w;
            const int64_t j = v * s.stride_w - s.pad_w + p % s.kernel_w;
            for (int64_t c = 0; c < C && i >= 0 && i < s.height && j >= 0 && j < s.width; ++c)
              sum += static_cast<double>(x[at(((n * s.height + i) * s.width + j) * C + c)]) *
                     w[at(o * depth + p * C + c)];
          }
          want[to++] = activated(sum, layer.activation);
        }
  check_layer("a convolution layer", layer, batch, x, want,
              3 * std::sqrt(static_cast<double>(depth)), !layer.filters || !layer.weight);
}

void check_rows(Draw& draw) {
  const int64_t batch = from_to(draw, 1, 5), rows = from_to(draw, 1, 7), C = from_to(draw, 1, 100);
  const Floats x = drawn(draw, batch * rows * C), weight = drawn(draw, C), bias = drawn(draw, C);
  Layer norm = layer_of(kLayerNorm, rows_of(rows, C), C);
  norm.epsilon = 1e-2f, norm.weight = weight.data(), norm.bias = bias.data();
  Layer softmax = layer_of(kSoftmax, rows_of(rows, C), C);
  softmax.logarithm = static_cast<int32_t>(draw.below(2));
  Doubles normed(x.size()), soft(x.size());
  for (size_t row = 0; row < x.size(); row += at(C)) {
    double mean = 0, variance = 0, most = -1e30, sum = 0;
    for (int64_t c = 0; c < C; ++c) {
      mean += static_cast<double>(x[row + at(c)]) / static_cast<double>(C);
      most = std::max<double>(most, x[row + at(c)]);
    }
    for (int64_t c = 0; c < C; ++c) {
      variance += std::pow(x[row + at(c)] - mean, 2) / static_cast<double>(C);
      sum += std::exp(x[row + at(c)] - most);
    }
    for (int64_t c = 0; c < C; ++c) {
      const double value = x[row + at(c)];
      normed[row + at(c)] =
          (value - mean) / std::sqrt(variance + 1e-2) * weight[at(c)] + bias[at(c)];
      soft[row + at(c)] = softmax.logarithm ? value - most - std::log(sum)
                                            : std::exp(value - most) / sum;
    }
  }
  check_layer("a layer norm", norm, batch, x, normed, 10);
  check_layer("a softmax", softmax, batch, x, soft, 10);

  Layer pointwise = layer_of(kPointwise, rows_of(rows, C), C);
  pointwise.activation = static_cast<int32_t>(draw.below(4)), pointwise.addend = -1;
  Doubles doubled(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    doubled[i] = activated(2 * static_cast<double>(x[i]), pointwise.activation);
  check_layer("a pointwise layer", pointwise, batch, x, doubled, 10);

  Windows image = rows_of(rows, C);
  image.width = 1;
  Doubles transposed(x.size()), means(at(batch * C));
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < C; ++c) {
        const double value = x[at((n * rows + r) * C + c)];
        transposed[at((n * C + c) * rows + r)] = value;
        means[at(n * C + c)] += value / static_cast<double>(rows);
      }
  check_layer("nhwc to nchw", layer_of(kNhwcToNchw, image, C), batch, x, transposed, 0);
  check_layer("a mean", layer_of(kMean, image, C), batch, x, means, 1);
  const Floats first(transposed.begin(), transposed.end());
  check_layer("nchw to nhwc", layer_of(kNchwToNhwc, image, C), batch, first,
              {x.begin(), x.end()}, 0);
}

// Queries, keys and values side by side in rows, as a linear layer makes them.
void check_attention(Draw& draw) {
  const int64_t batch = from_to(draw, 1, 3), heads = from_to(draw, 1, 3);
  const int64_t rows = from_to(draw, 1, 150), size = from_to(draw, 1, 40);
  const int64_t made = from_to(draw, 1, 90), width = heads * (2 * size + made);
  const Floats x = drawn(draw, batch * rows * width);
  Layer layer = layer_of(kAttention, {}, 0);
  Attention& a = layer.attention;
  a = {{}, heads, rows, rows, size, made, static_cast<int32_t>(draw.below(2)), 0.5f};
  for (int i = 0; i < 3; ++i)
    a.operands[i] = {-1, i * heads * size, i == 2 ? made : size, width, rows * width};
  Doubles want(at(batch * rows * heads * made));
  const auto get = [&](int64_t n, int operand, int64_t h, int64_t row, int64_t e) -> double {
    const AttentionOperand& o = a.operands[operand];
    return x[at(n * o.sample_floats + o.offset + h * o.head_stride + row * o.row_stride + e)];
  };
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t q = 0; q < rows; ++q) {
        const int64_t seen = a.causal ? q + 1 : rows;
        Doubles scores(at(seen));
        double most = -1e30, sum = 0;
        for (int64_t k = 0; k < seen; ++k) {
          for (int64_t e = 0; e < size; ++e)
            scores[at(k)] += 0.5 * get(n, 0, h, q, e) * get(n, 1, h, k, e);
          most = std::max(most, scores[at(k)]);
        }
        for (double& score : scores) sum += score = std::exp(score - most);
        for (int64_t e = 0; e < made; ++e)
          for (int64_t k = 0; k < seen; ++k)
            want[at(((n * rows + q) * heads + h) * made + e)] +=
                scores[at(k)] / sum * get(n, 2, h, k, e);
      }
  check_layer("attention", layer, batch, x, want, 10);
}

// Three layers through the arena, the last with an addend: x + relu(x W^T) W^T.
void check_network(Draw& draw) {
  const int64_t batch = from_to(draw, 1, 20), C = from_to(draw, 1, 60);
  const Floats x = drawn(draw, batch * C), w = drawn(draw, C * C);
  const Floats panels = panels_of(w, C, C, hotloop_panel_cols(C, 1));
  Layer layers[3] = {layer_of(kLinear, rows_of(1, C), C), layer_of(kPointwise, rows_of(1, C), C),
                     layer_of(kLinear, rows_of(1, C), C)};
  const int64_t value_floats = (C + 15) / 16 * 16;
  for (Layer& layer : layers) layer.weight = panels.data(), layer.panel_cols = hotloop_panel_cols(C, 1);
  layers[0].output = layers[1].input = 0;
  layers[1].output = layers[2].input = value_floats;
  layers[1].activation = 1, layers[2].addend = -1;
  Doubles hidden(at(batch * C)), want(at(batch * C));
  const auto multiply = [&](const auto& from, Doubles& to) {
    for (int64_t n = 0; n < batch; ++n)
      for (int64_t o = 0; o < C; ++o)
        for (int64_t k = 0; k < C; ++k)
          to[at(n * C + o)] += static_cast<double>(from[at(n * C + k)]) * w[at(o * C + k)];
  };
  multiply(x, hidden);
  for (double& value : hidden) value = relu(value);
  multiply(hidden, want);
  for (size_t i = 0; i < want.size(); ++i) want[i] += x[i];
  for (int64_t threads = 1; threads <= 3; ++threads) {
    Floats y(want.size(), -7.0f);
    const Network network{layers, 3, 2 * value_floats, threads};
    check_status(hotloop_network_run(&network, batch, x.data(), y.data()));
    check_close("a network", y, want, 10 * static_cast<double>(C));
  }
}

}  // namespace

int main() {
  Draw draw(3);
  for (int i = 0; i < 40; ++i) {
    check_linear(draw);
    check_convolution(draw);
    check_rows(draw);
    check_attention(draw);
    check_network(draw);
  }
  Layer unknown{};
  unknown.kind = 99, unknown.input = -1, unknown.output = -2;
  const Network network{&unknown, 1, 0, 1};
  float x = 0, y = 0;
  CHECK(hotloop_network_run(&network, 1, &x, &y) == 1);
  return 0;
}
