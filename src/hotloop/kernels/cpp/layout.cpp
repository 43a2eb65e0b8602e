#include "layout.h"

#include "pack.h"
#include "parallel.h"

namespace hotloop {
namespace {

// Fewer elements than so many are copied by one thread.
constexpr int64_t kOneThreadCount = 25'000;

}  // namespace

void nchw_to_nhwc(const float* from, int64_t batch, int64_t channels, int64_t pixels,
                  int64_t n_stride, int64_t c_stride, float* to, int threads) {
  if (batch * channels * pixels < kOneThreadCount) threads = 1;
  parallel_for(threads, batch, [&](int64_t n) {
    transpose(from + n * n_stride, c_stride, channels, pixels, to + n * channels * pixels,
              channels);
  });
}

void nhwc_to_nchw(const float* from, int64_t batch, int64_t channels, int64_t pixels, float* to,
                  int threads) {
  nchw_to_nhwc(from, batch, pixels, channels, pixels * channels, channels, to, threads);
}

}  // namespace hotloop
