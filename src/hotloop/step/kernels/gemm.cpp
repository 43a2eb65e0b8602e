// See gemm.h. The scheme is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication" (ACM TOMS 34, 2008), cut down to one resident operand: training batches make one
// side of every product small, so it is packed whole, once, by all threads together; the other
// side streams past, each thread packing only the part it owns.
#include "gemm.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// The tile in registers: kRows x (kVectors * kLanes) sums. On AVX-512: 24 sums, 3 columns, 1 row.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8, kVectors = 3, kFlatRows = 6, kFlatVectors = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 4, kVectors = 3, kFlatRows = 4, kFlatVectors = 3;
#else
constexpr int kLanes = 4, kRows = 4, kVectors = 3, kFlatRows = 4, kFlatVectors = 3;
#endif
constexpr int kCols = kVectors * kLanes;
// Where the rows of one side lie along the sum, they need no packing: kFlatRows x (kFlatVectors *
// kLanes) sums, kFlatGroup rows at a time, kFlatDepth of the packed side in the second-level cache.
constexpr int64_t kFlatGroup = 48, kFlatDepth = 1024, kFlatCols = kFlatVectors * kLanes;
// Depth of a streamed panel: kDepth * kCols floats, and the tiles that they add to, stay in a
// first-level cache of 48 KiB.
constexpr int64_t kDepth = 128;
// Floats of the resident side that are used again and again before going on. Stored results take
// half a second-level cache of 512 KiB; updates want runs of memory as long as can be, and a
// resident side that comes from the third level costs them less than short runs do.
constexpr int64_t kStoreBlock = 64 * 1024, kUpdateBlock = 1024 * 1024;
constexpr int64_t kLineFloats = 16;
// Below so many multiply-adds waking a second thread costs more than it brings.
constexpr double kOneThread = 1e5;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

std::atomic<int64_t> scratch_bytes{0};  // Of all threads.

struct Scratch {
  float* data = nullptr;
  int64_t count = 0;
  float* need(int64_t wanted) {
    if (wanted > count) {
      release();
      count = (wanted + 1023) / 1024 * 1024;
      data = static_cast<float*>(std::aligned_alloc(64, count * sizeof(float)));
      if (!data) std::abort();
      scratch_bytes += count * sizeof(float);
    }
    return data;
  }
  void release() {
    std::free(data);
    scratch_bytes -= count * sizeof(float);
  }
  ~Scratch() { release(); }
};
thread_local Scratch resident_scratch, panel_scratch, tile_scratch;

#if defined(__AVX__)
// dst[k * ld + r] = src[r * rs + k] for an 8 x 8 block.
inline void transpose8(const float* src, int64_t rs, float* dst, int64_t ld) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * rs);
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int h = 0; h < 2; ++h) {
    const __m256 *a = t + 4 * h, *b = t + 4 * h + 2;
    r[4 * h + 0] = _mm256_shuffle_ps(a[0], b[0], 0x44);
    r[4 * h + 1] = _mm256_shuffle_ps(a[0], b[0], 0xEE);
    r[4 * h + 2] = _mm256_shuffle_ps(a[1], b[1], 0x44);
    r[4 * h + 3] = _mm256_shuffle_ps(a[1], b[1], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// dst[k * width + r] = src[r * rs + k * ks], r < rows (zeros up to width), k < depth.
void pack(const float* src, int64_t rs, int64_t ks, int64_t rows, int64_t depth, float* dst,
          int64_t width) {
  if (rs == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      float* to = dst + k * width;
      std::memcpy(to, src + k * ks, rows * sizeof(float));
      for (int64_t r = rows; r < width; ++r) to[r] = 0;
    }
    return;
  }
  int64_t r0 = 0;
#if defined(__AVX__)
  if (ks == 1) {
    for (; r0 + 8 <= rows; r0 += 8) {
      int64_t k = 0;
      for (; k + 8 <= depth; k += 8)
        transpose8(src + r0 * rs + k, rs, dst + k * width + r0, width);
      for (; k < depth; ++k)
        for (int64_t r = r0; r < r0 + 8; ++r) dst[k * width + r] = src[r * rs + k];
    }
  }
#endif
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t r = r0; r < rows; ++r) dst[k * width + r] = src[r * rs + k * ks];
    for (int64_t r = rows; r < width; ++r) dst[k * width + r] = 0;
  }
}

