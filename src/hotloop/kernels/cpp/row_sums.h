// Sums over rows of a few vectors of columns at a time, in registers.
#pragma once

#include <type_traits>

#include "vector.h"

namespace hotloop {

template <int count>
using Count = std::integral_constant<int, count>;

// Calls body(Count<V>, whole, c) for groups of V vectors that cover columns [begin, end); only the last one may not
// be whole, and is one vector.
template <class Body>
inline void for_vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t c = begin;
  for (; c + 4 * kLanes <= end; c += 4 * kLanes) body(Count<4>(), std::true_type(), c);
  for (; c + 2 * kLanes <= end; c += 2 * kLanes) body(Count<2>(), std::true_type(), c);
  for (; c + kLanes <= end; c += kLanes) body(Count<1>(), std::true_type(), c);
  if (c < end) body(Count<1>(), std::false_type(), c);
}

// Sums[kTerms][V] of term(row, v, values), which gives kTerms values for vector v of a row, over rows [0, rows). Few
// vectors go in several chains of additions, so that none waits for the one before.
template <int kTerms, int V, class Term>
inline __attribute__((always_inline)) void sum_rows(int64_t rows, Vector (&sums)[kTerms][V],
                                                    const Term& term) {
  constexpr int kChains = V >= 4 ? 1 : 4 / V;
  Vector chains[kChains][kTerms][V] = {};
  const auto add = [&](int64_t row, int chain) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vector values[kTerms];
      term(row, v, values);
#pragma GCC unroll 2
      for (int t = 0; t < kTerms; ++t) chains[chain][t][v] += values[t];
    }
  };
  int64_t row = 0;
  for (; row + kChains <= rows; row += kChains)
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) add(row + chain, chain);
  for (; row < rows; ++row) add(row, 0);
#pragma GCC unroll 2
  for (int t = 0; t < kTerms; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sums[t][v] = chains[0][t][v];
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) sums[t][v] += chains[chain][t][v];
    }
}

}  // namespace hotloop
