// The maximum of values that come one after the other, and which of them it was.
#pragma once

#include "vector.h"

namespace hotloop {

// In an argmax: relu has cut the maximum off, so no value of the window has a gradient.
constexpr int32_t kCutOff = 255;

struct OneValue {
  using Value = float;
  using Place = int32_t;
};

struct LaneByLane {
  using Value = Vector;
  using Place = Words;
};

// The first of equal ones stays, a NaN wins.
template <class Of, bool kArgmax>
struct RunningMax {
  using Value = typename Of::Value;
  using Place = typename Of::Place;
  Value best;
  Place place;

  RunningMax(Value first, int32_t at) : best(first), place(Place{} + at) {}

  void take(Value value, int32_t at) {
    const auto better = (value > best) | (value != value);
    best = better ? value : best;
    if constexpr (kArgmax) place = better ? Place{} + at : place;
  }

  void relu() {
    const auto cut = best <= 0;  // Not a NaN.
    best = cut ? Value{} : best;
    if constexpr (kArgmax) place = cut ? Place{} + kCutOff : place;
  }
};

}  // namespace hotloop
