// The products with factors rounded to bfloat16 (to nearest, ties to even, as torch does) and summed in
// float32: vdpbf16ps adds two products a lane, twice what a float32 multiply-add does. Matrices stay
// float32 in memory and are rounded while they are packed.
#include "error.h"
#include "products.h"

#if defined(__AVX512BF16__)
#include "products_of.h"

namespace hotloop {
namespace {

// A unit holds elements k (low half) and k + 1 of a row; past the end, zero.
struct Bfloat16 {
  using Unit = uint32_t;
  static constexpr int64_t kFold = 2;
  // Units that one conversion gives.
  static constexpr int64_t kUnits = 16;

  // Units of 32 floats that lie next to each other.
  static __m512i along(const float* from) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
  }

  // The same of `count` floats, ks apart.
  static __m512i along(const float* from, int64_t ks, int64_t count) {
    alignas(64) float row[2 * kUnits] = {};
    for (int64_t k = 0; k < count; ++k) row[k] = from[k * ks];
    return along(row);
  }

  // Unit r: row[r] and next[r].
  static __m512i across(__m512 row, __m512 next) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                           8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(next, row));
  }

  // A vector of units from adjacent columns of two rows.
  static void pack_vector(const float* from, int64_t stride, uint32_t* to) {
    _mm512_storeu_si512(to, across(_mm512_loadu_ps(from), _mm512_loadu_ps(from + stride)));
  }

  // dst[u * width + r] = elements 2u and 2u + 1 of row r, r < rows (zeros up to width).
  static void pack(const float* src, int64_t rs, int64_t ks, int64_t rows, int64_t depth,
                   uint32_t* dst, int64_t width) {
    if (rs == 1) {
      for (int64_t k = 0; k < depth; k += 2, dst += width)
        for (int64_t r = 0; r < width; r += kLanes) {
          const int64_t left = std::clamp<int64_t>(rows - r, 0, kLanes);
          const __mmask16 mask = (1u << left) - 1;
          const float* from = src + k * ks + r;
          const __m512 row = _mm512_maskz_loadu_ps(mask, from);
          const __m512 next = _mm512_maskz_loadu_ps(k + 1 < depth ? mask : 0, from + ks);
          const __mmask16 room = (1u << std::min<int64_t>(width - r, kLanes)) - 1;
          _mm512_mask_storeu_epi32(dst + r, room, across(row, next));
        }
      return;
    }
    // Eight rows at a time, turned as floats are.
    alignas(64) uint32_t block[8 * kUnits];
    for (int64_t k = 0; k < depth; k += 2 * kUnits) {
      const int64_t count = std::min(2 * kUnits, depth - k), units = (count + 1) / 2;
      for (int64_t r0 = 0; r0 < width; r0 += 8) {
        for (int64_t r = 0; r < 8; ++r) {
          const float* from = src + (r0 + r) * rs + k * ks;
          const __m512i row = r0 + r >= rows                  ? _mm512_setzero_si512()
                              : ks == 1 && count == 2 * kUnits ? along(from)
                                                               : along(from, ks, count);
          _mm512_store_si512(block + r * kUnits, row);
        }
        uint32_t* to = dst + k / 2 * width + r0;
        int64_t u = 0;
        for (; u + 8 <= units; u += 8)
          transpose8x8(reinterpret_cast<const float*>(block + u), kUnits,
                     reinterpret_cast<float*>(to + u * width), width);
        for (; u < units; ++u)
          for (int64_t r = 0; r < 8; ++r) to[u * width + r] = block[r * kUnits + u];
      }
    }
  }

  // tile[R][V * kLanes] (+)= a^T b over `units`: a[u * kMR + r], b[u * V * kLanes + column].
  template <int R, int V, class Overlap>
  static void micro(int64_t units, const uint32_t* a, const uint32_t* b, float* tile, int64_t ld,
                    bool add, Overlap& overlap) {
    Sums<R, V> sums(tile, ld, add);
    for (int64_t u = 0; u < units; ++u, a += R, b += V * kLanes) {
      sums.add(a, 1, b);
      overlap();
    }
    sums.store(tile, ld);
  }

  // Both sides packed.
  template <class Overlap>
  static void multiply_panels(int64_t vectors, int64_t units, const uint32_t* a, const uint32_t* b,
                       float* tile, int64_t ld, bool add, Overlap& overlap) {
    if (vectors == 3) micro<kMR, 3>(units, a, b, tile, ld, add, overlap);
    else if (vectors == 2) micro<kMR, 2>(units, a, b, tile, ld, add, overlap);
    else micro<kMR, 1>(units, a, b, tile, ld, add, overlap);
  }

  // Rows of a as they lie in memory, rounded 32 elements ahead of their use.
  template <int R, int V>
  static void micro_rows(int64_t depth, const float* a, int64_t rs, const uint32_t* b, float* tile,
                         bool add) {
    constexpr int64_t ld = V * kLanes;
    Sums<R, V> sums(tile, ld, add);
    alignas(64) uint32_t block[R * kUnits];
    for (int64_t k = 0; k < depth; k += 2 * kUnits) {
      const int64_t count = std::min(2 * kUnits, depth - k);
      for (int r = 0; r < R; ++r)
        _mm512_store_si512(block + r * kUnits, count == 2 * kUnits ? along(a + r * rs + k)
                                                                   : along(a + r * rs + k, 1, count));
      for (int64_t u = 0; u < (count + 1) / 2; ++u, b += ld) sums.add(block + u, kUnits, b);
    }
    sums.store(tile, ld);
  }

  template <int V>
  static void rows_of(int64_t rows, int64_t depth, const float* a, int64_t rs, const uint32_t* b,
                      float* tile, bool add) {
    constexpr int64_t ld = V * kLanes;
    for (; rows >= kDirectMR; rows -= kDirectMR, a += kDirectMR * rs, tile += kDirectMR * ld)
      micro_rows<kDirectMR, V>(depth, a, rs, b, tile, add);
    for (; rows >= 2; rows -= 2, a += 2 * rs, tile += 2 * ld)
      micro_rows<2, V>(depth, a, rs, b, tile, add);
    if (rows) micro_rows<1, V>(depth, a, rs, b, tile, add);
  }

  static void multiply_rows(int64_t vectors, int64_t count, int64_t depth, const float* a, int64_t rs,
                   const uint32_t* b, float* tile, bool add) {
    if (vectors == 4) rows_of<4>(count, depth, a, rs, b, tile, add);
    else if (vectors == 3) rows_of<3>(count, depth, a, rs, b, tile, add);
    else if (vectors == 2) rows_of<2>(count, depth, a, rs, b, tile, add);
    else rows_of<1>(count, depth, a, rs, b, tile, add);
  }

 private:
  // R x V vectors of sums in registers.
  template <int R, int V>
  struct Sums {
    __m512 sum[R][V];

    Sums(const float* tile, int64_t ld, bool add) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          sum[r][v] = add ? _mm512_loadu_ps(tile + r * ld + v * kLanes) : _mm512_setzero_ps();
    }

    // One unit of each row, `rs` apart, times one of each column.
    void add(const uint32_t* a, int64_t rs, const uint32_t* b) {
      __m512i column[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) column[v] = _mm512_loadu_si512(b + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i row = _mm512_set1_epi32(static_cast<int>(a[r * rs]));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)row, (__m512bh)column[v]);
      }
    }

    void store(float* tile, int64_t ld) const {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) _mm512_storeu_ps(tile + r * ld + v * kLanes, sum[r][v]);
    }
  };
};

}  // namespace

bool has_bfloat16_products() { return true; }

void product_bfloat16(const ProductCall& call) { product_of<Bfloat16>(call); }

void product_update_bfloat16(const ProductUpdateCall& call) { product_update_of<Bfloat16>(call); }

}  // namespace hotloop

#else

namespace hotloop {
namespace {

[[noreturn]] void refuse() {
  throw Error("products in bfloat16 need a processor with an instruction for them");
}

}  // namespace

bool has_bfloat16_products() { return false; }

void product_bfloat16(const ProductCall&) { refuse(); }

void product_update_bfloat16(const ProductUpdateCall&) { refuse(); }

}  // namespace hotloop

#endif
