// The mean over the pixels of images whose channels are adjacent, and its gradient.
#include "abi.h"
#include "error.h"
#include "parallel.h"
#include "row_sums.h"

namespace hotloop {
namespace {

// Fewer elements than so many are one thread's.
constexpr int64_t kOneThreadCount = 32768;
constexpr int64_t kBlockPixels = 64;  // Sums of so many are added up by themselves.

int threads_for(int64_t count, int64_t num_threads) {
  return count < kOneThreadCount ? 1 : static_cast<int>(num_threads);
}

void image_means(const ImageMeansCall& call) {
  const int64_t cols = call.cols, image = call.pixels * cols;
  parallel_for(threads_for(call.images * image, call.num_threads), call.images, [&](int64_t n) {
    for_vectors(0, cols, [&](auto vectors, [[maybe_unused]] auto whole, int64_t c) {
      constexpr int V = decltype(vectors)::value;
    constexpr bool kWhole = decltype(whole)::value;
      Vector total[V] = {};
      for (int64_t p = 0; p < call.pixels; p += kBlockPixels) {
        const float* from = call.x + n * image + p * cols + c;
        Vector sums[1][V];
        sum_rows(std::min(kBlockPixels, call.pixels - p), sums,
                 [&](int64_t row, int v, Vector* value) {
                   value[0] = load<kWhole>(from + row * cols + v * kLanes, cols - c);
                 });
        for (int v = 0; v < V; ++v) total[v] += sums[0][v];
      }
      for (int v = 0; v < V; ++v)
        store<kWhole>(call.out + n * cols + c + v * kLanes, total[v] / call.divisor, cols - c);
    });
  });
}

template <bool has_mask>
void spread_image(const ImageMeansGradientCall& call, int64_t n) {
  const int64_t cols = call.cols;
  for_vectors(0, cols, [&](auto vectors, [[maybe_unused]] auto whole, int64_t c) {
    constexpr int V = decltype(vectors)::value;
    constexpr bool kWhole = decltype(whole)::value;
    const int64_t left = cols - c;
    Vector value[V];
    for (int v = 0; v < V; ++v)
      value[v] = load<kWhole>(call.gradient + n * call.gradient_row_stride + c + v * kLanes, left) / call.divisor;
    for (int64_t p = 0; p < call.pixels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t at = (n * call.pixels + p) * cols + c + v * kLanes;
        Vector g = value[v];
        if constexpr (has_mask) g = load<kWhole>(call.mask + at, left) <= 0 ? Vector{} : g;
        store<kWhole>(call.out + at, g, left);
      }
  });
}

void image_means_gradient(const ImageMeansGradientCall& call) {
  const auto spread = call.mask ? spread_image<true> : spread_image<false>;
  parallel_for(threads_for(call.images * call.pixels * call.cols, call.num_threads), call.images,
               [&](int64_t n) { spread(call, n); });
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_image_means(const hotloop::ImageMeansCall* call) {
  return hotloop::guarded([&] { hotloop::image_means(*call); });
}

HOTLOOP_EXPORT int32_t hotloop_image_means_gradient(const hotloop::ImageMeansGradientCall* call) {
  return hotloop::guarded([&] { hotloop::image_means_gradient(*call); });
}