// Called at each unit of a sum, between the multiplications: what can be done meanwhile, a little at a
// time. Nothing, here.
struct Nothing {
  template <class... Ignored>
  explicit Nothing(Ignored&&...) {}
  void operator()() {}
  // As an update's Behind (finish.h).
  void allow(int64_t) {}
  void complete() {}
  void take(const float*, int64_t, int64_t, int64_t, int64_t, int64_t) {}
};

// Packs a panel, a vector at each unit of the products of the panel before; memory is asked first.
template <class Format>
struct Packing {
  const float* from = nullptr;
  typename Format::Unit* to = nullptr;  // Null: there is nothing to pack.
  int64_t stride = 0, cols = 0, left = 0, at = 0, allowed = 0;

  // `depth` rows of so many adjacent floats; where they fill whole vectors.
  void plan(const float* rows, int64_t apart, int64_t num_cols, int64_t depth,
            typename Format::Unit* panel) {
    if (num_cols % kLanes || depth % Format::kFold) return;
    from = rows, stride = apart, cols = num_cols, to = panel;
    left = depth / Format::kFold * (cols / kLanes);
  }
  void allow(int64_t turns) { allowed = (left + turns - 1) / turns; }
  void complete() {
    while (allowed > 0) (*this)();
  }
  inline __attribute__((always_inline)) void operator()() {
    if (allowed <= 0) return;
    --allowed, --left;
    constexpr int64_t kAhead = 32;  // Rows: more than a turn packs.
    for (int64_t fold = 0; fold < Format::kFold; ++fold)
      __builtin_prefetch(from + (kAhead + fold) * stride + at, 0, 2);
    Format::unit(from + at, stride, to);
    to += kLanes, at += kLanes;
    if (at == cols) at = 0, from += Format::kFold * stride;
  }
};

// Asks for the lines of the next rows, whose elements are adjacent, while as many rows are used.
struct NextRows {
  const float* row;
  int64_t stride, rows, at = 0;

  NextRows(const float* row, int64_t stride, int64_t rows)
      : row(row), stride(stride), rows(rows) {}

  void operator()() {
    const int64_t r = at % kLineFloats;
    if (r < rows) __builtin_prefetch(row + r * stride + (at - r), 0, 2);
    ++at;
  }
};

// tile[R][V * kLanes] (+)= a^T b: a[r * rs + k * ks], b[k * V * kLanes + column], k < depth. Ahead: by value,
// so that it stays in registers, or a reference. Group: rows reached from one address; with few of them
// there are fewer distances to keep.
template <int R, int V, int Group, class Ahead, class Step>
void micro(int64_t depth, const float* a, int64_t rs, Step ks, const float* b, float* tile,
           int64_t ld, bool add, Ahead ahead) {
  constexpr int kGroups = (R + Group - 1) / Group;
  Vector sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      sum[r][v] = add ? *reinterpret_cast<Vector*>(tile + r * ld + v * kLanes) : Vector{};
  const float* base[kGroups];
#pragma GCC unroll 4
  for (int i = 0; i < kGroups; ++i) base[i] = a + Group * i * rs;
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = *reinterpret_cast<const Vector*>(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += base[r / Group][r % Group * rs] * column[v];
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; ++i) base[i] += ks;
    b += V * kLanes;
    ahead();
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) *reinterpret_cast<Vector*>(tile + r * ld + v * kLanes) = sum[r][v];
}

// Both sides packed.
template <class Ahead>
void multiply(int vectors, int64_t depth, const float* a, const float* b, float* tile, int64_t ld,
              bool add, Ahead& ahead) {
  if (vectors == 3) micro<kRows, 3, kRows, Ahead&>(depth, a, 1, kRows, b, tile, ld, add, ahead);
  else if (vectors == 2) micro<kRows, 2, kRows, Ahead&>(depth, a, 1, kRows, b, tile, ld, add, ahead);
  else micro<kRows, 1, kRows, Ahead&>(depth, a, 1, kRows, b, tile, ld, add, ahead);
}

