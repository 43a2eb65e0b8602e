// Sums of the columns of a matrix: the gradient of a bias.
#include "abi.h"
#include "error.h"
#include "parallel.h"
#include "partial_sums.h"
#include "scratch.h"

namespace hotloop {
namespace {

// Fewer elements than so many are one thread's.
constexpr int64_t kOneThreadCount = 32768;
// Columns of one piece of work; a thread has several blocks of rows or several pieces.
constexpr int64_t kPieceCols = 512;
constexpr int kSums = 8;  // Registers of sums: as many chains of additions at once.

thread_local Scratch scratch;

// Rows [begin, end) of `vectors` vectors of columns from c on. Narrow ones sum every few rows by themselves.
template <int vectors, bool has_mask>
void sum_vectors(const ColumnSumsCall& call, int64_t begin, int64_t end, int64_t c, float* out) {
  constexpr int chains = kSums / vectors;
  const int64_t left = call.cols - c;
  Vector sums[kSums] = {};
  const auto add = [&](int64_t row, int chain) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t lanes = left - v * kLanes, at = c + v * kLanes;
      Vector value = load<(vectors > 1)>(call.x + row * call.row_stride + at, lanes);
      if (has_mask) {
        const float* mask = call.mask + row * call.mask_row_stride + at;
        value = load<(vectors > 1)>(mask, lanes) <= 0 ? Vector{} : value;
      }
      sums[chain * vectors + v] += value;
    }
  };
  int64_t row = begin;
  for (; row + chains <= end; row += chains)
#pragma GCC unroll 8
    for (int chain = 0; chain < chains; ++chain) add(row + chain, chain);
#pragma GCC unroll 8
  for (int chain = 0; chain < chains; ++chain)
    if (row + chain < end) add(row + chain, chain);
#pragma GCC unroll 8
  for (int half = kSums / 2; half >= vectors; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  for (int v = 0; v < vectors; ++v) store<(vectors > 1)>(out + c + v * kLanes, sums[v], left - v * kLanes);
}

// out[c] = the sum of rows [begin, end), for columns [first, last).
template <bool has_mask>
void sum_block(const ColumnSumsCall& call, int64_t begin, int64_t end, int64_t first, int64_t last,
               float* out) {
  int64_t c = first;
  for (; c + 8 * kLanes <= last; c += 8 * kLanes) sum_vectors<8, has_mask>(call, begin, end, c, out);
  for (; c + 2 * kLanes <= last; c += 2 * kLanes) sum_vectors<2, has_mask>(call, begin, end, c, out);
  for (; c < last; c += kLanes) sum_vectors<1, has_mask>(call, begin, end, c, out);
}

void column_sums(const ColumnSumsCall& call) {
  const int64_t blocks = row_blocks(call.rows), pieces = (call.cols + kPieceCols - 1) / kPieceCols;
  const int threads =
      call.rows * call.cols < kOneThreadCount ? 1 : static_cast<int>(call.num_threads);
  // A single block needs no partial sums.
  float* partials = blocks > 1 ? scratch.reserve(blocks * call.cols) : call.out;
  parallel(threads, [&](Worker worker) {
    const Range mine = share(blocks * pieces, 1, worker);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t block = i / pieces, first = i % pieces * kPieceCols;
      const int64_t begin = block * kBlockRows, end = std::min(call.rows, begin + kBlockRows);
      const int64_t last = std::min(call.cols, first + kPieceCols);
      float* out = partials + block * call.cols;
      if (call.mask) sum_block<true>(call, begin, end, first, last, out);
      else sum_block<false>(call, begin, end, first, last, out);
    }
    if (blocks == 1) return;
    worker.barrier();
    const Range columns = share(call.cols, kLineFloats, worker);
    add_by_pairs(partials, blocks, call.cols, columns.begin, columns.end, call.out);
  });
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_column_sums(const hotloop::ColumnSumsCall* call) {
  return hotloop::guarded([&] { hotloop::column_sums(*call); });
}
