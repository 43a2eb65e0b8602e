// Convolutions with 3 x 3 and other small filters and max pooling, forward and backward, against plain loops; the
// same bits for one to three threads.
#include <algorithm>
#include <limits>

#include "kernel_check.h"

using namespace hotloop;

namespace {

// Images [n, c, h, w], channels last or first.
struct Images {
  int64_t n, c, h, w;
  bool last;

  int64_t count() const { return n * c * h * w; }
  ImageStrides strides() const {
    return last ? ImageStrides{h * w * c, 1, w * c, c} : ImageStrides{c * h * w, h * w, w, 1};
  }
  size_t index(int64_t in, int64_t ic, int64_t ih, int64_t iw) const {
    const ImageStrides s = strides();
    return at(in * s.n + ic * s.c + ih * s.h + iw * s.w);
  }
};

template <class Body>
void for_each(const Images& x, const Body& body) {
  for (int64_t n = 0; n < x.n; ++n)
    for (int64_t c = 0; c < x.c; ++c)
      for (int64_t h = 0; h < x.h; ++h)
        for (int64_t w = 0; w < x.w; ++w) body(n, c, h, w);
}

struct Pooled {
  Doubles values;
  std::vector<uint8_t> argmax;  // In the order of `order`.
};

Pooled plain_pool(const Images& in, const Doubles& x, const Images& out, const Images& order,
                  const Windows& s, bool has_relu) {
  Pooled made{Doubles(at(out.count())), std::vector<uint8_t>(at(out.count()))};
  for_each(out, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    double best = 0;
    int64_t place = -1;
    for (int64_t p = 0; p < s.kernel_h * s.kernel_w; ++p) {
      const int64_t i = h * s.stride_h - s.pad_h + p / s.kernel_w;
      const int64_t j = w * s.stride_w - s.pad_w + p % s.kernel_w;
      if (i < 0 || i >= in.h || j < 0 || j >= in.w) continue;
      const double value = x[in.index(n, c, i, j)];
      if (place < 0 || value > best) best = value, place = p;
    }
    if (has_relu && best <= 0) best = 0, place = 255;
    made.values[out.index(n, c, h, w)] = best;
    made.argmax[order.index(n, c, h, w)] = static_cast<uint8_t>(place);
  });
  return made;
}

void check_pool(Draw& draw) {
  const bool backward = draw.below(2) != 0, has_relu = draw.below(2) != 0;
  const Images in{from_to(draw, 1, 3), from_to(draw, 1, 40), from_to(draw, 4, 13),
                  from_to(draw, 4, 13), draw.below(2) != 0};
  Windows s{in.n, in.c, in.h, in.w, 0, 0, from_to(draw, 1, 4), from_to(draw, 1, 4), 0, 0, 0, 0};
  s.stride_h = backward ? s.kernel_h : from_to(draw, 1, 3);
  s.stride_w = backward ? s.kernel_w : from_to(draw, 1, 3);
  s.pad_h = backward ? 0 : from_to(draw, 0, s.kernel_h / 2);
  s.pad_w = backward ? 0 : from_to(draw, 0, s.kernel_w / 2);
  s.output_height = (in.h + 2 * s.pad_h - s.kernel_h) / s.stride_h + 1;
  s.output_width = (in.w + 2 * s.pad_w - s.kernel_w) / s.stride_w + 1;
  const Images out{in.n, in.c, s.output_height, s.output_width, draw.below(2) != 0};
  Images order = out;
  order.last = in.last || in.c == 1;
  Floats x = drawn(draw, in.count());
  for (float& value : x) value = std::round(value * 4);  // So that some are equal.
  const Pooled want = plain_pool(in, {x.begin(), x.end()}, out, order, s, has_relu);
  ImageStrides strides = in.strides();
  if (in.c == 1) strides.c = 1;
  for (int64_t threads = 1; threads <= 3; ++threads) {
    Floats y(at(out.count()), -7.0f);
    std::vector<uint8_t> argmax(at(out.count()), 77);
    const PoolCall call{s, x.data(), strides, y.data(), threads == 2 ? nullptr : argmax.data(),
                        out.last, has_relu, threads};
    check_status(hotloop_pool(&call));
    check_close("a maximum", y, want.values, 0);
    if (threads != 2) check_equal("an argmax", argmax, want.argmax);
  }
  if (!backward) return;
  const Floats g = drawn(draw, out.count());
  Doubles wanted(at(in.count()));
  for_each(out, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    const int64_t place = want.argmax[order.index(n, c, h, w)];
    if (place != 255)
      wanted[in.index(n, c, h * s.kernel_h + place / s.kernel_w, w * s.kernel_w + place % s.kernel_w)] =
          g[out.index(n, c, h, w)];
  });
  for (int64_t threads = 1; threads <= 3; ++threads) {
    Floats gx(at(in.count()), -7.0f);
    const PoolBackwardCall call{s, g.data(), out.strides(), want.argmax.data(), gx.data(), strides,
                                threads};
    check_status(hotloop_pool_backward(&call));
    check_close("a gradient of pooling", gx, wanted, 0);
  }
}