constexpr std::integral_constant<int64_t, 1> kAdjacent;

// Rows of a `rs` apart, whose elements along the sum are `ks` apart; as many rows at a time as there are
// registers for their sums. Where `ks` is kAdjacent, the compiler knows it. ahead_of(a, rs, count): what is
// done meanwhile, for `count` rows at a.
template <int V, class Step, class Ahead>
void multiply_rows(int64_t rows, int64_t depth, const float* a, int64_t rs, Step ks,
                   const float* b, float* tile, bool add, const Ahead& ahead_of) {
  constexpr int most = kFlatRows * kFlatVectors / V, ld = V * kLanes;
  constexpr int whole = most > 12 ? 12 : most;
  const auto next = [&](auto count) {
    constexpr int R = decltype(count)::value;
    micro<R, V, 3>(depth, a, rs, ks, b, tile, ld, add, ahead_of(a, rs, R));
    rows -= R, a += R * rs, tile += R * ld;
  };
  // Two rows keep the units waiting for their own sums: 8 = 4 + 4, not 6 + 2.
  while (rows >= whole && !(whole == 6 && rows == 8)) next(std::integral_constant<int, whole>{});
  while (rows >= 4) next(std::integral_constant<int, 4>{});
  while (rows >= 2) next(std::integral_constant<int, 2>{});
  if (rows) next(std::integral_constant<int, 1>{});
}

template <class Step, class Ahead>
void multiply_rows(int vectors, int64_t rows, int64_t depth, const float* a, int64_t rs, Step ks,
                   const float* b, float* tile, bool add, const Ahead& ahead_of) {
  if (vectors == 4) multiply_rows<4>(rows, depth, a, rs, ks, b, tile, add, ahead_of);
  else if (vectors == 3) multiply_rows<3>(rows, depth, a, rs, ks, b, tile, add, ahead_of);
  else if (vectors == 2) multiply_rows<2>(rows, depth, a, rs, ks, b, tile, add, ahead_of);
  else multiply_rows<1>(rows, depth, a, rs, ks, b, tile, add, ahead_of);
}

template <class Step>
void multiply_rows(int vectors, int64_t rows, int64_t depth, const float* a, int64_t rs, Step ks,
                   const float* b, float* tile, bool add) {
  const auto nothing = [](const float*, int64_t, int) { return Nothing(); };
  multiply_rows(vectors, rows, depth, a, rs, ks, b, tile, add, nothing);
}

// What `product` packs and multiplies: a unit of a packed side holds kFold adjacent elements of the
// sum. gemm_bf16.cpp has the other format.
struct Float32 {
  using Unit = float;
  static constexpr int64_t kFold = 1;
  static constexpr auto& pack = ::pack;
  static void unit(const float* from, int64_t, float* to) {
    *reinterpret_cast<Vector*>(to) = *reinterpret_cast<const Vector*>(from);
  }
  template <class... Arguments>
  static void multiply(Arguments&&... arguments) {
    ::multiply(arguments...);
  }
  static void rows(int vectors, int64_t count, int64_t depth, const float* a, int64_t rs,
                   const float* b, float* tile, bool add) {
    const auto next = [](const float* at, int64_t apart, int rows) {
      return NextRows(at + rows * apart, apart, rows);
    };
    multiply_rows(vectors, count, depth, a, rs, kAdjacent, b, tile, add, next);
  }
};

struct Range {
  int64_t begin, end;
};

// Part `index` of `parts` of [0, count), cut at multiples of `grain`.
Range share(int64_t count, int64_t grain, int index, int parts) {
  const int64_t grains = (count + grain - 1) / grain;
  return {std::min(count, grains * index / parts * grain),
          std::min(count, grains * (index + 1) / parts * grain)};
}

// How many at a time, so that `count` go in equal blocks of whole groups of rows, none above `most`.
int64_t block_of(int64_t count, int64_t most) {
  const int64_t blocks = std::max<int64_t>((count + most - 1) / most, 1);
  return ((count + blocks - 1) / blocks + kFlatRows - 1) / kFlatRows * kFlatRows;
}

