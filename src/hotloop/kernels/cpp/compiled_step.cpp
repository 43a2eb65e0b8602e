// The operators that a compiled step calls by name: they take tensors, and what they do is that of the kernels.
// Their declarations are those of binding.py.
#include <cstdint>

#include "abi.h"
#include "control_row.h"
#include "convolution.h"
#include "error.h"
#include "pooling.h"
#include "products.h"
#include "program.h"
#include "torch_interface.h"
#include "updates.h"

namespace hotloop {
namespace {

struct View {
  float* data = nullptr;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;

  View() = default;
  explicit View(Tensor tensor)
      : data(data_of<float>(tensor)), sizes(sizes_of(tensor)), strides(strides_of(tensor)) {}

  Matrix matrix() const { return {data, strides[0], strides[1]}; }
  Matrix transposed() const { return {data, strides[1], strides[0]}; }
  ImageStrides image_strides() const { return {strides[0], strides[1], strides[2], strides[3]}; }
  FilterStrides filter_strides() const {
    return {strides[0], strides[1], strides[2], strides[3]};
  }
};

// Tensors that may be missing: a null pointer, or one to a null handle.
template <class Value>
Value* data_if_any(Tensor* tensor) {
  return tensor && *tensor ? data_of<Value>(*tensor) : nullptr;
}

template <class Value>
Value* data_if_any(Tensor tensor) {
  return tensor ? data_of<Value>(tensor) : nullptr;
}

UpdateRule rule_of_group(Tensor control, int64_t group) {
  return rule_of(data_of<ControlRow>(control)[group]);
}

// The gradient in its weight's layout: the update walks both as one run of memory. The compiler lays out what it
// makes as it likes; where that differs, the result is a copy, else empty.
OwnedTensor in_layout_of(Tensor weight, Tensor gradient) {
  const int64_t dims = dims_of(weight);
  const int64_t *sizes = sizes_of(weight), *wanted = strides_of(weight);
  const int64_t* given = strides_of(gradient);
  bool alike = true;
  for (int64_t d = 0; d < dims; ++d) alike = alike && (sizes[d] == 1 || wanted[d] == given[d]);
  if (alike) return {};
  OwnedTensor copy = empty_strided(dims, sizes, wanted, kFloat32);
  HOTLOOP_TORCH(aoti_torch_copy_, int32_t(Tensor, Tensor, int32_t), copy.get(), gradient, 0);
  return copy;
}

int32_t update_weight(Tensor weight, Tensor gradient, Tensor state1, Tensor state2, Tensor control,
                      Tensor* scale, int64_t group) {
  return guarded([&] {
    const OwnedTensor copy = in_layout_of(weight, gradient);
    const float* factor = data_if_any<float>(scale);
    UpdateCall call{};
    call.count = numel_of(weight);
    call.weight = data_of<float>(weight);
    call.gradient = data_of<float>(copy.get() ? copy.get() : gradient);
    call.state1 = data_if_any<float>(state1);
    call.state2 = data_if_any<float>(state2);
    call.rule = rule_of_group(control, group);
    call.scale = factor ? *factor : 1.0f;
    call.num_threads = step_threads();
    update(call);
  });
}

int32_t update_by_product(bool bfloat16, Tensor weight, Tensor a, Tensor b, Tensor state1,
                          Tensor state2, Tensor control, int64_t group) {
  return guarded([&] {
    const View w(weight), left(a), right(b);
    // A weight kept transposed: its transpose is b^T a^T.
    const bool turned = w.strides[1] != 1;
    ProductUpdateCall call{};
    call.m = turned ? right.sizes[1] : left.sizes[0];
    call.n = turned ? left.sizes[0] : right.sizes[1];
    call.k = left.sizes[1];
    call.a = turned ? right.transposed() : left.matrix();
    call.b = turned ? left.transposed() : right.matrix();
    call.weight = w.data;
    call.weight_row_stride = w.strides[turned ? 1 : 0];
    call.state1 = data_if_any<float>(state1);
    call.state2 = data_if_any<float>(state2);
    call.state_row_stride = call.weight_row_stride;
    call.rule = rule_of_group(control, group);
    call.scale = 1.0f;
    call.bfloat16 = bfloat16;
    call.num_threads = step_threads();
    product_update(call);
  });
}

int32_t multiply(bool bfloat16, Tensor a, Tensor b, Tensor* bias, Tensor* mask, int64_t activation,
                 Tensor* result) {
  return guarded([&] {
    const View left(a), right(b);
    const int64_t sizes[] = {left.sizes[0], right.sizes[1]}, strides[] = {sizes[1], 1};
    OwnedTensor made = empty_strided(2, sizes, strides, kFloat32);
    ProductCall call{};
    call.m = sizes[0];
    call.n = sizes[1];
    call.k = left.sizes[1];
    call.a = left.matrix();
    call.b = right.matrix();
    call.c = data_of<float>(made.get());
    call.c_row_stride = sizes[1];
    call.bias = data_if_any<float>(bias);
    call.mask = data_if_any<float>(mask);
    call.mask_row_stride = call.mask ? strides_of(*mask)[0] : 0;
    call.activation = static_cast<int32_t>(activation);
    call.bfloat16 = bfloat16;
    call.num_threads = step_threads();
    product(call);
    *result = made.release();
  });
}

// Dense [n, c, h, w], or with channels adjacent.
OwnedTensor dense(int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last, int32_t dtype) {
  const int64_t sizes[] = {n, c, h, w};
  const int64_t planes[] = {c * h * w, h * w, w, 1}, adjacent[] = {c * h * w, 1, w * c, c};
  return empty_strided(4, sizes, channels_last ? adjacent : planes, dtype);
}

// Windows of kernel_h x kernel_w that lie next to each other.
Windows windows_of(const int64_t* images, int64_t height, int64_t width, int64_t kernel_h,
                   int64_t kernel_w) {
  Windows windows{};
  windows.batch = images[0];
  windows.channels = images[1];
  windows.height = height;
  windows.width = width;
  windows.output_height = height / kernel_h;
  windows.output_width = width / kernel_w;
  windows.kernel_h = windows.stride_h = kernel_h;
  windows.kernel_w = windows.stride_w = kernel_w;
  return windows;
}

// Channels of x are adjacent.
ConvolutionShape convolution_shape(const View& x, const View& w, int64_t pad_h, int64_t pad_w) {
  if (x.strides[1] != 1) throw Error("channels of a convolution's input must be adjacent");
  return {x.sizes[0], x.sizes[1], x.sizes[2], x.sizes[3], w.sizes[0], pad_h, pad_w};
}

// Of what a convolution makes, before it is pooled.
int64_t output_height(const ConvolutionShape& shape) { return shape.height + 2 * shape.pad_h - 2; }
int64_t output_width(const ConvolutionShape& shape) { return shape.width + 2 * shape.pad_w - 2; }

// The gradient of a convolution's output: of a pooled one its planes may be dense, else channels are adjacent.
void require_layout(const View& gradient, bool pooled) {
  const int64_t* t = gradient.strides;
  const bool planes = pooled && t[3] == 1 && t[2] == gradient.sizes[3];
  if (t[1] != 1 && !planes) throw Error("channels of a convolution's gradient must be adjacent");
}

// Convolution, relu where asked, pooling by 2 x 2 where `argmax` is not null.
int32_t convolve(Tensor input, Tensor filters, Tensor* bias, int64_t pad_h, int64_t pad_w, bool relu,
                 bool channels_last, Tensor* output, Tensor* argmax) {
  return guarded([&] {
    const View x(input), w(filters);
    ConvolutionCall call{};
    call.shape = convolution_shape(x, w, pad_h, pad_w);
    const int64_t divisor = argmax ? 2 : 1;
    const int64_t n = call.shape.batch, c = call.shape.out_channels;
    const int64_t height = output_height(call.shape) / divisor;
    const int64_t width = output_width(call.shape) / divisor;
    OwnedTensor made = dense(n, c, height, width, channels_last, kFloat32);
    OwnedTensor places;
    if (argmax) places = dense(n, c, height, width, true, kUInt8);
    call.input = x.data;
    call.input_strides = x.image_strides();
    call.filters = w.data;
    call.filter_strides = w.filter_strides();
    call.bias = data_if_any<float>(bias);
    call.output = data_of<float>(made.get());
    call.output_strides = View(made.get()).image_strides();
    call.argmax = data_if_any<uint8_t>(places.get());
    call.relu = relu;
    call.num_threads = step_threads();
    convolve3x3(call);
    *output = made.release();
    if (argmax) *argmax = places.release();
  });
}

}  // namespace
}  // namespace hotloop