void check_pool_planes(Draw& draw) {
  const Images in{from_to(draw, 1, 3), from_to(draw, 1, 20), from_to(draw, 4, 33),
                  from_to(draw, 4, 33), false};
  Windows s{in.n, in.c, in.h, in.w, 0, 0, 2, 2, 2, 2, 0, 0};
  if (draw.below(2) != 0) {
    s.kernel_h = from_to(draw, 1, 4), s.kernel_w = from_to(draw, 1, 4);
    s.stride_h = from_to(draw, 1, 3), s.stride_w = from_to(draw, 1, 3);
    s.pad_h = from_to(draw, 0, s.kernel_h / 2), s.pad_w = from_to(draw, 0, s.kernel_w / 2);
  }
  s.output_height = (in.h + 2 * s.pad_h - s.kernel_h) / s.stride_h + 1;
  s.output_width = (in.w + 2 * s.pad_w - s.kernel_w) / s.stride_w + 1;
  const Images out{in.n, in.c, s.output_height, s.output_width, false};
  Floats x = drawn(draw, in.count());
  for (float& value : x) value = std::round(value * 4);
  const Pooled want = plain_pool(in, {x.begin(), x.end()}, out, out, s, false);
  std::vector<int64_t> wanted(at(out.count()));
  for_each(out, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    const size_t i = out.index(n, c, h, w);
    const int64_t row = h * s.stride_h - s.pad_h + want.argmax[i] / s.kernel_w;
    wanted[i] = row * in.w + w * s.stride_w - s.pad_w + want.argmax[i] % s.kernel_w;
  });
  for (int64_t threads = 1; threads <= 3; ++threads) {
    Floats y(at(out.count()), -7.0f);
    std::vector<int64_t> indices(at(out.count()), -7);
    const PoolPlanesCall call{s, x.data(), y.data(), indices.data(), threads};
    check_status(hotloop_pool_planes(&call));
    check_close("a maximum of a plane", y, want.values, 0);
    check_equal("an index of a maximum", indices, wanted);
  }
}

struct ConvolutionCase {
  ConvolutionShape shape;
  Images in, made, out;  // `made`: before pooling.
  bool pooled, has_relu;
  Floats x, filters, bias;

  explicit ConvolutionCase(Draw& draw) {
    pooled = draw.below(2) != 0, has_relu = draw.below(2) != 0;
    const bool is_3x3 = draw.below(2) != 0;
    const int64_t rows = is_3x3 ? 3 : from_to(draw, 1, 7), cols = is_3x3 ? 3 : from_to(draw, 1, 7);
    shape = {from_to(draw, 1, 3),     from_to(draw, 1, 40),    from_to(draw, rows, 13),
             from_to(draw, cols, 27), from_to(draw, 1, 80),    rows,
             cols,                    from_to(draw, 0, rows - 1), from_to(draw, 0, cols - 1)};
    if (pooled) shape.height += 1, shape.width += 1;
    const ConvolutionShape& s = shape;
    in = {s.batch, s.in_channels, s.height, s.width, true};
    made = {s.batch, s.out_channels, s.height + 2 * s.pad_h - rows + 1,
            s.width + 2 * s.pad_w - cols + 1, true};
    out = made;
    if (pooled) out.h /= 2, out.w /= 2, out.last = draw.below(2) != 0;
    x = drawn(draw, in.count());
    filters = drawn(draw, s.out_channels * s.in_channels * taps());
    bias = drawn(draw, s.out_channels);
  }

  int64_t taps() const { return shape.filter_height * shape.filter_width; }
  FilterStrides filter_strides() const {
    return {shape.in_channels * taps(), taps(), shape.filter_width, 1};
  }
  Images argmax_order() const { return {out.n, out.c, out.h, out.w, true}; }

  // Calls body(index of a result, of a pixel, of a filter's element) for each product.
  template <class Body>
  void for_products(const Body& body) const {
    for_each(made, [&](int64_t n, int64_t o, int64_t h, int64_t w) {
      for (int64_t c = 0; c < in.c; ++c)
        for (int64_t p = 0; p < taps(); ++p) {
          const int64_t i = h - shape.pad_h + p / shape.filter_width;
          const int64_t j = w - shape.pad_w + p % shape.filter_width;
          if (i >= 0 && i < in.h && j >= 0 && j < in.w)
            body(made.index(n, o, h, w), in.index(n, c, i, j), at((o * in.c + c) * taps() + p));
        }
    });
  }
};

