// Kernels of a train step over rows, images and layouts against plain loops in double; the same bits for one to three
// threads.
#include "kernel_check.h"

using namespace hotloop;

namespace {

// Runs call(threads) for one to three threads; each leaves the same in `written`.
template <class Call>
void check_threads(const char* what, std::vector<Floats*> written, const Call& call) {
  std::vector<Floats> first;
  for (int64_t threads = 1; threads <= 3; ++threads) {
    for (Floats* values : written) std::fill(values->begin(), values->end(), -7.0f);
    check_status(call(threads));
    for (size_t i = 0; i < written.size(); ++i) {
      if (threads == 1) first.push_back(*written[i]);
      check_equal(what, *written[i], first[i]);
    }
  }
}

void check_batch_norm(Draw& draw) {
  const int64_t rows = from_to(draw, 2, 700), cols = from_to(draw, 1, 150), count = rows * cols;
  const bool is_affine = draw.below(2), has_addend = draw.below(2), relus = draw.below(2);
  const Floats x = drawn(draw, count), addend = drawn(draw, count), g = drawn(draw, count);
  const Floats weight = drawn(draw, cols), bias = drawn(draw, cols);
  Floats out(at(count)), mean(at(cols)), rstd(at(cols));
  check_threads("batch norm", {&out, &mean, &rstd}, [&](int64_t threads) {
    const BatchNormCall call{rows, cols, x.data(), is_affine ? weight.data() : nullptr,
                             is_affine ? bias.data() : nullptr, has_addend ? addend.data() : nullptr,
                             out.data(), mean.data(), rstd.data(), nullptr, nullptr, 0.1, 1e-5, relus,
                             threads};
    return hotloop_batch_norm(&call);
  });
  Doubles means(at(cols)), rstds(at(cols)), want(at(count));
  for (int64_t c = 0; c < cols; ++c) {
    double sum = 0, squares = 0;
    for (int64_t r = 0; r < rows; ++r) sum += x[at(r * cols + c)];
    means[at(c)] = sum / static_cast<double>(rows);
    for (int64_t r = 0; r < rows; ++r) {
      const double gap = x[at(r * cols + c)] - means[at(c)];
      squares += gap * gap;
    }
    rstds[at(c)] = 1 / std::sqrt(squares / static_cast<double>(rows) + 1e-5);
    for (int64_t r = 0; r < rows; ++r) {
      const size_t i = at(r * cols + c);
      double value = (x[i] - means[at(c)]) * rstds[at(c)];
      if (is_affine) value = value * weight[at(c)] + bias[at(c)];
      if (has_addend) value += addend[i];
      want[i] = relus ? relu(value) : value;
    }
  }
  check_close("batch norm's mean", mean, means, 1);
  check_close("batch norm's deviation", rstd, rstds, 400);
  check_close("batch norm", out, want, 400);

  const bool has_mask = draw.below(2), keeps = has_mask && draw.below(2);
  Floats masked(at(count)), gx(at(count)), gw(at(cols)), gb(at(cols));
  const Floats& mask = addend;
  std::vector<Floats*> written{&gx, &gw, &gb};
  if (keeps) written.push_back(&masked);
  check_threads("batch norm's gradient", written, [&](int64_t threads) {
    const BatchNormGradientCall call{rows, cols, x.data(), g.data(), has_mask ? mask.data() : nullptr,
                                     mean.data(), rstd.data(), is_affine ? weight.data() : nullptr,
                                     keeps ? masked.data() : nullptr, gx.data(), gw.data(), gb.data(),
                                     threads};
    return hotloop_batch_norm_gradient(&call);
  });
  Doubles wanted(at(count)), sums(at(cols)), products(at(cols)), left(at(count));
  for (int64_t c = 0; c < cols; ++c) {
    const double m = mean[at(c)], r = rstd[at(c)], n = static_cast<double>(rows);
    for (int64_t row = 0; row < rows; ++row) {
      const size_t i = at(row * cols + c);
      left[i] = has_mask && mask[i] <= 0 ? 0 : g[i];
      sums[at(c)] += left[i], products[at(c)] += left[i] * (x[i] - m) * r;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const size_t i = at(row * cols + c);
      wanted[i] = r * (is_affine ? weight[at(c)] : 1) *
                  (left[i] - sums[at(c)] / n - (x[i] - m) * r * products[at(c)] / n);
    }
  }
  check_close("batch norm's input gradient", gx, wanted, 400);
  check_close("batch norm's weight gradient", gw, products, 400 + std::sqrt(static_cast<double>(rows)) * 4);
  check_close("batch norm's bias gradient", gb, sums, std::sqrt(static_cast<double>(rows)) * 4);
  if (keeps) check_close("batch norm's masked gradient", masked, left, 0);
}

void check_image_means(Draw& draw) {
  const int64_t images = from_to(draw, 1, 6), pixels = from_to(draw, 1, 200), cols = from_to(draw, 1, 150);
  const int64_t count = images * pixels * cols;
  const Floats x = drawn(draw, count), g = drawn(draw, images * cols);
  const bool has_mask = draw.below(2);
  const float divisor = static_cast<float>(pixels);
  Floats out(at(images * cols)), gx(at(count));
  check_threads("means of images", {&out, &gx}, [&](int64_t threads) {
    const ImageMeansCall call{images, pixels, cols, x.data(), out.data(), divisor, threads};
    const ImageMeansGradientCall back{images, pixels, cols, g.data(), cols, has_mask ? x.data() : nullptr,
                                      gx.data(), divisor, threads};
    return hotloop_image_means(&call) | hotloop_image_means_gradient(&back);
  });
  Doubles want(at(images * cols)), wanted(at(count));
  for (int64_t n = 0; n < images; ++n)
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < cols; ++c) {
        const size_t i = at((n * pixels + p) * cols + c), j = at(n * cols + c);
        want[j] += x[i] / static_cast<double>(divisor);
        wanted[i] = has_mask && x[i] <= 0 ? 0 : g[j] / static_cast<double>(divisor);
      }
  check_close("means of images", out, want, 1);
  check_close("gradient of means of images", gx, wanted, 0);
}

