// Max pooling of dense planes with the indices that torch's operator gives: without a branch that is taken at random.
#include "error.h"
#include "gemm.h"
#include "parallel.h"

namespace hotloop {
namespace {

// The window whose result is at (oh, ow). The last of several NaN wins, else the first of equal values.
void pool_window(const Windows& s, const float* plane, int64_t oh, int64_t ow, float* value,
                 int64_t* index) {
  const int64_t h = oh * s.stride_h - s.pad_h, w = ow * s.stride_w - s.pad_w;
  const int64_t bottom = std::min(h + s.kernel_h, s.height), right = std::min(w + s.kernel_w, s.width);
  const int64_t top = std::max<int64_t>(h, 0), left = std::max<int64_t>(w, 0);
  int64_t place = top * s.width + left;
  float best = plane[place];
  for (int64_t i = top; i < bottom; ++i)
    for (int64_t j = left; j < right; ++j) {
      const float next = plane[i * s.width + j];
      const bool takes = next > best || next != next;
      best = takes ? next : best;
      place = takes ? i * s.width + j : place;
    }
  *value = best;
  *index = place;
}

// A row of windows of 2 x 2 side by side: the usual one, in vectors.
void pool_row_2x2(const float* top, const float* below, int64_t first, int64_t width, int64_t count,
                  float* value, int64_t* index) {
  for (int64_t ow = 0; ow < count; ++ow) {
    const float a = top[2 * ow], b = top[2 * ow + 1], c = below[2 * ow], d = below[2 * ow + 1];
    float best = a;
    int32_t place = 0;
    const int32_t down = static_cast<int32_t>(width);
    bool takes = b > best || b != b;
    best = takes ? b : best, place = takes ? 1 : place;
    takes = c > best || c != c;
    best = takes ? c : best, place = takes ? down : place;
    takes = d > best || d != d;
    best = takes ? d : best, place = takes ? down + 1 : place;
    value[ow] = best;
    index[ow] = first + 2 * ow + place;
  }
}

void pool_planes(const PoolPlanesCall& call) {
  const Windows& s = call.windows;
  const int64_t OH = s.output_height, OW = s.output_width, rows = s.batch * s.channels * OH;
  const bool is_2x2 = s.kernel_h == 2 && s.kernel_w == 2 && s.stride_h == 2 && s.stride_w == 2 &&
                      s.pad_h == 0 && s.pad_w == 0;
  const double work = static_cast<double>(rows) * static_cast<double>(OW * s.kernel_h * s.kernel_w);
  parallel(work < kOneThreadWork ? 1 : static_cast<int>(call.num_threads), [&](Worker worker) {
    const Range mine = share(rows, 1, worker);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const float* plane = call.input + row / OH * s.height * s.width;
      float* value = call.output + row * OW;
      int64_t* index = call.indices + row * OW;
      const int64_t oh = row % OH;
      if (is_2x2) {
        const int64_t first = 2 * oh * s.width;
        pool_row_2x2(plane + first, plane + first + s.width, first, s.width, OW, value, index);
      } else {
        for (int64_t ow = 0; ow < OW; ++ow) pool_window(s, plane, oh, ow, value + ow, index + ow);
      }
    }
  });
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_pool_planes(const hotloop::PoolPlanesCall* call) {
  return hotloop::guarded([&] { hotloop::pool_planes(*call); });
}
