// What follows a product while its sums are in cache, given to `product` as `finish`: results with bias,
// relu or a mask, or the update of the weight whose gradient they are. Part of gemm.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "gemm.h"

namespace {

// One row of an update: n adjacent elements.
template <int kind>
inline void update_row(int64_t n, float* __restrict w, const float* __restrict g,
                       float* __restrict s1, float* __restrict s2, const hotloop_update& u,
                       float scale) {
  const float lr = float(u.lr), eps = float(u.eps), decay = float(u.weight_decay);
  const float beta2 = float(u.beta2), one_beta1 = float(1 - u.beta1);
  const float one_beta2 = float(1 - u.beta2), keep = float(1 - u.lr * u.weight_decay);
  const float step_size = float(u.lr / u.bias_correction1);
  const float inverse = float(1 / u.bias_correction2_sqrt);
  const float momentum = float(u.momentum), damped = u.first_step ? 1.0f : float(1 - u.dampening);
  const float carried = u.first_step ? 0.0f : momentum;
  const float alpha = float(u.alpha), one_alpha = float(1 - u.alpha);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float d = g[i] * scale, x = w[i];
    if (kind == 4) x *= keep;
    else d += decay * x;
    if (kind == 0) {
      x -= lr * d;
    } else if (kind == 1 || kind == 2) {
      const float m = carried * s1[i] + damped * d;
      s1[i] = m;
      x -= lr * (kind == 2 ? d + momentum * m : m);
    } else if (kind == 3 || kind == 4) {
      const float m = s1[i] + one_beta1 * (d - s1[i]);
      const float v = beta2 * s2[i] + one_beta2 * (d * d);
      s1[i] = m;
      s2[i] = v;
      x -= step_size * (m / (std::sqrt(v) * inverse + eps));
    } else if (kind == 5) {
      const float v = alpha * s1[i] + one_alpha * (d * d);
      s1[i] = v;
      x -= lr * (d / (std::sqrt(v) + eps));
    } else {
      const float v = s1[i] + d * d;
      s1[i] = v;
      x -= lr * (d / (std::sqrt(v) + eps));
    }
    w[i] = x;
  }
}

struct Store {
  float* C;
  int64_t c_rs;
  const float* bias;
  int32_t act;
  const float* mask;
  int64_t mask_rs;

  static constexpr bool kAlongRows = false;

  void fetch(int64_t, int64_t, int64_t, int64_t) const {}

  void operator()(const float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j,
                  int64_t cols) const {
    // A known width lets the compiler keep a row in registers.
    if (cols == kCols) store(tile, ld, i, rows, j, std::integral_constant<int64_t, kCols>{});
    else store(tile, ld, i, rows, j, cols);
  }

  template <class Count>
  void store(const float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j, Count cols) const {
    for (int64_t r = 0; r < rows; ++r) {
      const float* __restrict from = tile + r * ld;
      float* __restrict to = C + (i + r) * c_rs + j;
      if (bias) {
        const float* __restrict offset = bias + j;
        if (act == 1)
          for (int64_t c = 0; c < cols; ++c) {
            const float value = from[c] + offset[c];
            to[c] = value < 0 ? 0 : value;  // NaN stays NaN, as in torch.
          }
        else
          for (int64_t c = 0; c < cols; ++c) to[c] = from[c] + offset[c];
      } else if (mask) {
        const float* __restrict gate = mask + (i + r) * mask_rs + j;
        for (int64_t c = 0; c < cols; ++c) to[c] = gate[c] <= 0 ? 0 : from[c];
      } else if (act == 1) {
        for (int64_t c = 0; c < cols; ++c) to[c] = from[c] < 0 ? 0 : from[c];
      } else {
        for (int64_t c = 0; c < cols; ++c) to[c] = from[c];
      }
    }
  }
};

template <int kind>
struct Apply {
  float *W, *s1, *s2, *G;
  int64_t w_rs, s_rs;
  hotloop_update u;
  float scale;

  static constexpr bool kAlongRows = true;

  // Starts to bring what the update of these rows will need, while a product is computed.
  void fetch(int64_t begin, int64_t end, int64_t j, int64_t cols) const {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = j; c < j + cols; c += kLineFloats) {
        __builtin_prefetch(W + r * w_rs + c, 1, 2);
        if (kind > 0) __builtin_prefetch(s1 + r * s_rs + c, 1, 2);
        if (kind == 3 || kind == 4) __builtin_prefetch(s2 + r * s_rs + c, 1, 2);
      }
  }

  void operator()(const float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j,
                  int64_t cols) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (i + r) * s_rs + j;
      update_row<kind>(cols, W + (i + r) * w_rs + j, tile + r * ld, s1 + (kind > 0 ? at : 0),
                       s2 + (kind == 3 || kind == 4 ? at : 0), u, scale);
      if (G)
        for (int64_t c = 0; c < cols; ++c) G[at + c] = tile[r * ld + c] * scale;
    }
  }
};

template <int kind, class Call>
void by_kind(int32_t wanted, const Call& call) {
  if constexpr (kind < 7) {
    if (wanted == kind) call(std::integral_constant<int, kind>{});
    else by_kind<kind + 1>(wanted, call);
  }
}

}  // namespace