using hotloop::Tensor;

// An operator without a result gets a last argument that is null.
HOTLOOP_EXPORT int32_t aoti_torch_cpu_update0_(Tensor w, Tensor g, Tensor control, Tensor* scale,
                                               int64_t group, Tensor*) {
  return hotloop::update_weight(w, g, nullptr, nullptr, control, scale, group);
}
HOTLOOP_EXPORT int32_t aoti_torch_cpu_update1_(Tensor w, Tensor g, Tensor s1, Tensor control,
                                               Tensor* scale, int64_t group, Tensor*) {
  return hotloop::update_weight(w, g, s1, nullptr, control, scale, group);
}
HOTLOOP_EXPORT int32_t aoti_torch_cpu_update2_(Tensor w, Tensor g, Tensor s1, Tensor s2,
                                               Tensor control, Tensor* scale, int64_t group,
                                               Tensor*) {
  return hotloop::update_weight(w, g, s1, s2, control, scale, group);
}

#define HOTLOOP_PRODUCTS(name, bfloat16)                                                           \
  HOTLOOP_EXPORT int32_t aoti_torch_cpu_##name##_update0_(Tensor w, Tensor a, Tensor b,            \
                                                          Tensor control, int64_t group,           \
                                                          Tensor*) {                               \
    return hotloop::update_by_product(bfloat16, w, a, b, nullptr, nullptr, control, group);        \
  }                                                                                                \
  HOTLOOP_EXPORT int32_t aoti_torch_cpu_##name##_update1_(Tensor w, Tensor a, Tensor b, Tensor s1, \
                                                          Tensor control, int64_t group,           \
                                                          Tensor*) {                               \
    return hotloop::update_by_product(bfloat16, w, a, b, s1, nullptr, control, group);             \
  }                                                                                                \
  HOTLOOP_EXPORT int32_t aoti_torch_cpu_##name##_update2_(Tensor w, Tensor a, Tensor b, Tensor s1, \
                                                          Tensor s2, Tensor control,               \
                                                          int64_t group, Tensor*) {                \
    return hotloop::update_by_product(bfloat16, w, a, b, s1, s2, control, group);                  \
  }                                                                                                \
  HOTLOOP_EXPORT int32_t aoti_torch_cpu_##name(Tensor a, Tensor b, Tensor* bias, Tensor* mask,     \
                                               int64_t act, Tensor* result) {                      \
    return hotloop::multiply(bfloat16, a, b, bias, mask, act, result);                             \
  }
