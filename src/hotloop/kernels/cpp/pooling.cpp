#include "pooling.h"

#include <limits>

#include "epilogue.h"
#include "error.h"
#include "gemm.h"
#include "running_max.h"

namespace hotloop {
namespace {

thread_local Scratch row_scratch;

// What one window covers of an image.
struct Window {
  int64_t h, w;  // Where it begins, in the padding too.
  int64_t top, bottom, left, right;

  Window(const Windows& s, int64_t oh, int64_t ow)
      : h(oh * s.stride_h - s.pad_h), w(ow * s.stride_w - s.pad_w), top(std::max<int64_t>(h, 0)),
        bottom(std::min(h + s.kernel_h, s.height)), left(std::max<int64_t>(w, 0)),
        right(std::min(w + s.kernel_w, s.width)) {}

  // Calls body(i, j, place in the window) for each pixel but the first.
  template <class Body>
  void for_others(int64_t kernel_w, const Body& body) const {
    for (int64_t i = top; i < bottom; ++i)
      for (int64_t j = i == top ? left + 1 : left; j < right; ++j)
        body(i, j, static_cast<int32_t>((i - h) * kernel_w + (j - w)));
  }

  int32_t first(int64_t kernel_w) const {
    return static_cast<int32_t>((top - h) * kernel_w + (left - w));
  }

  bool is_empty() const { return top >= bottom || left >= right; }

  bool is_2x2() const { return bottom - top == 2 && right - left == 2 && top == h && left == w; }
};

// The maximum of a window; value(i, j) reads a pixel.
template <class Of, bool kArgmax, class Read>
inline RunningMax<Of, kArgmax> largest(const Windows& s, const Window& window, const Read& value) {
  if (window.is_empty())
    return {typename Of::Value{} - std::numeric_limits<float>::infinity(), 0};
  RunningMax<Of, kArgmax> most(value(window.top, window.left), window.first(s.kernel_w));
  if (s.kernel_w == 2 && window.is_2x2()) {  // The usual one, without loops.
    most.take(value(window.top, window.left + 1), 1);
    most.take(value(window.top + 1, window.left), 2);
    most.take(value(window.top + 1, window.left + 1), 3);
    return most;
  }
  window.for_others(s.kernel_w,
                    [&](int64_t i, int64_t j, int32_t at) { most.take(value(i, j), at); });
  return most;
}

template <int activation, class Of, bool kArgmax>
inline void finish(RunningMax<Of, kArgmax>& most) {
  if constexpr (kArgmax && activation == kRelu) most.relu();
  else if constexpr (std::is_same_v<Of, OneValue>)
    most.best = activate<activation>(Vector{} + most.best)[0];
  else most.best = activate<activation>(most.best);
}

// One row of results, whose images have their channels adjacent: to[ow][channel].
template <bool kArgmax, int activation>
void pool_adjacent(const PoolCall& call, int64_t n, int64_t oh, float* to, uint8_t* argmax) {
  const Windows& s = call.windows;
  const ImageStrides& x = call.input_strides;
  const float* image = call.input + n * x.n;
  for (int64_t ow = 0; ow < s.output_width; ++ow, to += s.channels) {
    const Window window(s, oh, ow);
    for (int64_t c = 0; c < s.channels; c += kLanes) {
      const int64_t count = s.channels - c;
      auto most = largest<LaneByLane, kArgmax>(s, window, [&](int64_t i, int64_t j) {
        return load(image + i * x.h + j * x.w + c, count);
      });
      finish<activation>(most);
      store(to + c, most.best, count);
      if constexpr (kArgmax) store_bytes(argmax + ow * s.channels + c, most.place, count);
    }
  }
}

// The same, however images lie: result (c, ow) goes to to[c * c_stride + ow * w_stride].
template <bool kArgmax, int activation>
void pool_strided(const PoolCall& call, int64_t n, int64_t oh, float* to, int64_t c_stride,
                  int64_t w_stride, uint8_t* argmax) {
  const Windows& s = call.windows;
  const ImageStrides& x = call.input_strides;
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t ow = 0; ow < s.output_width; ++ow) {
      const float* image = call.input + n * x.n + c * x.c;
      auto most = largest<OneValue, kArgmax>(
          s, Window(s, oh, ow), [&](int64_t i, int64_t j) { return image[i * x.h + j * x.w]; });
      finish<activation>(most);
      to[c * c_stride + ow * w_stride] = most.best;
      if constexpr (kArgmax)
        argmax[c * s.output_height * s.output_width + ow] = static_cast<uint8_t>(most.place);
    }
}

template <bool kArgmax, int activation>
void pool_images(const PoolCall& call, int threads) {
  const Windows& s = call.windows;
  const int64_t C = s.channels, OH = s.output_height, OW = s.output_width;
  const bool adjacent = call.input_strides.c == 1;
  // A row of results, channels adjacent, where the output wants them in planes.
  const Pieces rows(row_scratch, adjacent && !call.channels_last ? OW * C : 0, threads);
  parallel(threads, [&](Worker worker) {
    const Range mine = share(s.batch * OH, 1, worker);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const int64_t n = row / OH, oh = row % OH;
      const int64_t last_at = row * OW * C, first_at = (n * C * OH + oh) * OW;
      float* out = call.output + (call.channels_last ? last_at : first_at);
      uint8_t* argmax = kArgmax ? call.argmax + (adjacent ? last_at : first_at) : nullptr;
      if (!adjacent) {
        const int64_t c_stride = call.channels_last ? 1 : OH * OW;
        pool_strided<kArgmax, activation>(call, n, oh, out, c_stride, call.channels_last ? C : 1,
                                          argmax);
        continue;
      }
      float* to = call.channels_last ? out : rows.of(worker.index);
      pool_adjacent<kArgmax, activation>(call, n, oh, to, argmax);
      if (!call.channels_last) transpose(to, C, OW, C, out, OH * OW);
    }
  });
}

