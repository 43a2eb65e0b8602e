// C = A B as a template over the format of the panels and over what follows the sums.
//
// The scheme is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (ACM
// TOMS 34, 2008), cut down to one resident operand: training batches make one side of every product
// small, so it is packed whole, once, by all threads together; the other side streams past, each
// thread packing only the part it owns.
//
// A Format (Float32 below, Bfloat16 in bfloat16.h) packs panels of units, each kFold adjacent elements of the
// sum, and multiplies them. An epilogue takes every part of A B once, complete:
//
//   epilogue(sums, ld, i, rows, j, cols)      sums[rows][ld] for the results from (i, j) on
//   kDeferred                                 it wants runs along rows, and a block's update may
//                                             wait for the products of the next (update_epilogue.h)
//   ThreadMode, Deferred                      what lives in each thread meanwhile
#pragma once

#include <utility>

#include "abi.h"
#include "microkernel.h"
#include "pack.h"
#include "parallel.h"
#include "scratch.h"

namespace hotloop {

// Depth of a streamed panel: kKC * kNR floats, and the tiles that they add to, stay in a first-level
// cache of 48 KiB.
constexpr int64_t kKC = 128;
// Where one side is read in place: rows at a time, and how much of the packed side stays in the
// second-level cache.
constexpr int64_t kDirectMC = 48, kDirectKC = 1024;
// Floats of the resident side that are used again and again before going on. Stored results take
// half a second-level cache of 512 KiB; updates want runs of memory as long as can be, and a
// resident side that comes from the third level costs them less than short runs do.
constexpr int64_t kStoreBlock = 64 * 1024, kUpdateBlock = 1024 * 1024;
// Below so many multiply-adds waking a second thread costs more than it brings.
constexpr double kOneThreadWork = 1e5;

// How many rows at a time, so that `count` go in equal blocks of whole groups of them, none much above `most`.
inline int64_t even_block(int64_t count, int64_t most) {
  const int64_t blocks = std::max<int64_t>((count + most - 1) / most, 1);
  return ((count + blocks - 1) / blocks + kDirectMR - 1) / kDirectMR * kDirectMR;
}

struct GemmProblem {
  int64_t m, n, k;
  Matrix a, b;
  int threads;
};

struct Float32 {
  using Unit = float;
  static constexpr int64_t kFold = 1;
  static constexpr auto& pack = hotloop::pack;
  // One vector of units, of the rows `from`, which lie `stride` apart.
  static void pack_vector(const float* from, int64_t, float* to) { store(to, load(from)); }
  template <class... Arguments>
  static void multiply_panels(Arguments&&... arguments) {
    hotloop::multiply_panels(arguments...);
  }
  static void multiply_rows(int64_t vectors, int64_t rows, int64_t depth, const float* a,
                            int64_t row_stride, const float* b, float* tile, bool add) {
    const auto next = [](const float* at, int64_t stride, int count) {
      return PrefetchRows(at + count * stride, stride, count);
    };
    hotloop::multiply_rows(vectors, rows, depth, a, row_stride, kAdjacent, b, tile, add, next);
  }
};

namespace detail {

inline thread_local Scratch resident_scratch, panel_scratch, tile_scratch;

// Packs a panel, a vector at each step of the products of the panel before; memory is asked first.
template <class Format>
struct PackAhead {
  const float* from = nullptr;
  typename Format::Unit* to = nullptr;  // Null: there is nothing to pack.
  int64_t stride = 0, cols = 0, left = 0, at = 0, allowed = 0;

  // `depth` rows of so many adjacent floats; where they fill whole vectors.
  void plan(const float* rows, int64_t row_stride, int64_t num_cols, int64_t depth,
            typename Format::Unit* panel) {
    if (num_cols % kLanes || depth % Format::kFold) return;
    from = rows, stride = row_stride, cols = num_cols, to = panel;
    left = depth / Format::kFold * (cols / kLanes);
  }
  // As much now as makes it complete in so many turns.
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
    Format::pack_vector(from + at, stride, to);
    to += kLanes, at += kLanes;
    if (at == cols) at = 0, from += Format::kFold * stride;
  }
};

// The resident side, packed: by all threads together, or by each for itself. What another thread has packed
// comes from that one's cache: up to a quarter of a small product where the two share none
// (docs/notes/fused-update.md). A long side to stream past pays for packing twice; a large resident
// side would not stay in a second-level cache, and is better shared in the third.
template <class Unit>
class ResidentPanels {
 public:
  // `units` for `streamed` rows or columns; made before the threads part.
  ResidentPanels(int64_t units, int64_t streamed, int threads)
      : separate_(units <= 128 * 1024 && streamed >= 32 * threads),
        pieces_(resident_scratch, units, separate_ ? threads : 1) {}

  Unit* of(const Worker& worker) const {
    return reinterpret_cast<Unit*>(pieces_.of(separate_ ? worker.index : 0));
  }

  // What this thread packs of [0, count), cut at multiples of `grain`.
  Range part(int64_t count, int64_t grain, const Worker& worker) const {
    return separate_ ? Range{0, count} : share(count, grain, worker);
  }