HOTLOOP_PRODUCTS(gemm, false)
HOTLOOP_PRODUCTS(gemm_bf16, true)

// oneDNN's product. Inductor's own lowering of it wants a constant weight; this one does not.
HOTLOOP_EXPORT int32_t aoti_torch_cpu_onednn(Tensor a, Tensor b, Tensor* bias, Tensor* result) {
  using namespace hotloop;
  return guarded([&] {
    const View right(b);
    const int64_t sizes[] = {right.sizes[1], right.sizes[0]};
    const int64_t strides[] = {right.strides[1], right.strides[0]};
    Tensor made = nullptr;
    using Reinterpret = int32_t(Tensor, int64_t, const int64_t*, const int64_t*, int64_t, Tensor*);
    HOTLOOP_TORCH(aoti_torch__reinterpret_tensor, Reinterpret, b, 2, sizes, strides,
                  storage_offset_of(b), &made);
    const OwnedTensor weight(made);
    using Linear = int32_t(Tensor, Tensor, Tensor*, const char*, const double**, int64_t,
                           const char**, Tensor*);
    const double* no_scalars = nullptr;
    const char* algorithm = "";
    HOTLOOP_TORCH(aoti_torch_cpu__linear_pointwise, Linear, a, weight.get(),
                  bias && *bias ? bias : nullptr, "none", &no_scalars, 0, &algorithm, result);
  });
}

HOTLOOP_EXPORT int32_t aoti_torch_cpu_pool(Tensor x, int64_t kh, int64_t kw, int64_t relu,
                                           int64_t last, Tensor* out, Tensor* argmax) {
  using namespace hotloop;
  return guarded([&] {
    const View input(x);
    PoolCall call{};
    call.windows = windows_of(input.sizes, input.sizes[2], input.sizes[3], kh, kw);
    const Windows& made = call.windows;
    OwnedTensor results = dense(made.batch, made.channels, made.output_height, made.output_width,
                                last != 0, kFloat32);
    OwnedTensor places = dense(made.batch, made.channels, made.output_height, made.output_width,
                               input.strides[1] == 1, kUInt8);
    call.input = input.data;
    call.input_strides = input.image_strides();
    call.output = data_of<float>(results.get());
    call.argmax = data_of<uint8_t>(places.get());
    call.channels_last = last != 0;
    call.activation = relu != 0;
    call.num_threads = step_threads();
    pool(call);
    *out = results.release();
    *argmax = places.release();
  });
}

