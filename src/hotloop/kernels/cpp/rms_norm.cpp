// RMS norm of a train step, forward and backward, and sums of rows.
#include <cmath>
#include <cstring>

#include "abi.h"
#include "error.h"
#include "parallel.h"
#include "partial_sums.h"
#include "scratch.h"

namespace hotloop {
namespace {

// Fewer elements than so many are one thread's.
constexpr int64_t kOneThreadCount = 32768;

thread_local Scratch scratch;

int threads_for(int64_t count, int64_t num_threads) {
  return count < kOneThreadCount ? 1 : static_cast<int>(num_threads);
}

// The sum of term(c) over the vectors of a row, which are 0 beyond its end; of each block by itself, so that a long
// row is no long chain of additions.
template <class Term>
float sum_row(int64_t count, const Term& term) {
  constexpr int64_t kBlock = 128 * kLanes;
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    Vector sums[2] = {};
    int64_t c = begin;
    for (; c + 2 * kLanes <= end; c += 2 * kLanes) {
      sums[0] += term(c);
      sums[1] += term(c + kLanes);
    }
    for (; c < end; c += kLanes) sums[0] += term(c);
    total += sum_of(sums[0] + sums[1]);
  }
  return static_cast<float>(total);
}

void rms_norm(const RmsNormCall& call) {
  const int64_t cols = call.cols;
  parallel_for(threads_for(call.rows * cols, call.num_threads), call.rows, [&](int64_t row) {
    const float* x = call.x + row * cols;
    const float squares = sum_row(cols, [&](int64_t c) {
      const Vector value = load(x + c, cols - c);
      return value * value;
    });
    const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(cols) + call.epsilon);
    if (call.rstd) call.rstd[row] = rstd;
    for (int64_t c = 0; c < cols; c += kLanes) {
      Vector value = load(x + c, cols - c) * rstd;
      if (call.weight) value *= load(call.weight + c, cols - c);
      store(call.out + row * cols + c, value, cols - c);
    }
  });
}

// rstd (g - normal mean(g normal)), g = gradient * weight and normal = x rstd.
void input_gradient_row(const RmsNormGradientCall& call, int64_t row) {
  const int64_t cols = call.cols;
  const float *x = call.x + row * cols, *gradient = call.gradient + row * cols;
  const float rstd = call.rstd[row];
  const auto weighted = [&](int64_t c) {
    const Vector g = load(gradient + c, cols - c);
    return call.weight ? g * load(call.weight + c, cols - c) : g;
  };
  const float slope =
      sum_row(cols, [&](int64_t c) { return weighted(c) * (load(x + c, cols - c) * rstd); }) /
      static_cast<float>(cols);
  for (int64_t c = 0; c < cols; c += kLanes)
    store(call.input_gradient + row * cols + c,
          rstd * (weighted(c) - load(x + c, cols - c) * rstd * slope), cols - c);
}

void add_row(const RmsNormGradientCall& call, int64_t row, float* __restrict sums) {
  const float *x = call.x + row * call.cols, *gradient = call.gradient + row * call.cols;
  const float rstd = call.rstd[row];
#pragma omp simd
  for (int64_t c = 0; c < call.cols; ++c) sums[c] += gradient[c] * (x[c] * rstd);
}

void rms_norm_gradient(const RmsNormGradientCall& call) {
  const int64_t blocks = row_blocks(call.rows), cols = call.cols;
  float* sums = call.weight_gradient ? scratch.reserve(blocks * cols) : nullptr;
  parallel(threads_for(call.rows * cols, call.num_threads), [&](Worker worker) {
    const Range mine = share(blocks, 1, worker);
    for (int64_t block = mine.begin; block < mine.end; ++block) {
      if (sums) std::memset(sums + block * cols, 0, static_cast<size_t>(cols) * sizeof(float));
      const int64_t end = std::min(call.rows, (block + 1) * kBlockRows);
      for (int64_t row = block * kBlockRows; row < end; ++row) {
        if (sums) add_row(call, row, sums + block * cols);
        if (call.input_gradient) input_gradient_row(call, row);
      }
    }
    if (!sums) return;
    worker.barrier();
    const Range columns = share(cols, kLineFloats, worker);
    add_by_pairs(sums, blocks, cols, columns.begin, columns.end, call.weight_gradient);
  });
}

void row_sums(const RowSumsCall& call) {
  const int64_t cols = call.cols;
  parallel_for(threads_for(call.rows * cols, call.num_threads), call.rows, [&](int64_t row) {
    const float* x = call.x + row * cols;
    call.out[row] = sum_row(cols, [&](int64_t c) { return load(x + c, cols - c); }) / call.divisor;
  });
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_rms_norm(const hotloop::RmsNormCall* call) {
  return hotloop::guarded([&] { hotloop::rms_norm(*call); });
}

HOTLOOP_EXPORT int32_t hotloop_rms_norm_gradient(const hotloop::RmsNormGradientCall* call) {
  return hotloop::guarded([&] { hotloop::rms_norm_gradient(*call); });
}

HOTLOOP_EXPORT int32_t hotloop_row_sums(const hotloop::RowSumsCall* call) {
  return hotloop::guarded([&] { hotloop::row_sums(*call); });
}