// The resident side, packed: by all threads together, or by each for itself. What another thread has packed
// comes from that one's cache: up to a quarter of a small product where the two share none
// (docs/notes/fused-update.md). A long side to stream past pays for packing twice; a large resident
// side would not stay in a second-level cache, and is better shared in the third.
template <class Unit>
struct Resident {
  const int64_t count;
  const bool alone;
  Unit* const shared;

  // `count` units for `streamed` rows or columns; made before the threads part.
  Resident(int64_t count, int64_t streamed, int num_threads)
      : count(count), alone(count <= 128 * 1024 && streamed >= 32 * num_threads),
        shared(alone ? nullptr : place(count)) {}

  Unit* packed() const { return alone ? place(count) : shared; }

  // What this thread packs of [0, all_of_it), cut at multiples of `grain`.
  Range part(int64_t all_of_it, int64_t grain) const {
    if (alone) return {0, all_of_it};
    return share(all_of_it, grain, omp_get_thread_num(), omp_get_num_threads());
  }

  // Every part is packed.
  void complete() const {
    if (!alone) {
#pragma omp barrier
    }
  }

 private:
  static Unit* place(int64_t count) {
    return reinterpret_cast<Unit*>(resident_scratch.need(count));
  }
};

int vectors_for(int64_t cols) { return static_cast<int>((cols + kLanes - 1) / kLanes); }

// out[r][c] = tile[c][r]: what `flat` has computed, turned.
void turn(const float* tile, int64_t ld, int64_t rows, int64_t cols, float* out, int64_t out_ld) {
  int64_t r = 0;
#if defined(__AVX__)
  for (; r + 8 <= rows; r += 8) {
    int64_t c = 0;
    for (; c + 8 <= cols; c += 8) transpose8(tile + c * ld + r, ld, out + r * out_ld + c, out_ld);
    for (; c < cols; ++c)
      for (int64_t i = r; i < r + 8; ++i) out[i * out_ld + c] = tile[c * ld + i];
  }
#endif
  for (; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) out[r * out_ld + c] = tile[c * ld + r];
}

// A B where the columns of B are dense, as a weight's rows are in x W^T: B is read in place, A, the
// batch, is packed; what comes out is turned before `finish`.
template <class Format, class Finish>
void flat(int64_t M, int64_t N, int64_t K, const float* A, int64_t a_rs, int64_t a_cs,
          const float* B, int64_t b_cs, int num_threads, const Finish& finish) {
  using Unit = typename Format::Unit;
  constexpr int64_t kFold = Format::kFold, kDeep = kFlatDepth * kFold;
  const int64_t strips = (M + kFlatCols - 1) / kFlatCols, units = (K + kFold - 1) / kFold;
  const Resident<Unit> resident(strips * kFlatCols * units, N, num_threads);
#pragma omp parallel num_threads(num_threads)
  {
    const int me = omp_get_thread_num(), all = omp_get_num_threads();
    Unit* packed = resident.packed();
    const auto width = [&](int64_t strip) {
      return vectors_for(std::min(kFlatCols, M - strip * kFlatCols)) * kLanes;
    };
    const Range depths = resident.part(K, kLanes);
    for (int64_t s = 0; s < strips; ++s)
      Format::pack(A + s * kFlatCols * a_rs + depths.begin * a_cs, a_rs, a_cs,
                   std::min(kFlatCols, M - s * kFlatCols), depths.end - depths.begin,
                   packed + s * kFlatCols * units + depths.begin / kFold * width(s), width(s));
    resident.complete();
    const Range mine = share(N, kLanes, me, all);
    float* tile = tile_scratch.need(2 * kFlatGroup * kFlatCols);
    float* turned = tile + kFlatGroup * kFlatCols;
    for (int64_t n = mine.begin; n < mine.end; n += kFlatGroup) {
      const int64_t cols = std::min(kFlatGroup, mine.end - n);
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t rows = std::min(kFlatCols, M - s * kFlatCols), ld = width(s);
        for (int64_t k = 0; k < K; k += kDeep)
          Format::rows(vectors_for(rows), cols, std::min(kDeep, K - k), B + n * b_cs + k, b_cs,
                       packed + s * kFlatCols * units + k / kFold * ld, tile, k > 0);
        turn(tile, ld, rows, cols, turned, kFlatGroup);
        finish(turned, kFlatGroup, s * kFlatCols, rows, n, cols);
      }
    }
  }
}

