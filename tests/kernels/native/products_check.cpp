// Products with each epilogue, updates of every kind, alone and in the product of their gradient, against
// plain loops; the same bits for one to three threads.
#include "kernel_check.h"

using namespace hotloop;

namespace {

// A matrix of rows x cols, by rows or by columns, with room between its lines.
struct Stored {
  int64_t rows, cols, row_stride, col_stride;
  Floats values;

  Stored(Draw& draw, int64_t rows, int64_t cols, bool transposed, int64_t room)
      : rows(rows), cols(cols), row_stride(transposed ? 1 : cols + room),
        col_stride(transposed ? rows + room : 1) {
    const int64_t lines = transposed ? cols : rows, length = transposed ? rows : cols;
    values = drawn(draw, (lines - 1) * (length + room) + length);
  }

  Matrix matrix() const { return {values.data(), row_stride, col_stride}; }

  // Rounded to bfloat16, to nearest, ties to even, where asked.
  double get(int64_t i, int64_t j, bool bfloat16) const {
    float value = values[at(i * row_stride + j * col_stride)];
    if (!bfloat16) return value;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

struct Shape {
  int64_t m, k, n;
  bool a_transposed, b_transposed;
  int64_t room;
};

Shape drawn_shape(Draw& draw, int64_t most_k) {
  return {from_to(draw, 1, 130), from_to(draw, 1, most_k), from_to(draw, 1, 130),
          draw.below(2) != 0, draw.below(2) != 0, from_to(draw, 0, 3)};
}

Doubles plain_product(const Stored& a, const Stored& b, bool bfloat16) {
  Doubles c(at(a.rows * b.cols));
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t k = 0; k < a.cols; ++k)
      for (int64_t j = 0; j < b.cols; ++j)
        c[at(i * b.cols + j)] += a.get(i, k, bfloat16) * b.get(k, j, bfloat16);
  return c;
}

void check_product(Draw& draw, bool bfloat16) {
  const Shape s = drawn_shape(draw, 1200);
  const Stored a(draw, s.m, s.k, s.a_transposed, s.room), b(draw, s.k, s.n, s.b_transposed, s.room);
  const Floats bias = drawn(draw, s.n), mask = drawn(draw, s.m * s.n);
  const bool has_mask = draw.below(3) == 0, has_bias = !has_mask && draw.below(2);
  const bool has_relu = !has_mask && draw.below(2);
  Doubles want = plain_product(a, b, bfloat16);
  for (int64_t i = 0; i < s.m * s.n; ++i) {
    double& value = want[at(i)];
    if (has_bias) value += bias[at(i % s.n)];
    if (has_relu) value = relu(value);
    if (has_mask && mask[at(i)] <= 0) value = 0;
  }
  Floats first;
  for (int64_t threads = 1; threads <= 3; ++threads) {
    Floats c(at(s.m * s.n), -7.0f);
    const ProductCall call{s.m, s.n, s.k, a.matrix(), b.matrix(), c.data(), s.n,
                           has_bias ? bias.data() : nullptr, has_mask ? mask.data() : nullptr,
                           s.n, has_relu, bfloat16, threads};
    check_status(hotloop_product(&call));
    check_close("a product", c, want, std::sqrt(static_cast<double>(s.k)));
    if (threads == 1) first = c;
    check_equal("a product with other threads", c, first);
  }
}

struct State {
  Doubles w, s1, s2;
};

// torch.optim's single-tensor formulas.
void plain_update(const UpdateRule& u, double gradient, size_t i, State& state) {
  double d = gradient, &w = state.w[i], &s1 = state.s1[i], &s2 = state.s2[i];
  if (u.kind == 4) w *= 1 - u.lr * u.weight_decay;
  else d += u.weight_decay * w;
  if (u.kind == 0) {
    w -= u.lr * d;
  } else if (u.kind <= 2) {
    s1 = u.first_step ? d : u.momentum * s1 + (1 - u.dampening) * d;
    w -= u.lr * (u.kind == 2 ? d + u.momentum * s1 : s1);
  } else if (u.kind <= 4) {
    s1 += (1 - u.beta1) * (d - s1);
    s2 = u.beta2 * s2 + (1 - u.beta2) * d * d;
    w -= u.lr / u.bias_correction1 * s1 / (std::sqrt(s2) / u.bias_correction2_sqrt + u.eps);
  } else {
    s1 = u.kind == 5 ? u.alpha * s1 + (1 - u.alpha) * d * d : s1 + d * d;
    w -= u.lr * d / (std::sqrt(s1) + u.eps);
  }
}

UpdateRule drawn_rule(Draw& draw) {
  UpdateRule u{};
  u.kind = static_cast<int32_t>(draw.below(7));
  u.first_step = static_cast<int32_t>(draw.below(2));
  u.lr = 0.01, u.beta1 = 0.9, u.beta2 = 0.99, u.eps = 0.1, u.weight_decay = 0.01;
  u.bias_correction1 = 0.5, u.bias_correction2_sqrt = 0.7;
  u.momentum = 0.8, u.dampening = 0.1, u.alpha = 0.9;
  return u;
}

Doubles widened(const Floats& values) { return {values.begin(), values.end()}; }

void check_updates(Draw& draw, bool bfloat16) {
  const Shape s = drawn_shape(draw, 200);
  const Stored a(draw, s.m, s.k, s.a_transposed, s.room), b(draw, s.k, s.n, s.b_transposed, s.room);
  const UpdateRule rule = drawn_rule(draw);
  const float scale = 0.125f;
  const Floats w = drawn(draw, s.m * s.n), s1 = drawn(draw, s.m * s.n);
  Floats s2 = drawn(draw, s.m * s.n), positive = s1;
  for (float& value : s2) value = std::fabs(value);
  for (float& value : positive) value = std::fabs(value);
  const Floats& first_state = rule.kind >= 5 ? positive : s1;
  const bool has1 = rule.kind > 0, has2 = rule.kind == 3 || rule.kind == 4;
  Doubles gradient = plain_product(a, b, bfloat16);
  for (double& value : gradient) value *= scale;
  State want{widened(w), widened(first_state), widened(s2)};
  for (size_t i = 0; i < gradient.size(); ++i) plain_update(rule, gradient[i], i, want);
  const double size = 10 * std::sqrt(static_cast<double>(s.k));
  Floats first;
  for (int64_t threads = 1; threads <= 3; ++threads) {
    Floats w1 = w, m1 = first_state, v1 = s2, kept(at(s.m * s.n));
    const bool keep = threads != 2;
    const ProductUpdateCall call{
        s.m, s.n, s.k, a.matrix(), b.matrix(), w1.data(), s.n, has1 ? m1.data() : nullptr,
        has2 ? v1.data() : nullptr, keep ? kept.data() : nullptr, s.n, rule, scale, bfloat16,
        threads};
    check_status(hotloop_product_update(&call));
    check_close("a weight", w1, want.w, size);
    check_close("a first state", m1, has1 ? want.s1 : widened(first_state), size);
    check_close("a second state", v1, has2 ? want.s2 : widened(s2), size);
    if (keep) check_close("a gradient", kept, gradient, size);
    if (threads == 1) first = w1;
    check_equal("an update with other threads", w1, first);
  }
  Floats given(gradient.begin(), gradient.end()), w1 = w, m1 = first_state, v1 = s2;
  const UpdateCall alone{s.m * s.n, w1.data(), given.data(), has1 ? m1.data() : nullptr,
                         has2 ? v1.data() : nullptr, rule, 1.0f, 2};
  check_status(hotloop_update(&alone));
  check_close("a weight updated by itself", w1, want.w, size);
}

}  // namespace

int main() {
  Draw draw(1);
  const bool has_bfloat16 = hotloop_has_bfloat16() != 0;
  for (int i = 0; i < 60; ++i) {
    check_product(draw, false);
    check_updates(draw, false);
    if (!has_bfloat16) continue;
    check_product(draw, true);
    check_updates(draw, true);
  }
  ProductCall refused{};
  refused.m = refused.n = refused.k = 1, refused.bfloat16 = 1, refused.num_threads = 1;
  if (!has_bfloat16) CHECK(hotloop_product(&refused) == 1 && std::strstr(hotloop_error(), "bfloat16"));
  return 0;
}
