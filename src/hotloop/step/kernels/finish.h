// What follows a product while its sums are in cache, given to `product` as `finish`: results with bias,
// relu or a mask, or the update of the weight whose gradient they are. Part of gemm.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "gemm.h"

namespace {

// Numbers below 1.2e-38 count as zero while it lives. The moments of a weight without gradients fade into
// them within a thousand steps and stay there, where arithmetic takes several times as long.
struct FlushDenormals {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" : : "r"(before | 1 << 24));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};

// An update's scalars as its formulas need them.
struct Scalars {
  float lr, eps, decay, keep, beta2, one_beta1, one_beta2, step_size, inverse;
  float momentum, damped, carried, alpha, one_alpha, scale;

  Scalars(const hotloop_update& u, float scale)
      : lr(float(u.lr)), eps(float(u.eps)), decay(float(u.weight_decay)),
        keep(float(1 - u.lr * u.weight_decay)), beta2(float(u.beta2)),
        one_beta1(float(1 - u.beta1)), one_beta2(float(1 - u.beta2)),
        step_size(float(u.lr / u.bias_correction1)), inverse(float(1 / u.bias_correction2_sqrt)),
        momentum(float(u.momentum)), damped(u.first_step ? 1.0f : float(1 - u.dampening)),
        carried(u.first_step ? 0.0f : momentum), alpha(float(u.alpha)),
        one_alpha(float(1 - u.alpha)), scale(scale) {}
};

// One row of an update: n adjacent elements.
template <int kind>
inline __attribute__((always_inline)) void update_row(int64_t n, float* __restrict w,
                                                      const float* __restrict g,
                                                      float* __restrict s1, float* __restrict s2,
                                                      const Scalars& u) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float d = g[i] * u.scale, x = w[i];
    if (kind == 4) x *= u.keep;
    else d += u.decay * x;
    if (kind == 0) {
      x -= u.lr * d;
    } else if (kind == 1 || kind == 2) {
      const float m = u.carried * s1[i] + u.damped * d;
      s1[i] = m;
      x -= u.lr * (kind == 2 ? d + u.momentum * m : m);
    } else if (kind == 3 || kind == 4) {
      const float m = s1[i] + u.one_beta1 * (d - s1[i]);
      const float v = u.beta2 * s2[i] + u.one_beta2 * (d * d);
      s1[i] = m;
      s2[i] = v;
      x -= u.step_size * (m / (std::sqrt(v) * u.inverse + u.eps));
    } else if (kind == 5) {
      const float v = u.alpha * s1[i] + u.one_alpha * (d * d);
      s1[i] = v;
      x -= u.lr * (d / (std::sqrt(v) + u.eps));
    } else {
      const float v = s1[i] + d * d;
      s1[i] = v;
      x -= u.lr * (d / (std::sqrt(v) + u.eps));
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
  using Mode = Nothing;
  using Behind = Nothing;

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
  Scalars u;

  static constexpr bool kAlongRows = true;
  using Mode = FlushDenormals;
  static constexpr bool kFirst = kind > 0, kSecond = kind == 3 || kind == 4;

  void operator()(const float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j,
                  int64_t cols) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (i + r) * s_rs + j;
      update_row<kind>(cols, W + (i + r) * w_rs + j, tile + r * ld, s1 + (kFirst ? at : 0),
                       s2 + (kSecond ? at : 0), u);
    }
    keep(tile, ld, i, rows, j, cols);
  }

  void keep(const float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j, int64_t cols) const {
    if (!G) return;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) G[(i + r) * s_rs + j + c] = tile[r * ld + c] * u.scale;
  }

  // The update of the rows before, a vector at each unit of the products of the rows now: memory and
  // the divider work while the multipliers do. Along rows, as memory likes it.
  struct Behind {
    const Apply& apply;
    Scalars u;
    float *w = nullptr, *first = nullptr, *second = nullptr;
    const float* sums = nullptr;
    int64_t ld = 0, rows = 0, cols = 0, at = 0, allowed = 0;

    explicit Behind(const Apply& apply) : apply(apply), u(apply.u) {}

    // Take rows whose sums are complete; those taken before are done.
    void take(const float* tile, int64_t tile_ld, int64_t i, int64_t num_rows, int64_t j,
              int64_t num_cols) {
      apply.keep(tile, tile_ld, i, num_rows, j, num_cols);
      sums = tile, ld = tile_ld, rows = num_rows, cols = num_cols, at = 0;
      w = apply.W + i * apply.w_rs + j;
      if (kFirst) first = apply.s1 + i * apply.s_rs + j;
      if (kSecond) second = apply.s2 + i * apply.s_rs + j;
    }

    // As much now as makes it complete in so many turns.
    void allow(int64_t turns) {
      const int64_t left = rows * vectors_for(cols) - at / kLanes;
      allowed = (left + turns - 1) / turns;
    }

    void complete() {
      while (allowed > 0) (*this)();
    }

    inline __attribute__((always_inline)) void operator()() {
      if (allowed <= 0) return;
      --allowed;
      // Far enough ahead for memory to answer.
      constexpr int64_t kAhead = 512;
      __builtin_prefetch(w + at + kAhead, 1, 3);
      if (kFirst) __builtin_prefetch(first + at + kAhead, 1, 3);
      if (kSecond) __builtin_prefetch(second + at + kAhead, 1, 3);
      if (at + kLanes <= cols) {
        update_row<kind>(kLanes, w + at, sums + at, first + at, second + at, u);
        at += kLanes;
        if (at < cols) return;
      } else {
        update_row<kind>(cols - at, w + at, sums + at, first + at, second + at, u);
      }
      at = 0, --rows;
      w += apply.w_rs, sums += ld;
      if (kFirst) first += apply.s_rs;
      if (kSecond) second += apply.s_rs;
    }
  };
};

template <int kind, class Call>
void by_kind(int32_t wanted, const Call& call) {
  if constexpr (kind < 7) {
    if (wanted == kind) call(std::integral_constant<int, kind>{});
    else by_kind<kind + 1>(wanted, call);
  }
}

}  // namespace
