// Rows of a table by their numbers, and the gradient of the table.
#include <cstring>
#include <string>

#include "abi.h"
#include "error.h"
#include "parallel.h"
#include "vector.h"

namespace hotloop {
namespace {

// Fewer elements than so many are one thread's.
constexpr int64_t kOneThreadCount = 32768;
// A thread's part of each row has at least so many columns; else threads share the rows of the table.
constexpr int64_t kLeastCols = 64;

int threads_for(int64_t count, int64_t num_threads) {
  return count < kOneThreadCount ? 1 : static_cast<int>(num_threads);
}

void check_indices(const int64_t* indices, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    if (indices[i] < 0 || indices[i] >= rows)
      throw Error("indices of an embedding must be in [0, " + std::to_string(rows) + ") (got: " +
                  std::to_string(indices[i]) + " at place " + std::to_string(i) + ")");
}

void embedding(const EmbeddingCall& call) {
  check_indices(call.indices, call.count, call.rows);
  if (call.cols == 0) return;
  const size_t bytes = static_cast<size_t>(call.cols) * sizeof(float);
  const auto row_of = [&](int64_t i) { return call.table + call.indices[i] * call.table_row_stride; };
  parallel_for(threads_for(call.count * call.cols, call.num_threads), call.count, [&](int64_t i) {
    if (i + 1 < call.count)
      for (int64_t c = 0; c < call.cols; c += kLineFloats) __builtin_prefetch(row_of(i + 1) + c);
    std::memcpy(call.out + i * call.cols, row_of(i), bytes);
  });
}

// These columns of these rows of the table: added in the order of the indices, whoever makes them.
void add_rows(const EmbeddingGradientCall& call, Range rows, Range cols) {
  const int64_t count = cols.end - cols.begin;
  if (count <= 0) return;
  for (int64_t row = rows.begin; row < rows.end; ++row)
    std::memset(call.table_gradient + row * call.cols + cols.begin, 0,
                static_cast<size_t>(count) * sizeof(float));
  for (int64_t i = 0; i < call.count; ++i) {
    const int64_t row = call.indices[i];
    if (row < rows.begin || row >= rows.end || row == call.padding_index) continue;
    float* __restrict to = call.table_gradient + row * call.cols + cols.begin;
    const float* __restrict from = call.gradient + i * call.gradient_row_stride + cols.begin;
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) to[c] += from[c];
  }
}

void embedding_gradient(const EmbeddingGradientCall& call) {
  check_indices(call.indices, call.count, call.rows);
  const int64_t work = std::max(call.count, call.rows) * call.cols;
  parallel(threads_for(work, call.num_threads), [&](Worker worker) {
    const Range all_rows{0, call.rows}, all_cols{0, call.cols};
    // Parts of columns are equal work; rows are not where some indices are frequent.
    if (call.cols >= worker.count * kLeastCols)
      add_rows(call, all_rows, share(call.cols, kLineFloats, worker));
    else add_rows(call, share(call.rows, 1, worker), all_cols);
  });
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_embedding(const hotloop::EmbeddingCall* call) {
  return hotloop::guarded([&] { hotloop::embedding(*call); });
}

HOTLOOP_EXPORT int32_t hotloop_embedding_gradient(const hotloop::EmbeddingGradientCall* call) {
  return hotloop::guarded([&] { hotloop::embedding_gradient(*call); });
}
