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
  return {s.height + 2 * s.pad_h - s.filter_height + 1, s.width + 2 * s.pad_w - s.filter_width + 1};
}

FilterSize filter_size(const ConvolutionShape& s) { return {s.filter_height, s.filter_width}; }

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

void convolve(const Convolution& convolution) {
  if (convolution.size.is_for_winograd(convolution.input.channels)) convolve_winograd(convolution);
  else convolve_directly(convolution);
}

}  // namespace

void convolve(const ConvolutionCall& call) {
  const ConvolutionShape& s = call.shape;
  const auto [height, width] = result_size(s);
  const FilterStrides& f = call.filter_strides;
  const Epilogue terms{call.bias, nullptr, nullptr, call.relu ? kRelu : kNoActivation};
  convolve({image(s, call.input, call.input_strides), filter_size(s), s.pad_h, s.pad_w,
            Filters{call.filters, f.o, f.i, f.h, f.w}, nullptr,
            ConvolutionEpilogue{terms, call.output, call.output_strides, s.out_channels, height,
                                width, call.argmax != nullptr, call.argmax},
            static_cast<int>(call.num_threads)});
}

void convolve_input_gradient(const ConvolutionInputGradientCall& call) {
  const ConvolutionShape& s = call.shape;
  const FilterStrides& f = call.filter_strides;
  const FilterSize size = filter_size(s);
  const int threads = static_cast<int>(call.num_threads);
  const Image g = gradient_image(s, call.gradient, call.gradient_strides, call.argmax, threads);
  const ConvolutionEpilogue epilogue{{nullptr, nullptr, call.mask, kNoActivation},
                                     call.input_gradient, call.input_strides, s.in_channels,
                                     s.height, s.width};
  if (call.argmax && !size.is_for_winograd(s.out_channels)) {
    pooled_input_gradient({g, size, s.pad_h, s.pad_w, Filters{call.filters, f.o, f.i, f.h, f.w},
                           epilogue, threads});
    return;
  }
  // The gradient convolved with the filters turned by 180 degrees, inputs and outputs exchanged.
  const int64_t bottom = size.height - 1, right = size.width - 1;
  const float* last = call.filters + bottom * f.h + right * f.w;
  convolve({g, size, bottom - s.pad_h, right - s.pad_w, Filters{last, f.i, f.o, -f.h, -f.w},
            nullptr, epilogue, threads});
}

void convolve_filter_gradient(const ConvolutionFilterGradientCall& call) {
  const ConvolutionShape& s = call.shape;
  const int threads = static_cast<int>(call.num_threads);
  const FilterGradient gradient{
      image(s, call.input, call.input_strides),
      gradient_image(s, call.gradient, call.gradient_strides, call.argmax, threads), filter_size(s),
      s.pad_h, s.pad_w, call.filter_gradient, call.bias_gradient, call.filter_strides, threads};
  if (gradient.size.is_for_winograd(s.in_channels)) filter_gradient_winograd(gradient);
  else if (call.argmax && s.in_channels >= kFewChannels) pooled_filter_gradient(gradient);
  else filter_gradient_directly(gradient);
}

}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_convolve(const hotloop::ConvolutionCall* call) {
  return hotloop::guarded([&] { hotloop::convolve(*call); });
}

HOTLOOP_EXPORT int32_t
hotloop_convolve_input_gradient(const hotloop::ConvolutionInputGradientCall* call) {
  return hotloop::guarded([&] { hotloop::convolve_input_gradient(*call); });
}

HOTLOOP_EXPORT int32_t
hotloop_convolve_filter_gradient(const hotloop::ConvolutionFilterGradientCall* call) {
  return hotloop::guarded([&] { hotloop::convolve_filter_gradient(*call); });
}