// What no window covers, of the rows from `top` on, gets no gradient.
void clear_rest(const PoolBackwardCall& call, float* top, int64_t rows, int64_t from) {
  const Windows& s = call.windows;
  const ImageStrides& x = call.input_gradient_strides;
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t w = from; w < s.width; ++w) top[c * x.c + r * x.h + w * x.w] = 0;
}

// A row of the output's gradient with its channels adjacent: as it lies, or copied to `buffer`.
const float* gradient_row(const PoolBackwardCall& call, const float* from, float* buffer) {
  const Windows& s = call.windows;
  const ImageStrides& g = call.gradient_strides;
  if (g.c == 1 && g.w == s.channels) return from;
  if (g.w == 1) {
    transpose(from, g.c, s.channels, s.output_width, buffer, s.channels);
  } else {
    for (int64_t ow = 0; ow < s.output_width; ++ow)
      for (int64_t c = 0; c < s.channels; ++c)
        buffer[ow * s.channels + c] = from[c * g.c + ow * g.w];
  }
  return buffer;
}

// One row of windows, channels adjacent.
void spread_adjacent(const PoolBackwardCall& call, const float* gradient, const uint8_t* argmax,
                     float* top) {
  const Windows& s = call.windows;
  const ImageStrides& x = call.input_gradient_strides;
  for (int64_t r = 0; r < s.kernel_h; ++r)
    for (int64_t ow = 0; ow < s.output_width; ++ow)
      for (int64_t k = 0; k < s.kernel_w; ++k) {
        const int32_t at = static_cast<int32_t>(r * s.kernel_w + k);
        float* to = top + r * x.h + (ow * s.kernel_w + k) * x.w;
        for (int64_t c = 0; c < s.channels; c += kLanes) {
          const int64_t i = ow * s.channels + c, count = s.channels - c;
          const Words place = load_bytes(argmax + i, count);
          store(to + c, place == at ? load(gradient + i, count) : Vector{}, count);
        }
      }
}

void spread_strided(const PoolBackwardCall& call, int64_t n, int64_t oh, float* top) {
  const Windows& s = call.windows;
  const ImageStrides &x = call.input_gradient_strides, &g = call.gradient_strides;
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t ow = 0; ow < s.output_width; ++ow) {
      const int64_t at = ((n * s.channels + c) * s.output_height + oh) * s.output_width + ow;
      const float gradient = call.gradient[n * g.n + c * g.c + oh * g.h + ow * g.w];
      float* to = top + c * x.c + ow * s.kernel_w * x.w;
      const int64_t place = call.argmax[at];
      const float either[2] = {0.0f, gradient};  // A branch would be taken at random.
      for (int64_t r = 0, p = 0; r < s.kernel_h; ++r)
        for (int64_t k = 0; k < s.kernel_w; ++k, ++p)
          to[r * x.h + k * x.w] = either[place == p];
    }
}

}  // namespace

void pool(const PoolCall& call) {
  const Windows& s = call.windows;
  const double work = static_cast<double>(s.batch) * s.channels * s.output_height *
                      s.output_width * s.kernel_h * s.kernel_w;
  const int threads = work < kOneThreadWork ? 1 : static_cast<int>(call.num_threads);
  Epilogue{nullptr, nullptr, nullptr, call.activation}.with_kind([&](auto kind) {
    constexpr int activation = decltype(kind)::kActivation;
    if (!call.argmax) pool_images<false, activation>(call, threads);
    else if constexpr (activation <= kRelu) pool_images<true, activation>(call, threads);
    else throw Error("an argmax of pooling needs relu or no activation");
  });
}

void pool_backward(const PoolBackwardCall& call) {
  const Windows& s = call.windows;
  const ImageStrides &x = call.input_gradient_strides, &g = call.gradient_strides;
  const int64_t C = s.channels, OH = s.output_height, OW = s.output_width;
  const int64_t rows = OH + (OH * s.kernel_h < s.height);
  const int threads = static_cast<double>(s.batch) * C * s.height * s.width < kOneThreadWork
                          ? 1
                          : static_cast<int>(call.num_threads);
  const Pieces buffers(row_scratch, OW * C, threads);
  parallel(threads, [&](Worker worker) {
    const Range mine = share(s.batch * rows, 1, worker);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const int64_t n = row / rows, oh = row % rows;
      float* top = call.input_gradient + n * x.n + oh * s.kernel_h * x.h;
      if (oh == OH) {
        clear_rest(call, top, s.height - OH * s.kernel_h, 0);
        continue;
      }
      clear_rest(call, top, s.kernel_h, OW * s.kernel_w);
      if (x.c != 1) {
        spread_strided(call, n, oh, top);
        continue;
      }
      const float* gradient =
          gradient_row(call, call.gradient + n * g.n + oh * g.h, buffers.of(worker.index));
      spread_adjacent(call, gradient, call.argmax + (n * OH + oh) * OW * C, top);
    }
  });
}

}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_pool(const hotloop::PoolCall* call) {
  return hotloop::guarded([&] { hotloop::pool(*call); });
}

HOTLOOP_EXPORT int32_t hotloop_pool_backward(const hotloop::PoolBackwardCall* call) {
  return hotloop::guarded([&] { hotloop::pool_backward(*call); });
}
