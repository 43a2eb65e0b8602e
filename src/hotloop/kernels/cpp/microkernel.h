// The micro-kernel: a tile of sums in registers, and the two ways in which products call it.
//
// Names are BLIS's: a tile has MR rows and NR columns; an A panel holds MR rows, a B panel NR columns, of
// KC elements of the sum.
#pragma once

#include <type_traits>

#include "vector.h"

namespace hotloop {

// Both sides packed: MR x (kVectors * kLanes) sums. On AVX-512: 24 sums, 3 columns, 1 row.
#if defined(__AVX512F__)
constexpr int kMR = 8, kVectors = 3, kDirectMR = 6, kDirectVectors = 4;
#else
constexpr int kMR = 4, kVectors = 3, kDirectMR = 4, kDirectVectors = 3;
#endif
constexpr int kNR = kVectors * kLanes;
// Where the rows of one side lie along the sum, they are read in place: kDirectMR x (kDirectVectors *
// kLanes) sums.
constexpr int64_t kDirectNR = kDirectVectors * kLanes;

// Called at each step of a sum, between the multiplications: what can be done meanwhile, a little at a
// time. Nothing, here.
struct NoOverlap {
  template <class... Ignored>
  explicit NoOverlap(Ignored&&...) {}
  void operator()() {}
  // As DeferredUpdate of update_epilogue.h.
  void allow(int64_t) {}
  void complete() {}
  void take(const float*, int64_t, int64_t, int64_t, int64_t, int64_t) {}
};

// Asks for the lines of the next rows, whose elements are adjacent, while as many rows are used.
struct PrefetchRows {
  const float* row;
  int64_t stride, rows, at = 0;

  PrefetchRows(const float* row, int64_t stride, int64_t rows)
      : row(row), stride(stride), rows(rows) {}

  void operator()() {
    const int64_t r = at % kLineFloats;
    if (r < rows) __builtin_prefetch(row + r * stride + (at - r), 0, 2);
    ++at;
  }
};

// tile[R][V * kLanes] (+)= a b: a[r * row_stride + k * depth_stride], b[k * V * kLanes + column], k < depth.
// Overlap: by value, so that it stays in registers, or a reference. Group: rows reached from one address;
// with few of them there are fewer distances to keep.
template <int R, int V, int Group, class Overlap, class Step>
void micro(int64_t depth, const float* a, int64_t row_stride, Step depth_stride, const float* b,
           float* tile, int64_t ld, bool add, Overlap overlap) {
  constexpr int kGroups = (R + Group - 1) / Group;
  Vector sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      sum[r][v] = add ? *reinterpret_cast<Vector*>(tile + r * ld + v * kLanes) : Vector{};
  const float* base[kGroups];
#pragma GCC unroll 4
  for (int i = 0; i < kGroups; ++i) base[i] = a + Group * i * row_stride;
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = *reinterpret_cast<const Vector*>(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += base[r / Group][r % Group * row_stride] * column[v];
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; ++i) base[i] += depth_stride;
    b += V * kLanes;
    overlap();
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) *reinterpret_cast<Vector*>(tile + r * ld + v * kLanes) = sum[r][v];
}

// Both sides packed: an A panel of kMR rows, a B panel of `vectors` (1 to kVectors) vectors.
template <class Overlap>
void multiply_panels(int64_t vectors, int64_t depth, const float* a, const float* b, float* tile,
                     int64_t ld, bool add, Overlap& overlap) {
  if (vectors == 3) micro<kMR, 3, kMR, Overlap&>(depth, a, 1, kMR, b, tile, ld, add, overlap);
  else if (vectors == 2) micro<kMR, 2, kMR, Overlap&>(depth, a, 1, kMR, b, tile, ld, add, overlap);
  else micro<kMR, 1, kMR, Overlap&>(depth, a, 1, kMR, b, tile, ld, add, overlap);
}

// A distance of 1 that the compiler knows.
constexpr std::integral_constant<int64_t, 1> kAdjacent;

// Rows of a, row_stride apart, whose elements along the sum are depth_stride apart, times a B panel of V vectors;
// as many rows at a time as there are registers for their sums. overlap_of(a, row_stride, count): what is
// done meanwhile, for `count` rows at a.
template <int V, class Step, class OverlapOf>
void multiply_rows(int64_t rows, int64_t depth, const float* a, int64_t row_stride,
                   Step depth_stride, const float* b, float* tile, bool add,
                   const OverlapOf& overlap_of) {
  constexpr int most = kDirectMR * kDirectVectors / V, ld = V * kLanes;
  constexpr int whole = most > 12 ? 12 : most;
  const auto next = [&](auto count) {
    constexpr int R = decltype(count)::value;
    micro<R, V, 3>(depth, a, row_stride, depth_stride, b, tile, ld, add,
                   overlap_of(a, row_stride, R));
    rows -= R, a += R * row_stride, tile += R * ld;
  };
  // Two rows keep the units waiting for their own sums: 8 = 4 + 4, not 6 + 2.
  while (rows >= whole && !(whole == 6 && rows == 8)) next(std::integral_constant<int, whole>{});
  while (rows >= 4) next(std::integral_constant<int, 4>{});
  while (rows >= 2) next(std::integral_constant<int, 2>{});
  if (rows) next(std::integral_constant<int, 1>{});
}

// tile[rows][vectors * kLanes] (+)= a b; `vectors`: 1 to kDirectVectors.
template <class Step, class OverlapOf>
void multiply_rows(int64_t vectors, int64_t rows, int64_t depth, const float* a, int64_t row_stride,
                   Step depth_stride, const float* b, float* tile, bool add,
                   const OverlapOf& overlap_of) {
  if (vectors == 4) {
    if constexpr (kDirectVectors == 4)
      multiply_rows<4>(rows, depth, a, row_stride, depth_stride, b, tile, add, overlap_of);
  } else if (vectors == 3) {
    multiply_rows<3>(rows, depth, a, row_stride, depth_stride, b, tile, add, overlap_of);
  } else if (vectors == 2) {
    multiply_rows<2>(rows, depth, a, row_stride, depth_stride, b, tile, add, overlap_of);
  } else {
    multiply_rows<1>(rows, depth, a, row_stride, depth_stride, b, tile, add, overlap_of);
  }
}

template <class Step>
void multiply_rows(int64_t vectors, int64_t rows, int64_t depth, const float* a, int64_t row_stride,
                   Step depth_stride, const float* b, float* tile, bool add) {
  const auto nothing = [](const float*, int64_t, int) { return NoOverlap(); };
  multiply_rows(vectors, rows, depth, a, row_stride, depth_stride, b, tile, add, nothing);
}

}  // namespace hotloop
