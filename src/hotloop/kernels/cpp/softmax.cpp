// softmax of a train step, forward and backward.
#include "softmax.h"

#include "abi.h"
#include "error.h"
#include "parallel.h"

namespace hotloop {
namespace {

// Fewer elements than so many are one thread's.
constexpr int64_t kOneThreadCount = 32768;

int threads_for(int64_t count, int64_t num_threads) {
  return count < kOneThreadCount ? 1 : static_cast<int>(num_threads);
}

void softmax(const SoftmaxCall& call) {
  parallel_for(threads_for(call.rows * call.cols, call.num_threads), call.rows, [&](int64_t row) {
    const int64_t at = row * call.cols;
    constexpr float kLeast = -std::numeric_limits<float>::infinity();
    if (call.is_safe && greatest(call.x + at, call.cols, 1) == kLeast)
      std::fill_n(call.out + at, call.cols, 0.0f);
    else
      softmax_row(call.x + at, call.cols, 1, call.logarithm, call.out + at);
  });
}

// y (g - sum of g y), or g - e^y sum of g where y is a logarithm.
template <bool logarithm>
void gradient_row(const float* y, const float* g, int64_t count, float* out) {
  Vector sums{};
  for (int64_t c = 0; c < count; c += kLanes) {
    const Vector value = load(g + c, count - c);
    sums += logarithm ? value : value * load(y + c, count - c);
  }
  const float sum = sum_of(sums);
  for (int64_t c = 0; c < count; c += kLanes) {
    const Vector result = load(y + c, count - c), value = load(g + c, count - c);
    store(out + c, logarithm ? value - exponential(result) * sum : result * (value - sum),
          count - c);
  }
}

void softmax_gradient(const SoftmaxGradientCall& call) {
  parallel_for(threads_for(call.rows * call.cols, call.num_threads), call.rows, [&](int64_t row) {
    const int64_t at = row * call.cols;
    const float *y = call.result + at, *g = call.gradient + at;
    if (call.logarithm) gradient_row<true>(y, g, call.cols, call.input_gradient + at);
    else gradient_row<false>(y, g, call.cols, call.input_gradient + at);
  });
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_softmax(const hotloop::SoftmaxCall* call) {
  return hotloop::guarded([&] { hotloop::softmax(*call); });
}

HOTLOOP_EXPORT int32_t hotloop_softmax_gradient(const hotloop::SoftmaxGradientCall* call) {
  return hotloop::guarded([&] { hotloop::softmax_gradient(*call); });
}