  void wait_until_packed(const Worker& worker) const {
    if (!separate_) worker.barrier();
  }

 private:
  const bool separate_;
  const Pieces pieces_;
};

// A B where the columns of B are dense, as a weight's rows are in x W^T: B is read in place, A, the
// batch, is packed; what comes out is transposed before the epilogue.
template <class Format, class Epilogue>
void gemm_in_place(const GemmProblem& p, const Epilogue& epilogue) {
  using Unit = typename Format::Unit;
  constexpr int64_t kFold = Format::kFold, kDeep = kDirectKC * kFold;
  const float* A = p.a.data;
  const int64_t a_rs = p.a.row_stride, a_cs = p.a.col_stride;
  const float* B = p.b.data;
  const int64_t M = p.m, N = p.n, K = p.k, b_cs = p.b.col_stride;
  const int64_t strips = (M + kDirectNR - 1) / kDirectNR, units = (K + kFold - 1) / kFold;
  const ResidentPanels<Unit> resident(strips * kDirectNR * units, N, p.threads);
  const Pieces tiles(tile_scratch, 2 * kDirectMC * kDirectNR, p.threads);
  parallel(p.threads, [&](Worker worker) {
    Unit* packed = resident.of(worker);
    const auto width = [&](int64_t strip) {
      return padded(std::min(kDirectNR, M - strip * kDirectNR));
    };
    const Range depths = resident.part(K, kLanes, worker);
    for (int64_t s = 0; s < strips; ++s)
      Format::pack(A + s * kDirectNR * a_rs + depths.begin * a_cs, a_rs, a_cs,
                   std::min(kDirectNR, M - s * kDirectNR), depths.end - depths.begin,
                   packed + s * kDirectNR * units + depths.begin / kFold * width(s), width(s));
    resident.wait_until_packed(worker);
    const Range mine = share(N, kLanes, worker);
    float* tile = tiles.of(worker.index);
    float* transposed = tile + kDirectMC * kDirectNR;
    for (int64_t n = mine.begin; n < mine.end; n += kDirectMC) {
      const int64_t cols = std::min(kDirectMC, mine.end - n);
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t rows = std::min(kDirectNR, M - s * kDirectNR), ld = width(s);
        for (int64_t k = 0; k < K; k += kDeep)
          Format::multiply_rows(vectors_for(rows), cols, std::min(kDeep, K - k), B + n * b_cs + k,
                                b_cs, packed + s * kDirectNR * units + k / kFold * ld, tile, k > 0);
        transpose(tile, ld, cols, rows, transposed, kDirectMC);
        epilogue(transposed, kDirectMC, s * kDirectNR, rows, n, cols);
      }
    }
  });
}

// A is resident; each thread owns columns and packs B's panels as it comes to them.
template <class Format, class Epilogue>
void gemm_by_columns(const GemmProblem& p, const Epilogue& epilogue) {
  using Unit = typename Format::Unit;
  constexpr int64_t kFold = Format::kFold, kDeep = kKC * kFold;
  const float* A = p.a.data;
  const int64_t a_rs = p.a.row_stride, a_cs = p.a.col_stride;
  const float* B = p.b.data;
  const int64_t b_rs = p.b.row_stride, b_cs = p.b.col_stride;
  const int64_t M = p.m, N = p.n, K = p.k;
  const int64_t row_tiles = (M + kMR - 1) / kMR, units = (K + kFold - 1) / kFold;
  const ResidentPanels<Unit> resident(row_tiles * kMR * units, N, p.threads);
  const Pieces panels(panel_scratch, 2 * kKC * kNR, p.threads);
  const Pieces sums(tile_scratch, row_tiles * kMR * kNR, p.threads);
  parallel(p.threads, [&](Worker worker) {
    Unit* packed = resident.of(worker);
    const Range part = resident.part(row_tiles, 1, worker);
    for (int64_t t = part.begin; t < part.end; ++t)
      Format::pack(A + t * kMR * a_rs, a_rs, a_cs, std::min<int64_t>(kMR, M - t * kMR), K,
                   packed + t * kMR * units, kMR);
    resident.wait_until_packed(worker);
    const Range mine = share(N, kLanes, worker);
    [[maybe_unused]] const typename Epilogue::ThreadMode mode;
    Unit* panel = reinterpret_cast<Unit*>(panels.of(worker.index));
    Unit* spare = panel + kKC * kNR;
    float* tiles = sums.of(worker.index);
    PackAhead<Format> next;
    for (int64_t j = mine.begin; j < mine.end; j += kNR) {
      const int64_t cols = std::min<int64_t>(kNR, mine.end - j), ld = padded(cols);
      for (int64_t k = 0; k < K; k += kDeep) {
        const int64_t depth = std::min(kDeep, K - k);
        const bool last = k + depth == K;
        if (next.to) std::swap(panel, spare);
        else Format::pack(B + k * b_rs + j * b_cs, b_cs, b_rs, cols, depth, panel, ld);
        // While this panel is used, the next one is packed.
        const int64_t k2 = last ? 0 : k + depth, j2 = last ? j + kNR : j;
        next = {};
        if (b_cs == 1 && j2 < mine.end)
          next.plan(B + k2 * b_rs + j2, b_rs, std::min<int64_t>(kNR, mine.end - j2),
                    std::min(kDeep, K - k2), spare);
        for (int64_t t = 0; t < row_tiles; ++t) {
          next.allow(row_tiles - t);
          float* tile = tiles + t * kMR * ld;
          Format::multiply_panels(vectors_for(cols), (depth + kFold - 1) / kFold,
                                  packed + (t * units + k / kFold) * kMR, panel, tile, ld, k > 0,
                                  next);
          next.complete();
          if (last) epilogue(tile, ld, t * kMR, std::min<int64_t>(kMR, M - t * kMR), j, cols);
        }
      }
    }
  });
}

