// Losses and their gradients, in one pass over what a model has made.
#include <string>

#include "abi.h"
#include "error.h"
#include "parallel.h"
#include "scratch.h"
#include "softmax.h"

namespace hotloop {
namespace {

// Fewer elements than so many are one thread's.
constexpr int64_t kOneThreadCount = 32768;
// Elements whose squares are summed in float32; the sums of these blocks are added in float64.
constexpr int64_t kBlock = 2048;

thread_local Scratch scratch;

int threads_for(int64_t count, int64_t num_threads) {
  return count < kOneThreadCount ? 1 : static_cast<int>(num_threads);
}

bool is_ignored(const CrossEntropyCall& call, int64_t row) {
  return call.labels[row] == call.ignore_index;
}

float weight_of(const CrossEntropyCall& call, int64_t row) {
  if (is_ignored(call, row)) return 0;
  return call.weights ? call.weights[call.labels[row]] : 1.0f;
}

void check_labels(const CrossEntropyCall& call) {
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t label = call.labels[row];
    if (is_ignored(call, row) || (label >= 0 && label < call.classes)) continue;
    throw Error("labels must be in [0, " + std::to_string(call.classes) +
                ") (got: " + std::to_string(label) + " in row " + std::to_string(row) + ")");
  }
}

// The loss of a row; `factor` times its gradient goes to `gradient`.
float cross_entropy_row(const CrossEntropyCall& call, int64_t row, float factor) {
  const int64_t classes = call.classes, label = call.labels[row];
  const float* x = call.logits + row * call.row_stride;
  float* gradient = call.gradient ? call.gradient + row * call.gradient_row_stride : nullptr;
  const float top = greatest(x, classes, 1);
  const float gap = is_ignored(call, row) ? 0 : x[label] - top;
  float sum;
  if (gradient) {
    sum = sum_exponentials<true>(x, classes, 1, top, gradient);
    const float each = factor / sum;
    for (int64_t c = 0; c < classes; c += kLanes)
      store(gradient + c, load(gradient + c, classes - c) * each, classes - c);
    if (!is_ignored(call, row)) gradient[label] -= factor;
  } else {
    sum = sum_exponentials<false>(x, classes, 1, top, nullptr);
  }
  return is_ignored(call, row) ? 0 : weight_of(call, row) * (std::log(sum) - gap);
}

void cross_entropy(const CrossEntropyCall& call) {
  check_labels(call);
  double total = 1;
  if (call.reduction == 0) {
    total = 0;
    for (int64_t row = 0; row < call.rows; ++row) total += weight_of(call, row);
  }
  float* losses = scratch.reserve(call.rows);
  parallel_for(threads_for(call.rows * call.classes, call.num_threads), call.rows,
               [&](int64_t row) {
                 // A row that is ignored has no gradient even where nothing counts.
                 const float factor = is_ignored(call, row)
                                          ? 0
                                          : float(weight_of(call, row) * call.scale / total);
                 losses[row] = cross_entropy_row(call, row, factor);
               });
  double sum = 0;
  for (int64_t row = 0; row < call.rows; ++row) sum += losses[row];
  *call.loss = static_cast<float>(sum / total);
}

// The sum of squares of [begin, end), and the gradient.
float squared_error_block(const SquaredErrorCall& call, int64_t begin, int64_t end, float factor) {
  constexpr int kChains = 4;
  Vector sums[kChains] = {};
  const auto add = [&](int64_t i, Vector& sum) {
    const Vector gap = load(call.output + i, end - i) - load(call.target + i, end - i);
    sum += gap * gap;
    if (call.gradient) store(call.gradient + i, gap * factor, end - i);
  };
  int64_t i = begin;
  for (; i + kChains * kLanes <= end; i += kChains * kLanes)
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) add(i + chain * kLanes, sums[chain]);
  for (; i < end; i += kLanes) add(i, sums[0]);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void squared_error(const SquaredErrorCall& call) {
  const double total = call.reduction == 0 ? static_cast<double>(call.count) : 1;
  const float factor = static_cast<float>(2.0 * call.scale / total);
  const int64_t blocks = (call.count + kBlock - 1) / kBlock;
  float* sums = scratch.reserve(blocks);
  parallel_for(threads_for(call.count, call.num_threads), blocks, [&](int64_t block) {
    const int64_t begin = block * kBlock;
    sums[block] =
        squared_error_block(call, begin, std::min(call.count, begin + kBlock), factor);
  });
  double sum = 0;
  for (int64_t block = 0; block < blocks; ++block) sum += sums[block];
  *call.loss = static_cast<float>(sum / total);
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_cross_entropy(const hotloop::CrossEntropyCall* call) {
  return hotloop::guarded([&] { hotloop::cross_entropy(*call); });
}

HOTLOOP_EXPORT int32_t hotloop_squared_error(const hotloop::SquaredErrorCall* call) {
  return hotloop::guarded([&] { hotloop::squared_error(*call); });
}
