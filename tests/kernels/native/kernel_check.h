// What the checks of numeric kernels share: drawn numbers, and results against those of plain loops in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "abi.h"
#include "check.h"

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline size_t at(int64_t i) { return static_cast<size_t>(i); }

inline int64_t from_to(Draw& draw, int64_t least, int64_t most) {
  return least + static_cast<int64_t>(draw.below(at(most - least + 1)));
}

// Of size 1, around 0.
inline Floats drawn(Draw& draw, int64_t count) {
  Floats values(at(count));
  for (float& value : values) value = static_cast<float>(draw.below(1 << 20)) / (1 << 19) - 1.0f;
  return values;
}

inline void check_status(int32_t status) {
  if (status) std::fprintf(stderr, "a kernel failed: %s\n", hotloop_error());
  CHECK(status == 0);
}

// `what` and where, if a result is further off than so many units of the last place of `size` numbers of size 1.
inline void check_close(const char* what, const Floats& got, const Doubles& want, double size) {
  CHECK(got.size() == want.size());
  const double most = 32 * std::ldexp(1.0, -24) * (1 + size);
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::fabs(got[i] - want[i]) <= most) continue;
    std::fprintf(stderr, "%s: element %zu of %zu is %.9g, not %.9g\n", what, i, got.size(),
                 static_cast<double>(got[i]), want[i]);
    std::exit(1);
  }
}

template <class T>
void check_equal(const char* what, const std::vector<T>& got, const std::vector<T>& want) {
  const bool same = got.size() == want.size() &&
                    (got.empty() || std::memcmp(got.data(), want.data(), got.size() * sizeof(T)) == 0);
  if (same) return;
  std::fprintf(stderr, "%s differs\n", what);
  std::exit(1);
}

inline double relu(double x) { return x < 0 ? 0 : x; }