// Every part of A B goes through `finish(sums, ld, i, rows, j, cols)` once, complete.
template <class Format, class Finish>
void product(int64_t M, int64_t N, int64_t K, const float* A, int64_t a_rs, int64_t a_cs,
             const float* B, int64_t b_rs, int64_t b_cs, int num_threads, const Finish& finish) {
  const int64_t row_tiles = (M + kRows - 1) / kRows, col_tiles = (N + kCols - 1) / kCols;
  using Unit = typename Format::Unit;
  constexpr int64_t kFold = Format::kFold, kDeep = kDepth * kFold;
  const int64_t units = (K + kFold - 1) / kFold;
  if (double(M) * N * K < kOneThread) num_threads = 1;
  if (b_rs == 1 && b_cs != 1 && M > kLanes / 2 && !Finish::kAlongRows) {
    flat<Format>(M, N, K, A, a_rs, a_cs, B, b_cs, num_threads, finish);
    return;
  }
  // An update walks along rows, where memory is adjacent, if there are enough for every thread.
  const bool walk = M >= N || (Finish::kAlongRows && M >= 4 * kRows * num_threads);
  if (!walk) {
    // A is resident; each thread owns columns and packs B's panels as it comes to them.
    const Resident<Unit> resident(row_tiles * kRows * units, N, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
      const int me = omp_get_thread_num(), all = omp_get_num_threads();
      Unit* packed = resident.packed();
      const Range part = resident.part(row_tiles, 1);
      for (int64_t t = part.begin; t < part.end; ++t)
        Format::pack(A + t * kRows * a_rs, a_rs, a_cs, std::min<int64_t>(kRows, M - t * kRows), K,
                     packed + t * kRows * units, kRows);
      resident.complete();
      const Range mine = share(N, kLanes, me, all);
      [[maybe_unused]] const typename Finish::Mode mode;
      Unit* panel = reinterpret_cast<Unit*>(panel_scratch.need(2 * kDepth * kCols));
      Unit* spare = panel + kDepth * kCols;
      float* tiles = tile_scratch.need(row_tiles * kRows * kCols);
      Packing<Format> next;
      for (int64_t j = mine.begin; j < mine.end; j += kCols) {
        const int64_t cols = std::min<int64_t>(kCols, mine.end - j);
        const int vectors = vectors_for(cols);
        const int64_t ld = vectors * kLanes;
        for (int64_t k = 0; k < K; k += kDeep) {
          const int64_t depth = std::min(kDeep, K - k);
          const bool last = k + depth == K;
          if (next.to) std::swap(panel, spare);
          else Format::pack(B + k * b_rs + j * b_cs, b_cs, b_rs, cols, depth, panel, ld);
          // While this panel is used, the next one is packed.
          const int64_t k2 = last ? 0 : k + depth, j2 = last ? j + kCols : j;
          next = {};
          if (b_cs == 1 && j2 < mine.end)
            next.plan(B + k2 * b_rs + j2, b_rs, std::min<int64_t>(kCols, mine.end - j2),
                      std::min(kDeep, K - k2), spare);
          for (int64_t t = 0; t < row_tiles; ++t) {
            next.allow(row_tiles - t);
            float* tile = tiles + t * kRows * ld;
            Format::multiply(vectors, (depth + kFold - 1) / kFold,
                             packed + (t * units + k / kFold) * kRows, panel, tile, ld, k > 0,
                             next);
            next.complete();
            if (last)
              finish(tile, ld, t * kRows, std::min<int64_t>(kRows, M - t * kRows), j, cols);
          }
        }
      }
    }
  } else {
    // B is resident; each thread owns rows, and walks along them.
    const Resident<Unit> resident(col_tiles * kCols * units, M, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
      const int me = omp_get_thread_num(), all = omp_get_num_threads();
      Unit* packed = resident.packed();
      const Range part = resident.part(col_tiles, 1);
      for (int64_t t = part.begin; t < part.end; ++t) {
        const int64_t cols = std::min<int64_t>(kCols, N - t * kCols);
        Format::pack(B + t * kCols * b_cs, b_cs, b_rs, cols, K, packed + t * kCols * units,
                     vectors_for(cols) * kLanes);
      }
      resident.complete();
      const Range mine = share(M, kRows, me, all);
      [[maybe_unused]] const typename Finish::Mode mode;
      typename Finish::Behind behind(finish);
      Unit* panel = reinterpret_cast<Unit*>(panel_scratch.need(kRows * units));
      const int64_t floats = Finish::kAlongRows ? kUpdateBlock : kStoreBlock;
      const int64_t block = std::clamp<int64_t>(floats / (kCols * K), 1, col_tiles);
      // A line more than the block: rows 4 KiB apart would push each other out of the cache.
      const int64_t ld = Finish::kAlongRows ? block * kCols + kLanes : kCols;
      float* sums = tile_scratch.need(2 * kRows * ld);
      float* others = sums + kRows * ld;
      for (int64_t first = 0; first < col_tiles; first += block) {
        const int64_t end = std::min(col_tiles, first + block), start = first * kCols;
        for (int64_t i = mine.begin; i < mine.end; i += kRows) {
          const int64_t rows = std::min<int64_t>(kRows, mine.end - i);
          Format::pack(A + i * a_rs, a_rs, a_cs, rows, K, panel, kRows);
          for (int64_t t = first; t < end; ++t) {
            const int64_t j = t * kCols, cols = std::min<int64_t>(kCols, N - j);
            float* tile = Finish::kAlongRows ? sums + j - start : sums;
            behind.allow(end - t);
            Format::multiply(vectors_for(cols), units, panel, packed + j * units, tile, ld, false,
                             behind);
            behind.complete();
            if constexpr (!Finish::kAlongRows) finish(tile, ld, i, rows, j, cols);
          }
          behind.take(sums, ld, i, rows, start, std::min(N, end * kCols) - start);
          if (Finish::kAlongRows) std::swap(sums, others);
        }
      }
      behind.allow(1);
      behind.complete();
    }
  }
}

}  // namespace