// Of random sizes, orders of the dimensions and gaps.
void check_copy(Draw& draw) {
  CopyCall call{};
  call.num_dims = from_to(draw, 0, 4);
  for (int64_t d = 0; d < call.num_dims; ++d) call.sizes[d] = draw.below(3) ? from_to(draw, 1, 9) : from_to(draw, 1, 70);
  const auto laid_out = [&](int64_t* strides) {
    std::vector<int64_t> order;
    for (int64_t d = 0; d < call.num_dims; ++d)
      order.insert(order.begin() + static_cast<long>(draw.below(order.size() + 1)), d);
    int64_t extent = 1;
    for (const int64_t d : order) {
      strides[d] = extent;
      extent *= call.sizes[d] + from_to(draw, 0, 2);
    }
    return extent;
  };
  const int64_t from_extent = laid_out(call.from_strides), to_extent = laid_out(call.to_strides);
  if (from_extent > 4000000 || to_extent > 4000000) return;
  if (call.num_dims && draw.below(3) == 0) call.from_strides[0] = 0;
  const Floats source = drawn(draw, from_extent);
  Floats target(at(to_extent)), want(at(to_extent), -7.0f);
  call.source = source.data(), call.element_bytes = 4;
  check_threads("a copy", {&target}, [&](int64_t threads) {
    call.target = target.data(), call.num_threads = threads;
    return hotloop_copy(&call);
  });
  int64_t index[4] = {};
  for (;;) {
    int64_t from = 0, to = 0;
    for (int64_t d = 0; d < call.num_dims; ++d)
      from += index[d] * call.from_strides[d], to += index[d] * call.to_strides[d];
    want[at(to)] = source[at(from)];
    int64_t d = call.num_dims - 1;
    for (; d >= 0 && ++index[d] == call.sizes[d]; --d) index[d] = 0;
    if (d < 0) break;
  }
  check_equal("a copy", target, want);
}

void check_batch_product(Draw& draw) {
  const int64_t batch = from_to(draw, 1, 9), m = from_to(draw, 1, 60), n = from_to(draw, 1, 150), k = from_to(draw, 1, 90);
  const Floats a = drawn(draw, batch * m * k), b = drawn(draw, batch * k * n);
  const bool a_turned = draw.below(2), b_turned = draw.below(2);
  Floats out(at(batch * m * n));
  const Matrix A{a.data(), a_turned ? 1 : k, a_turned ? m : 1}, B{b.data(), b_turned ? 1 : n, b_turned ? k : 1};
  check_threads("a batch of products", {&out}, [&](int64_t threads) {
    const BatchProductCall call{batch, m, n, k, A, B, m * k, k * n, out.data(), m * n, n, threads};
    return hotloop_batch_product(&call);
  });
  Doubles want(out.size());
  for (int64_t i = 0; i < batch; ++i)
    for (int64_t r = 0; r < m; ++r)
      for (int64_t c = 0; c < n; ++c)
        for (int64_t d = 0; d < k; ++d)
          want[at((i * m + r) * n + c)] +=
              static_cast<double>(a[at(i * m * k + r * A.row_stride + d * A.col_stride)]) *
              b[at(i * k * n + d * B.row_stride + c * B.col_stride)];
  check_close("a batch of products", out, want, std::sqrt(static_cast<double>(k)));
}

}  // namespace

int main() {
  Draw draw(1);
  for (int i = 0; i < 40; ++i) {
    check_batch_norm(draw);
    check_image_means(draw);
    check_batch_product(draw);
  }
  for (int i = 0; i < 300; ++i) check_copy(draw);
  std::puts("training: all is right");
}
