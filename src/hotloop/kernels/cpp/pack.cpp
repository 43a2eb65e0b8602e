#include "pack.h"

namespace hotloop {

void pack(const float* from, int64_t row_stride, int64_t depth_stride, int64_t rows, int64_t depth,
          float* to, int64_t width) {
  if (row_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      float* line = to + k * width;
      std::memcpy(line, from + k * depth_stride, static_cast<size_t>(rows) * sizeof(float));
      for (int64_t r = rows; r < width; ++r) line[r] = 0;
    }
    return;
  }
  int64_t done = 0;
#if defined(__AVX__)
  if (depth_stride == 1) {
    for (; done + 8 <= rows; done += 8) {
      int64_t k = 0;
      for (; k + 8 <= depth; k += 8)
        transpose8x8(from + done * row_stride + k, row_stride, to + k * width + done, width);
      for (; k < depth; ++k)
        for (int64_t r = done; r < done + 8; ++r) to[k * width + r] = from[r * row_stride + k];
    }
  }
#endif
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t r = done; r < rows; ++r)
      to[k * width + r] = from[r * row_stride + k * depth_stride];
    for (int64_t r = rows; r < width; ++r) to[k * width + r] = 0;
  }
}

}  // namespace hotloop
