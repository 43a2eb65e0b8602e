// The optimizers' formulas, for a run of adjacent weights. Those of torch.optim's single-tensor functions,
// in float32.
#pragma once

#include <cmath>
#include <type_traits>

#include "abi.h"
#include "vector.h"

namespace hotloop {

// As in UpdateRule.
enum UpdateKind : int {
  kSgd, kMomentum, kNesterov, kAdam, kAdamW, kRmsProp, kAdagrad, kNadam, kNadamW, kAdamax, kAdadelta,
  kUpdateKinds
};

constexpr bool has_state1(int kind) { return kind != kSgd; }
constexpr bool has_state2(int kind) {
  return kind == kAdam || kind == kAdamW || kind >= kNadam;
}

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

// A rule's scalars as its formulas need them.
struct UpdateScalars {
  float lr, eps, decay, keep, beta2, one_beta1, one_beta2, step_size, inverse;
  float momentum, damped, carried, alpha, one_alpha, gradient_rate, moment_rate, scale;

  UpdateScalars(const UpdateRule& u, float scale)
      : lr(float(u.lr)), eps(float(u.eps)), decay(float(u.weight_decay)),
        keep(float(1 - u.lr * u.weight_decay)), beta2(float(u.beta2)),
        one_beta1(float(1 - u.beta1)), one_beta2(float(1 - u.beta2)),
        step_size(float(u.lr / u.bias_correction1)), inverse(float(1 / u.bias_correction2_sqrt)),
        momentum(float(u.momentum)), damped(u.first_step ? 1.0f : float(1 - u.dampening)),
        carried(u.first_step ? 0.0f : momentum), alpha(float(u.alpha)),
        one_alpha(float(1 - u.alpha)), gradient_rate(float(u.gradient_rate)),
        moment_rate(float(u.moment_rate)), scale(scale) {}
};

// n adjacent weights w, their gradients g and states; a kind without a state may be given any address.
template <int kind>
inline __attribute__((always_inline)) void update_run(int64_t n, float* __restrict w,
                                                      const float* __restrict g,
                                                      float* __restrict s1, float* __restrict s2,
                                                      const UpdateScalars& u) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float d = g[i] * u.scale, x = w[i];
    if (kind == kAdamW || kind == kNadamW) x *= u.keep;
    else d += u.decay * x;
    if (kind == kSgd) {
      x -= u.lr * d;
    } else if (kind == kMomentum || kind == kNesterov) {
      const float m = u.carried * s1[i] + u.damped * d;
      s1[i] = m;
      x -= u.lr * (kind == kNesterov ? d + u.momentum * m : m);
    } else if (kind == kAdam || kind == kAdamW) {
      const float m = s1[i] + u.one_beta1 * (d - s1[i]);
      const float v = u.beta2 * s2[i] + u.one_beta2 * (d * d);
      s1[i] = m;
      s2[i] = v;
      x -= u.step_size * (m / (std::sqrt(v) * u.inverse + u.eps));
    } else if (kind == kRmsProp) {
      const float v = u.alpha * s1[i] + u.one_alpha * (d * d);
      s1[i] = v;
      x -= u.lr * (d / (std::sqrt(v) + u.eps));
    } else if (kind == kNadam || kind == kNadamW) {
      const float m = s1[i] + u.one_beta1 * (d - s1[i]);
      const float v = u.beta2 * s2[i] + u.one_beta2 * (d * d);
      s1[i] = m;
      s2[i] = v;
      x -= (u.gradient_rate * d + u.moment_rate * m) / (std::sqrt(v) * u.inverse + u.eps);
    } else if (kind == kAdamax) {
      const float m = s1[i] + u.one_beta1 * (d - s1[i]);
      const float before = u.beta2 * s2[i], now = std::fabs(d) + u.eps;
      const float most = before > now || before != before ? before : now;  // A NaN wins.
      s1[i] = m;
      s2[i] = most;
      x -= u.step_size * (m / most);
    } else if (kind == kAdadelta) {
      const float v = u.alpha * s1[i] + u.one_alpha * (d * d);
      const float step = std::sqrt(s2[i] + u.eps) / std::sqrt(v + u.eps) * d;
      s1[i] = v;
      s2[i] = u.alpha * s2[i] + u.one_alpha * (step * step);
      x -= u.lr * step;
    } else {
      const float v = s1[i] + d * d;
      s1[i] = v;
      x -= u.lr * (d / (std::sqrt(v) + u.eps));
    }
    w[i] = x;
  }
}

// Calls body(integral_constant<int, kind>) for a rule's kind.
template <int candidate = 0, class Body>
void with_update_kind(int32_t kind, const Body& body) {
  if constexpr (candidate < kUpdateKinds) {
    if (kind == candidate) body(std::integral_constant<int, candidate>{});
    else with_update_kind<candidate + 1>(kind, body);
  }
}

}  // namespace hotloop