void check_forward(const ConvolutionCase& c, Floats* result, std::vector<uint8_t>* argmax) {
  Doubles sums(at(c.made.count()));
  for_each(c.made, [&](int64_t n, int64_t o, int64_t h, int64_t w) {
    sums[c.made.index(n, o, h, w)] = c.bias[at(o)];
  });
  c.for_products([&](size_t y, size_t x, size_t f) {
    sums[y] += static_cast<double>(c.x[x]) * c.filters[f];
  });
  const Windows two{c.made.n, c.made.c, c.made.h, c.made.w, c.out.h, c.out.w, 2, 2, 2, 2, 0, 0};
  Doubles want = sums;
  if (c.pooled) want = plain_pool(c.made, sums, c.out, c.argmax_order(), two, c.has_relu).values;
  else if (c.has_relu) std::transform(want.begin(), want.end(), want.begin(), relu);
  for (int64_t threads = 1; threads <= 3; ++threads) {
    Floats y(at(c.out.count()), -7.0f);
    std::vector<uint8_t> places(at(c.out.count()), 77);
    const ConvolutionCall call{c.shape, c.x.data(), c.in.strides(), c.filters.data(),
                               c.filter_strides(), c.bias.data(), y.data(), c.out.strides(),
                               c.pooled ? places.data() : nullptr, c.has_relu, threads};
    check_status(hotloop_convolve(&call));
    check_close("a convolution", y, want, 3 * std::sqrt(static_cast<double>(c.taps() * c.in.c)));
    if (threads == 1) *result = y, *argmax = places;
    check_equal("a convolution with other threads", y, *result);
    check_equal("its argmax", places, *argmax);
  }
}

void check_gradients(Draw& draw, const ConvolutionCase& c, const std::vector<uint8_t>& argmax) {
  const Floats g = drawn(draw, c.out.count()), mask = drawn(draw, c.in.count());
  Doubles spread(at(c.made.count()));
  for_each(c.out, [&](int64_t n, int64_t o, int64_t h, int64_t w) {
    const double value = g[c.out.index(n, o, h, w)];
    const int64_t place = c.pooled ? argmax[c.argmax_order().index(n, o, h, w)] : 0;
    if (!c.pooled) spread[c.made.index(n, o, h, w)] = value;
    else if (place != 255) spread[c.made.index(n, o, 2 * h + place / 2, 2 * w + place % 2)] = value;
  });
  Doubles gx(at(c.in.count())), gf(c.filters.size()), gb(c.bias.size());
  c.for_products([&](size_t y, size_t x, size_t f) {
    gx[x] += spread[y] * c.filters[f];
    gf[f] += spread[y] * c.x[x];
  });
  for (size_t i = 0; i < gx.size(); ++i) gx[i] = mask[i] <= 0 ? 0 : gx[i];
  for_each(c.made, [&](int64_t n, int64_t o, int64_t h, int64_t w) {
    gb[at(o)] += spread[c.made.index(n, o, h, w)];
  });
  const double results = static_cast<double>(c.made.n * c.made.h * c.made.w);
  Floats first_gx, first_gf;
  const uint8_t* places = c.pooled ? argmax.data() : nullptr;
  for (int64_t threads = 1; threads <= 3; ++threads) {
    Floats made_gx(gx.size(), -7.0f), made_gf(gf.size(), -7.0f), made_gb(gb.size(), -7.0f);
    const ConvolutionInputGradientCall input{
        c.shape, g.data(), c.out.strides(), places, c.filters.data(), c.filter_strides(),
        mask.data(), made_gx.data(), c.in.strides(), threads};
    check_status(hotloop_convolve_input_gradient(&input));
    check_close("a gradient of images", made_gx, gx,
                3 * std::sqrt(static_cast<double>(c.taps() * c.made.c)));
    const ConvolutionFilterGradientCall filter{
        c.shape, c.x.data(), c.in.strides(), g.data(), c.out.strides(), places, made_gf.data(),
        c.filter_strides(), made_gb.data(), threads};
    check_status(hotloop_convolve_filter_gradient(&filter));
    check_close("a gradient of filters", made_gf, gf, 3 * std::sqrt(results));
    check_close("a gradient of a bias", made_gb, gb, 3 * std::sqrt(results));
    if (threads == 1) first_gx = made_gx, first_gf = made_gf;
    check_equal("a gradient of images with other threads", made_gx, first_gx);
    check_equal("a gradient of filters with other threads", made_gf, first_gf);
  }
}

}  // namespace

int main() {
  Draw draw(2);
  for (int i = 0; i < 60; ++i) check_pool(draw);
  for (int i = 0; i < 60; ++i) check_pool_planes(draw);
  for (int i = 0; i < 60; ++i) {
    const ConvolutionCase c(draw);
    if (std::min(c.out.h, c.out.w) < 1) continue;
    Floats result;
    std::vector<uint8_t> argmax;
    check_forward(c, &result, &argmax);
    check_gradients(draw, c, argmax);
  }
  return 0;
}
