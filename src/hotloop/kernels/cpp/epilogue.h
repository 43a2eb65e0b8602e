// What becomes of a kernel's sums on their way to memory:
//
//   activation(sum + bias + addend), or the sum where mask is above 0, else 0.
//
// Products, convolutions, pooling and pointwise layers apply the same one, a Vector at a time.
#pragma once

#include <type_traits>

#include "vector_math.h"

namespace hotloop {

// As in abi.h, where calls have it as a number.
enum Activation : int32_t { kNoActivation, kRelu, kGelu, kTanhGelu };

template <int activation>
inline Vector activate(Vector x) {
  if constexpr (activation == kRelu) return x < 0 ? Vector{} : x;  // NaN stays NaN, as in torch.
  if constexpr (activation == kGelu)
    return 0.5f * x * (1.0f + error_function(x * 0.707106781f));
  if constexpr (activation == kTanhGelu) {  // Hendrycks and Gimpel 2016: x times a sigmoid.
    const Vector inner = 1.59576912f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(-inner));
  }
  return x;
}

// Which terms an epilogue has, known when its loop is compiled.
template <int activation, bool has_bias, bool has_addend, bool has_mask>
struct EpilogueKind {
  static constexpr int kActivation = activation;
  static constexpr bool kBias = has_bias, kAddend = has_addend, kMask = has_mask;
};

struct Epilogue {
  // bias: one for each column; addend, mask: one for each result. Null: none. With a mask there is no
  // activation.
  const float *bias = nullptr, *addend = nullptr, *mask = nullptr;
  int32_t activation = kNoActivation;

  // Calls body(EpilogueKind<...>()) with the terms that are there. most: no activation above it occurs.
  template <int most = kTanhGelu, class Body>
  void with_kind(const Body& body) const {
    if (mask) {
      if (bias) body(EpilogueKind<kNoActivation, true, false, true>());
      else body(EpilogueKind<kNoActivation, false, false, true>());
    } else {
      with_activation<most>(body);
    }
  }

 private:
  template <int candidate, class Body>
  void with_activation(const Body& body) const {
    if constexpr (candidate >= kNoActivation) {
      if (activation != candidate) return with_activation<candidate - 1>(body);
      if (bias && addend) body(EpilogueKind<candidate, true, true, false>());
      else if (bias) body(EpilogueKind<candidate, true, false, false>());
      else if (addend) body(EpilogueKind<candidate, false, true, false>());
      else body(EpilogueKind<candidate, false, false, false>());
    }
  }
};

// One vector of results; each term's own address. whole: all lanes, else the first `count`.
template <class Kind, bool whole>
inline __attribute__((always_inline)) Vector apply_epilogue(Vector value, const float* bias,
                                                            const float* addend, const float* mask,
                                                            int64_t count) {
  if constexpr (Kind::kBias) value += load<whole>(bias, count);
  if constexpr (Kind::kAddend) value += load<whole>(addend, count);
  value = activate<Kind::kActivation>(value);
  if constexpr (Kind::kMask) value = load<whole>(mask, count) <= 0 ? Vector{} : value;
  return value;
}

// An epilogue over tiles of a matrix whose columns are adjacent. most: as for with_kind.
template <int most>
struct MatrixEpilogue {
  Epilogue terms;
  float* out;
  int64_t out_ld, mask_ld = 0;  // Rows of an addend lie as those of `out`.

  // `rows` x `cols` sums, tile_ld apart, for the results from (i, j) on. Vectors of the tile may be read
  // whole.
  void operator()(const float* tile, int64_t tile_ld, int64_t i, int64_t rows, int64_t j,
                  int64_t cols) const {
    terms.template with_kind<most>([&](auto kind) {
      using Kind = decltype(kind);
      // A known width lets the compiler keep a row in registers.
      if (cols == 3 * kLanes)
        put<Kind, true>(tile, tile_ld, i, rows, j, std::integral_constant<int64_t, 3 * kLanes>());
      else if (cols % kLanes == 0) put<Kind, true>(tile, tile_ld, i, rows, j, cols);
      else put<Kind, false>(tile, tile_ld, i, rows, j, cols);
    });
  }

 private:
  template <class Kind, bool whole, class Count>
  void put(const float* tile, int64_t tile_ld, int64_t i, int64_t rows, int64_t j,
           Count cols) const {
    for (int64_t r = 0; r < rows; ++r) {
      const float* __restrict from = tile + r * tile_ld;
      float* to = out + (i + r) * out_ld + j;
      const float* bias = Kind::kBias ? terms.bias + j : nullptr;
      const float* addend = Kind::kAddend ? terms.addend + (i + r) * out_ld + j : nullptr;
      const float* mask = Kind::kMask ? terms.mask + (i + r) * mask_ld + j : nullptr;
      const auto at = [](const float* base, int64_t c) { return base ? base + c : nullptr; };
      for (int64_t c = 0; c < cols; c += kLanes) {
        const Vector value = apply_epilogue<Kind, whole>(load(from + c), at(bias, c), at(addend, c),
                                                         at(mask, c), cols - c);
        store<whole>(to + c, value, cols - c);
      }
    }
  }
};

}  // namespace hotloop