#ifndef HOTLOOP_FORWARD_ONLY

#include "finish.h"

extern "C" {

__attribute__((visibility("default"))) void hotloop_gemm_f32(
    int64_t M, int64_t N, int64_t K, const float* A, int64_t a_rs, int64_t a_cs, const float* B,
    int64_t b_rs, int64_t b_cs, float* C, int64_t c_rs, const float* bias, int32_t act,
    const float* mask, int64_t mask_rs, int32_t num_threads) {
  product<Float32>(M, N, K, A, a_rs, a_cs, B, b_rs, b_cs, num_threads,
                   Store{C, c_rs, bias, act, mask, mask_rs});
}

__attribute__((visibility("default"))) void hotloop_gemm_update_f32(
    int64_t M, int64_t N, int64_t K, const float* A, int64_t a_rs, int64_t a_cs, const float* B,
    int64_t b_rs, int64_t b_cs, float* W, int64_t w_rs, float* s1, float* s2, int64_t s_rs,
    float* G, const hotloop_update* u, float scale, int32_t num_threads) {
  by_kind<0>(u->kind, [&](auto kind) {
    product<Float32>(M, N, K, A, a_rs, a_cs, B, b_rs, b_cs, num_threads,
                     Apply<kind>{W, s1, s2, G, w_rs, s_rs, {*u, scale}});
  });
}

__attribute__((visibility("default"))) void hotloop_update_f32(int64_t n, float* w, const float* g,
                                                               float* s1, float* s2,
                                                               const hotloop_update* u, float scale,
                                                               int32_t num_threads) {
  by_kind<0>(u->kind, [&](auto kind) {
    if (n < 32768) num_threads = 1;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
      const Range mine = share(n, 16, omp_get_thread_num(), omp_get_num_threads());
      const int64_t at = mine.begin;
      [[maybe_unused]] const FlushDenormals mode;
      update_row<kind>(mine.end - at, w + at, g + at, s1 + (kind > 0 ? at : 0),
                       s2 + (kind == 3 || kind == 4 ? at : 0), Scalars(*u, scale));
    }
  });
}
}
#endif
