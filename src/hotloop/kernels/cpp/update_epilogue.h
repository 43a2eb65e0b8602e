// The epilogue of a product that is a weight's gradient: the update of that weight, with the gradient still
// in cache.
#pragma once

#include "gemm.h"
#include "update_rule.h"

namespace hotloop {

template <int kind>
struct UpdateEpilogue {
  float *weight, *state1, *state2, *gradient;  // Only the gradient may be null where it is kept.
  int64_t weight_ld, state_ld;
  UpdateScalars scalars;

  static constexpr bool kDeferred = true;
  using ThreadMode = FlushDenormals;
  static constexpr bool kFirst = has_state1(kind), kSecond = has_state2(kind);

  explicit UpdateEpilogue(const ProductUpdateCall& call)
      : weight(call.weight), state1(call.state1), state2(call.state2), gradient(call.gradient),
        weight_ld(call.weight_row_stride), state_ld(call.state_row_stride),
        scalars(call.rule, call.scale) {}

  void operator()(const float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j,
                  int64_t cols) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (i + r) * state_ld + j;
      update_run<kind>(cols, weight + (i + r) * weight_ld + j, tile + r * ld,
                       state1 + (kFirst ? at : 0), state2 + (kSecond ? at : 0), scalars);
    }
    keep_gradient(tile, ld, i, rows, j, cols);
  }

  void keep_gradient(const float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j,
                     int64_t cols) const {
    if (!gradient) return;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c)
        gradient[(i + r) * state_ld + j + c] = tile[r * ld + c] * scalars.scale;
  }

  // The update of the rows before, a vector at each step of the products of the rows now: memory and
  // the divider work while the multipliers do. Along rows, as memory likes it.
  struct Deferred {
    const UpdateEpilogue& epilogue;
    UpdateScalars scalars;
    float *w = nullptr, *first = nullptr, *second = nullptr;
    const float* sums = nullptr;
    int64_t ld = 0, rows = 0, cols = 0, at = 0, allowed = 0;

    explicit Deferred(const UpdateEpilogue& epilogue)
        : epilogue(epilogue), scalars(epilogue.scalars) {}

    // Take rows whose sums are complete; those taken before are done.
    void take(const float* tile, int64_t tile_ld, int64_t i, int64_t num_rows, int64_t j,
              int64_t num_cols) {
      epilogue.keep_gradient(tile, tile_ld, i, num_rows, j, num_cols);
      sums = tile, ld = tile_ld, rows = num_rows, cols = num_cols, at = 0;
      w = epilogue.weight + i * epilogue.weight_ld + j;
      if (kFirst) first = epilogue.state1 + i * epilogue.state_ld + j;
      if (kSecond) second = epilogue.state2 + i * epilogue.state_ld + j;
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
      const int64_t at1 = kFirst ? at : 0, at2 = kSecond ? at : 0;
      if (at + kLanes <= cols) {
        update_run<kind>(kLanes, w + at, sums + at, first + at1, second + at2, scalars);
        at += kLanes;
        if (at < cols) return;
      } else {
        update_run<kind>(cols - at, w + at, sums + at, first + at1, second + at2, scalars);
      }
      at = 0, --rows;
      w += epilogue.weight_ld, sums += ld;
      if (kFirst) first += epilogue.state_ld;
      if (kSecond) second += epilogue.state_ld;
    }
  };
};

}  // namespace hotloop