// B is resident; each thread owns rows, and walks along them.
template <class Format, class Epilogue>
void gemm_by_rows(const GemmProblem& p, const Epilogue& epilogue) {
  using Unit = typename Format::Unit;
  constexpr int64_t kFold = Format::kFold;
  const float* A = p.a.data;
  const int64_t a_rs = p.a.row_stride, a_cs = p.a.col_stride;
  const float* B = p.b.data;
  const int64_t b_rs = p.b.row_stride, b_cs = p.b.col_stride;
  const int64_t M = p.m, N = p.n, K = p.k;
  const int64_t col_tiles = (N + kNR - 1) / kNR, units = (K + kFold - 1) / kFold;
  const ResidentPanels<Unit> resident(col_tiles * kNR * units, M, p.threads);
  const Pieces panels(panel_scratch, kMR * units, p.threads);
  const int64_t floats = Epilogue::kDeferred ? kUpdateBlock : kStoreBlock;
  const int64_t block = std::clamp<int64_t>(floats / (kNR * std::max<int64_t>(K, 1)), 1, col_tiles);
  // A line more than the block: rows 4 KiB apart would push each other out of the cache.
  const int64_t ld = Epilogue::kDeferred ? block * kNR + kLanes : kNR;
  const Pieces tiles(tile_scratch, 2 * kMR * ld, p.threads);
  parallel(p.threads, [&](Worker worker) {
    Unit* packed = resident.of(worker);
    const Range part = resident.part(col_tiles, 1, worker);
    for (int64_t t = part.begin; t < part.end; ++t) {
      const int64_t cols = std::min<int64_t>(kNR, N - t * kNR);
      Format::pack(B + t * kNR * b_cs, b_cs, b_rs, cols, K, packed + t * kNR * units,
                   padded(cols));
    }
    resident.wait_until_packed(worker);
    const Range mine = share(M, kMR, worker);
    [[maybe_unused]] const typename Epilogue::ThreadMode mode;
    typename Epilogue::Deferred deferred(epilogue);
    Unit* panel = reinterpret_cast<Unit*>(panels.of(worker.index));
    float* sums = tiles.of(worker.index);
    float* others = sums + kMR * ld;
    for (int64_t first = 0; first < col_tiles; first += block) {
      const int64_t end = std::min(col_tiles, first + block), start = first * kNR;
      for (int64_t i = mine.begin; i < mine.end; i += kMR) {
        const int64_t rows = std::min<int64_t>(kMR, mine.end - i);
        Format::pack(A + i * a_rs, a_rs, a_cs, rows, K, panel, kMR);
        for (int64_t t = first; t < end; ++t) {
          const int64_t j = t * kNR, cols = std::min<int64_t>(kNR, N - j);
          float* tile = Epilogue::kDeferred ? sums + j - start : sums;
          deferred.allow(end - t);
          Format::multiply_panels(vectors_for(cols), units, panel, packed + j * units, tile, ld,
                                  false, deferred);
          deferred.complete();
          if constexpr (!Epilogue::kDeferred) epilogue(tile, ld, i, rows, j, cols);
        }
        deferred.take(sums, ld, i, rows, start, std::min(N, end * kNR) - start);
        if (Epilogue::kDeferred) std::swap(sums, others);
      }
    }
    deferred.allow(1);
    deferred.complete();
  });
}

}  // namespace detail

// Throws Error.
template <class Format, class Epilogue>
void gemm(GemmProblem p, const Epilogue& epilogue) {
  if (p.m <= 0 || p.n <= 0) return;
  if (static_cast<double>(p.m) * p.n * p.k < kOneThreadWork) p.threads = 1;
  if constexpr (!Epilogue::kDeferred) {
    const bool dense_columns = p.b.row_stride == 1 && p.b.col_stride != 1;
    if (dense_columns && p.m > kLanes / 2 && p.k > 0)
      return detail::gemm_in_place<Format>(p, epilogue);
  }
  // An update walks along rows, where memory is adjacent, if there are enough for every thread.
  if (p.k == 0 || p.m >= p.n || (Epilogue::kDeferred && p.m >= 4 * kMR * p.threads))
    detail::gemm_by_rows<Format>(p, epilogue);
  else
    detail::gemm_by_columns<Format>(p, epilogue);
}

}  // namespace hotloop