HOTLOOP_EXPORT int32_t aoti_torch_cpu_pool_backward(Tensor g, Tensor argmax, int64_t h, int64_t w,
                                                    int64_t kh, int64_t kw, Tensor* result) {
  using namespace hotloop;
  return guarded([&] {
    const View gradient(g);
    const int64_t* sizes = sizes_of(argmax);
    OwnedTensor made = dense(sizes[0], sizes[1], h, w, strides_of(argmax)[1] == 1, kFloat32);
    const View input_gradient(made.get());
    PoolBackwardCall call{};
    call.windows = windows_of(sizes, h, w, kh, kw);
    call.gradient = gradient.data;
    call.gradient_strides = gradient.image_strides();
    call.argmax = data_of<uint8_t>(argmax);
    call.input_gradient = input_gradient.data;
    call.input_gradient_strides = input_gradient.image_strides();
    call.num_threads = step_threads();
    pool_backward(call);
    *result = made.release();
  });
}

HOTLOOP_EXPORT int32_t aoti_torch_cpu_conv3x3(Tensor x, Tensor w, Tensor* bias, int64_t pad_h,
                                              int64_t pad_w, int64_t relu, Tensor* result) {
  return hotloop::convolve(x, w, bias, pad_h, pad_w, relu != 0, true, result, nullptr);
}

HOTLOOP_EXPORT int32_t aoti_torch_cpu_conv3x3_pool(Tensor x, Tensor w, Tensor* bias, int64_t pad_h,
                                                   int64_t pad_w, int64_t relu, int64_t last,
                                                   Tensor* out, Tensor* argmax) {
  return hotloop::convolve(x, w, bias, pad_h, pad_w, relu != 0, last != 0, out, argmax);
}

HOTLOOP_EXPORT int32_t aoti_torch_cpu_conv3x3_input_gradient(Tensor x, Tensor g, Tensor w,
                                                             Tensor* argmax, Tensor* mask,
                                                             int64_t pad_h, int64_t pad_w,
                                                             Tensor* result) {
  using namespace hotloop;
  return guarded([&] {
    const View input(x), gradient(g), filters(w);
    ConvolutionInputGradientCall call{};
    call.shape = convolution_shape(input, filters, pad_h, pad_w);
    call.argmax = data_if_any<uint8_t>(argmax);
    require_layout(gradient, call.argmax);
    OwnedTensor made = dense(call.shape.batch, call.shape.in_channels, call.shape.height,
                             call.shape.width, true, kFloat32);
    const View input_gradient(made.get());
    call.gradient = gradient.data;
    call.gradient_strides = gradient.image_strides();
    call.filters = filters.data;
    call.filter_strides = filters.filter_strides();
    call.mask = data_if_any<float>(mask);
    call.input_gradient = input_gradient.data;
    call.input_strides = input_gradient.image_strides();
    call.num_threads = step_threads();
    convolve3x3_input_gradient(call);
    *result = made.release();
  });
}

HOTLOOP_EXPORT int32_t aoti_torch_cpu_conv3x3_weight_gradient(Tensor x, Tensor g, Tensor w,
                                                              Tensor* argmax, int64_t pad_h,
                                                              int64_t pad_w, int64_t last,
                                                              Tensor* gw, Tensor* gb) {
  using namespace hotloop;
  return guarded([&] {
    const View input(x), gradient(g);
    ConvolutionFilterGradientCall call{};
    call.shape = convolution_shape(input, View(w), pad_h, pad_w);
    call.argmax = data_if_any<uint8_t>(argmax);
    require_layout(gradient, call.argmax);
    const int64_t channels = call.shape.out_channels, stride = 1;
    OwnedTensor filters = dense(channels, call.shape.in_channels, 3, 3, last != 0, kFloat32);
    OwnedTensor bias = empty_strided(1, &channels, &stride, kFloat32);
    const View filter_gradient(filters.get());
    call.input = input.data;
    call.input_strides = input.image_strides();
    call.gradient = gradient.data;
    call.gradient_strides = gradient.image_strides();
    call.filter_gradient = filter_gradient.data;
    call.filter_strides = filter_gradient.filter_strides();
    call.bias_gradient = data_of<float>(bias.get());
    call.num_threads = step_threads();
    convolve3x3_filter_gradient(call);
    *gw = filters.release();
    *gb = bias.release();
  });
}
