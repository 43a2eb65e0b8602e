#include "convolution.h"

#include "convolve.h"
#include "error.h"
#include "layout.h"
#include "scratch.h"

namespace hotloop {
namespace {

thread_local Scratch layout_scratch;

struct Size {
  int64_t height, width;
};

Size result_size(const ConvolutionShape& s) {
  return {s.height + 2 * s.pad_h - 2, s.width + 2 * s.pad_w - 2};
}

Image image(const ConvolutionShape& s, const float* data, const ImageStrides& strides) {
  return {s.batch, s.in_channels, s.height, s.width, strides.n, strides.h, strides.w, data};
}

// The gradient of the results: as it lies, or that of their pooling with its channels adjacent.
Image gradient_image(const ConvolutionShape& s, const float* g, const ImageStrides& strides,
                     const uint8_t* argmax, int threads) {
  const auto [height, width] = result_size(s);
  const int64_t channels = s.out_channels;
  if (!argmax || strides.c == 1)
    return {s.batch, channels, height, width, strides.n, strides.h, strides.w, g, argmax};
  const int64_t pooled_width = width / 2, pixels = height / 2 * pooled_width;
  float* dense = layout_scratch.reserve(s.batch * channels * pixels);
  nchw_to_nhwc(g, s.batch, channels, pixels, strides.n, strides.c, dense, threads);
  return {s.batch,           channels,                height,   width,
          pixels * channels, pooled_width * channels, channels, dense,
          argmax};
}

}  // namespace

void convolve3x3(const ConvolutionCall& call) {
  const ConvolutionShape& s = call.shape;
  const auto [height, width] = result_size(s);
  const FilterStrides& f = call.filter_strides;
  const Epilogue terms{call.bias, nullptr, nullptr, call.relu ? kRelu : kNoActivation};
  const Convolution convolution{
      image(s, call.input, call.input_strides), s.pad_h, s.pad_w,
      Filters{call.filters, f.o, f.i, f.h, f.w}, nullptr,
      ConvolutionEpilogue{terms, call.output, call.output_strides, s.out_channels, height, width,
                          call.argmax != nullptr, call.argmax},
      static_cast<int>(call.num_threads)};
  if (s.in_channels < kFewChannels) convolve_directly(convolution);
  else convolve_winograd(convolution);
}

void convolve3x3_input_gradient(const ConvolutionInputGradientCall& call) {
  const ConvolutionShape& s = call.shape;
  const FilterStrides& f = call.filter_strides;
  const int threads = static_cast<int>(call.num_threads);
  const Epilogue terms{nullptr, nullptr, call.mask, kNoActivation};
  // The gradient convolved with the filters turned by 180 degrees, inputs and outputs exchanged.
  convolve_winograd(
      {gradient_image(s, call.gradient, call.gradient_strides, call.argmax, threads), 2 - s.pad_h,
       2 - s.pad_w, Filters{call.filters + 2 * f.h + 2 * f.w, f.i, f.o, -f.h, -f.w}, nullptr,
       ConvolutionEpilogue{terms, call.input_gradient, call.input_strides, s.in_channels, s.height,
                           s.width},
       threads});
}

void convolve3x3_filter_gradient(const ConvolutionFilterGradientCall& call) {
  const ConvolutionShape& s = call.shape;
  const int threads = static_cast<int>(call.num_threads);
  const FilterGradient gradient{
      image(s, call.input, call.input_strides),
      gradient_image(s, call.gradient, call.gradient_strides, call.argmax, threads), s.pad_h,
      s.pad_w, call.filter_gradient, call.bias_gradient, call.filter_strides, threads};
  if (s.in_channels < kFewChannels) filter_gradient_directly(gradient);
  else filter_gradient_winograd(gradient);
}

}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_convolve3x3(const hotloop::ConvolutionCall* call) {
  return hotloop::guarded([&] { hotloop::convolve3x3(*call); });
}

HOTLOOP_EXPORT int32_t
hotloop_convolve3x3_input_gradient(const hotloop::ConvolutionInputGradientCall* call) {
  return hotloop::guarded([&] { hotloop::convolve3x3_input_gradient(*call); });
}

HOTLOOP_EXPORT int32_t
hotloop_convolve3x3_filter_gradient(const hotloop::ConvolutionFilterGradientCall* call) {
  return hotloop::guarded([&] { hotloop::convolve3x3_filter_gradient(*call); });
}
