// Images from one layout to the other.
#pragma once

#include <cstdint>

namespace hotloop {

// [batch, channels, pixels] to dense [batch, pixels, channels]; strides of `from` in elements, its pixels
// adjacent.
void nchw_to_nhwc(const float* from, int64_t batch, int64_t channels, int64_t pixels,
                  int64_t n_stride, int64_t c_stride, float* to, int threads);

// Dense [batch, pixels, channels] to dense [batch, channels, pixels].
void nhwc_to_nchw(const float* from, int64_t batch, int64_t channels, int64_t pixels, float* to,
                  int threads);

}  // namespace hotloop
