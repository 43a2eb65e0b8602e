// Batch norm of a train step: forward by the statistics of the batch, and backward.
//
// Rows go in blocks that stay in the first-level cache. Each has its own mean and sum of squares about it, which are
// combined in double (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
// variances", 1979): no difference of large numbers, and the same with any number of threads.
#include <cmath>

#include "abi.h"
#include "error.h"
#include "parallel.h"
#include "row_sums.h"
#include "scratch.h"

namespace hotloop {
namespace {

// Fewer elements than so many are one thread's.
constexpr int64_t kOneThreadCount = 32768;
constexpr int64_t kBlockFloats = 4096, kLeastBlockRows = 16;
constexpr int64_t kPieceCols = 64;  // Columns that are combined at a time.

thread_local Scratch scratch;

// Blocks of rows, and two partial results of each for every column.
struct Blocks {
  int64_t rows, cols, block_rows, count;

  Blocks(int64_t rows, int64_t cols)
      : rows(rows), cols(cols),
        block_rows(std::max(kLeastBlockRows, kBlockFloats / std::max<int64_t>(cols, 1))),
        count((rows + block_rows - 1) / block_rows) {}

  int64_t begin(int64_t block) const { return block * block_rows; }
  int64_t rows_of(int64_t block) const { return std::min(rows - begin(block), block_rows); }
  int64_t partial_floats() const { return 2 * count * cols; }
  float* partial(float* partials, int64_t block, int term) const {
    return partials + (2 * block + term) * cols;
  }
  int threads(int64_t wanted) const {
    return rows * cols < kOneThreadCount ? 1 : static_cast<int>(wanted);
  }
};

void block_moments(const BatchNormCall& call, const Blocks& blocks, int64_t block, float* partials) {
  const int64_t rows = blocks.rows_of(block);
  const float inverse = 1.0f / static_cast<float>(rows);
  for_vectors(0, call.cols, [&](auto vectors, [[maybe_unused]] auto whole, int64_t c) {
    constexpr int V = decltype(vectors)::value;
    constexpr bool kWhole = decltype(whole)::value;
    const float* x = call.x + blocks.begin(block) * call.cols + c;
    const auto at = [&](int64_t row, int v) {
      return load<kWhole>(x + row * call.cols + v * kLanes, call.cols - c);
    };
    Vector mean[1][V], squares[1][V];
    sum_rows(rows, mean, [&](int64_t row, int v, Vector* value) { value[0] = at(row, v); });
    for (int v = 0; v < V; ++v) mean[0][v] *= inverse;
    sum_rows(rows, squares, [&](int64_t row, int v, Vector* value) {
      const Vector gap = at(row, v) - mean[0][v];
      value[0] = gap * gap;
    });
    for (int v = 0; v < V; ++v) {
      const int64_t to = c + v * kLanes;
      store<kWhole>(blocks.partial(partials, block, 0) + to, mean[0][v], call.cols - to);
      store<kWhole>(blocks.partial(partials, block, 1) + to, squares[0][v], call.cols - to);
    }
  });
}

// Mean and reciprocal deviation of columns [begin, end), at most kPieceCols, and the running ones.
void combine_moments(const BatchNormCall& call, const Blocks& blocks, float* partials,
                     int64_t begin, int64_t end) {
  double mean[kPieceCols] = {}, squares[kPieceCols] = {};
  const int64_t count = end - begin;
  const double rows = static_cast<double>(call.rows);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const double weight = static_cast<double>(blocks.rows_of(b)) / rows;
    const float* __restrict from = blocks.partial(partials, b, 0) + begin;
    for (int64_t c = 0; c < count; ++c) mean[c] += weight * from[c];
  }
  for (int64_t b = 0; b < blocks.count; ++b) {
    const double weight = static_cast<double>(blocks.rows_of(b));
    const float* __restrict means = blocks.partial(partials, b, 0) + begin;
    const float* __restrict from = blocks.partial(partials, b, 1) + begin;
    for (int64_t c = 0; c < count; ++c) {
      const double gap = means[c] - mean[c];
      squares[c] += from[c] + weight * gap * gap;
    }
  }
  for (int64_t c = 0; c < count; ++c) {
    const int64_t to = begin + c;
    call.mean[to] = static_cast<float>(mean[c]);
    call.rstd[to] = static_cast<float>(1 / std::sqrt(squares[c] / rows + call.epsilon));
    const auto run = [&](float& running, double now) {
      running = static_cast<float>(call.momentum * now + (1 - call.momentum) * running);
    };
    if (call.running_mean) run(call.running_mean[to], mean[c]);
    if (call.running_var) run(call.running_var[to], squares[c] / (rows - 1));
  }
}

template <bool has_addend, bool relu>
void normalize_block(const BatchNormCall& call, const Blocks& blocks, int64_t block) {
  const int64_t rows = blocks.rows_of(block), cols = call.cols;
  for_vectors(0, cols, [&](auto vectors, [[maybe_unused]] auto whole, int64_t c) {
    constexpr int V = decltype(vectors)::value;
    constexpr bool kWhole = decltype(whole)::value;
    const int64_t start = blocks.begin(block) * cols + c, left = cols - c;
    Vector mean[V], scale[V], bias[V] = {};
    for (int v = 0; v < V; ++v) {
      const int64_t at = c + v * kLanes;
      mean[v] = load<kWhole>(call.mean + at, left);
      scale[v] = load<kWhole>(call.rstd + at, left);
      if (call.weight) scale[v] *= load<kWhole>(call.weight + at, left);
      if (call.bias) bias[v] = load<kWhole>(call.bias + at, left);
    }
    for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t at = start + row * cols + v * kLanes;
        Vector value = (load<kWhole>(call.x + at, left) - mean[v]) * scale[v] + bias[v];
        if constexpr (has_addend) value += load<kWhole>(call.addend + at, left);
        if constexpr (relu) value = value < 0 ? Vector{} : value;  // NaN stays NaN, as in torch.
        store<kWhole>(call.out + at, value, left);
      }
  });
}

void batch_norm(const BatchNormCall& call) {
  const Blocks blocks(call.rows, call.cols);
  float* partials = scratch.reserve(blocks.partial_floats());
  const auto normalize = call.addend ? call.relu ? normalize_block<true, true> : normalize_block<true, false>
                         : call.relu ? normalize_block<false, true>
                                     : normalize_block<false, false>;
  parallel(blocks.threads(call.num_threads), [&](Worker worker) {
    const Range mine = share(blocks.count, 1, worker);
    for (int64_t b = mine.begin; b < mine.end; ++b) block_moments(call, blocks, b, partials);
    worker.barrier();
    const Range columns = share(call.cols, kLineFloats, worker);
    for (int64_t c = columns.begin; c < columns.end; c += kPieceCols)
      combine_moments(call, blocks, partials, c, std::min(columns.end, c + kPieceCols));
    worker.barrier();
    // Backwards: what was read last is still in a cache.
    for (int64_t b = mine.end; b-- > mine.begin;) normalize(call, blocks, b);
  });
}

// A block's part of the sums of g and of g (x - mean).
template <bool has_mask>
void block_sums(const BatchNormGradientCall& call, const Blocks& blocks, int64_t block, float* partials) {
  const int64_t rows = blocks.rows_of(block), cols = call.cols;
  for_vectors(0, cols, [&](auto vectors, [[maybe_unused]] auto whole, int64_t c) {
    constexpr int V = decltype(vectors)::value;
    constexpr bool kWhole = decltype(whole)::value;
    const int64_t start = blocks.begin(block) * cols + c, left = cols - c;
    Vector mean[V], sums[2][V];
    for (int v = 0; v < V; ++v) mean[v] = load<kWhole>(call.mean + c + v * kLanes, left);
    sum_rows(rows, sums, [&](int64_t row, int v, Vector* values) {
      const int64_t at = start + row * cols + v * kLanes;
      Vector g = load<kWhole>(call.gradient + at, left);
      if constexpr (has_mask) {
        g = load<kWhole>(call.mask + at, left) <= 0 ? Vector{} : g;
        if (call.masked_gradient) store<kWhole>(call.masked_gradient + at, g, left);
      }
      values[0] = g;
      values[1] = g * (load<kWhole>(call.x + at, left) - mean[v]);
    });
    for (int term = 0; term < 2; ++term)
      for (int v = 0; v < V; ++v) {
        const int64_t to = c + v * kLanes;
        store<kWhole>(blocks.partial(partials, block, term) + to, sums[term][v], cols - to);
      }
  });
}

// The gradients of weight and bias; level and slope: means of g and of g (x - mean) / variance.
void combine_sums(const BatchNormGradientCall& call, const Blocks& blocks, float* partials,
                  int64_t begin, int64_t end, float* level, float* slope) {
  double sums[kPieceCols] = {}, products[kPieceCols] = {};
  const int64_t count = end - begin;
  for (int64_t b = 0; b < blocks.count; ++b) {
    const float* __restrict from = blocks.partial(partials, b, 0) + begin;
    const float* __restrict also = blocks.partial(partials, b, 1) + begin;
    for (int64_t c = 0; c < count; ++c) sums[c] += from[c], products[c] += also[c];
  }
  const double rows = static_cast<double>(call.rows);
  for (int64_t c = 0; c < count; ++c) {
    const int64_t to = begin + c;
    const double rstd = call.rstd[to];
    level[to] = static_cast<float>(sums[c] / rows);
    slope[to] = static_cast<float>(products[c] * rstd * rstd / rows);
    if (call.weight_gradient) call.weight_gradient[to] = static_cast<float>(products[c] * rstd);
    if (call.bias_gradient) call.bias_gradient[to] = static_cast<float>(sums[c]);
  }
}

template <bool has_mask>
void input_gradient(const BatchNormGradientCall& call, const Blocks& blocks, int64_t block,
                    const float* gradient, const float* levels, const float* slopes) {
  const int64_t rows = blocks.rows_of(block), cols = call.cols;
  for_vectors(0, cols, [&](auto vectors, [[maybe_unused]] auto whole, int64_t c) {
    constexpr int V = decltype(vectors)::value;
    constexpr bool kWhole = decltype(whole)::value;
    const int64_t start = blocks.begin(block) * cols + c, left = cols - c;
    Vector mean[V], scale[V], level[V], slope[V];
    for (int v = 0; v < V; ++v) {
      const int64_t at = c + v * kLanes;
      mean[v] = load<kWhole>(call.mean + at, left);
      level[v] = load<kWhole>(levels + at, left);
      slope[v] = load<kWhole>(slopes + at, left);
      scale[v] = load<kWhole>(call.rstd + at, left);
      if (call.weight) scale[v] *= load<kWhole>(call.weight + at, left);
    }
    for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t at = start + row * cols + v * kLanes;
        Vector g = load<kWhole>(gradient + at, left);
        if constexpr (has_mask) g = load<kWhole>(call.mask + at, left) <= 0 ? Vector{} : g;
        const Vector gap = load<kWhole>(call.x + at, left) - mean[v];
        store<kWhole>(call.input_gradient + at, (g - level[v] - gap * slope[v]) * scale[v], left);
      }
  });
}

void batch_norm_gradient(const BatchNormGradientCall& call) {
  const Blocks blocks(call.rows, call.cols);
  float* partials = scratch.reserve(blocks.partial_floats() + 2 * call.cols);
  float* level = partials + blocks.partial_floats();
  float* slope = level + call.cols;
  const auto sum = call.mask ? block_sums<true> : block_sums<false>;
  // Once masked, the gradient needs no mask.
  const bool masks = call.mask && !call.masked_gradient;
  const auto finish = masks ? input_gradient<true> : input_gradient<false>;
  const float* gradient = call.mask && !masks ? call.masked_gradient : call.gradient;
  parallel(blocks.threads(call.num_threads), [&](Worker worker) {
    const Range mine = share(blocks.count, 1, worker);
    for (int64_t b = mine.begin; b < mine.end; ++b) sum(call, blocks, b, partials);
    worker.barrier();
    const Range columns = share(call.cols, kLineFloats, worker);
    for (int64_t c = columns.begin; c < columns.end; c += kPieceCols)
      combine_sums(call, blocks, partials, c, std::min(columns.end, c + kPieceCols), level, slope);
    worker.barrier();
    if (!call.input_gradient) return;
    for (int64_t b = mine.end; b-- > mine.begin;)
      finish(call, blocks, b, gradient, level, slope);
  });
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_batch_norm(const hotloop::BatchNormCall* call) {
  return hotloop::guarded([&] { hotloop::batch_norm(*call); });
}

HOTLOOP_EXPORT int32_t hotloop_batch_norm_gradient(const hotloop::BatchNormGradientCall* call) {
  return hotloop::guarded([&] { hotloop::batch_norm_gradient(*call); });
}
