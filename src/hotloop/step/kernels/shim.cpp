// What a compiled step calls (hotloop's operators, as C entries that take tensor handles), and the
// loop that runs compiled steps without the interpreter. Only torch's stable C interface is used.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "gemm.cpp"
#include "gemm_bf16.cpp"
#include "pool.cpp"
#include "winograd.cpp"
#include "convolution.cpp"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define TRY(call)                 \
  do {                            \
    if ((call) != 0) return 1;    \
  } while (0)

namespace {

// Columns of the control table; updates.py names them.
enum Column { kKind, kLr, kBeta1, kBeta2, kEps, kWeightDecay, kCorrection1, kCorrection2Sqrt,
              kMomentum, kDampening, kAlpha, kFirstStep };
constexpr int kColumns = 16;

thread_local int32_t threads = 1;

struct View {
  float* data = nullptr;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;

  int open(AtenTensorHandle tensor) {
    void* raw = nullptr;
    TRY(aoti_torch_get_data_ptr(tensor, &raw));
    data = static_cast<float*>(raw);
    TRY(aoti_torch_get_sizes(tensor, &sizes));
    return aoti_torch_get_strides(tensor, &strides) != 0;
  }
};

hotloop_update rule(const double* row) {
  hotloop_update u{};
  u.kind = static_cast<int32_t>(row[kKind]);
  u.lr = row[kLr];
  u.beta1 = row[kBeta1];
  u.beta2 = row[kBeta2];
  u.eps = row[kEps];
  u.weight_decay = row[kWeightDecay];
  u.bias_correction1 = row[kCorrection1];
  u.bias_correction2_sqrt = row[kCorrection2Sqrt];
  u.momentum = row[kMomentum];
  u.dampening = row[kDampening];
  u.alpha = row[kAlpha];
  u.first_step = row[kFirstStep] != 0;
  return u;
}

int row_of(AtenTensorHandle control, int64_t group, hotloop_update* u) {
  void* raw = nullptr;
  TRY(aoti_torch_get_data_ptr(control, &raw));
  *u = rule(static_cast<const double*>(raw) + group * kColumns);
  return 0;
}

// g in w's layout: the update walks both as one run of memory. The compiler lays out what it makes as it
// likes; where that differs, `turned` is a copy.
int as_laid_out(AtenTensorHandle w, AtenTensorHandle g, AtenTensorHandle* turned) {
  int64_t dims = 0;
  int64_t *sizes = nullptr, *wanted = nullptr, *given = nullptr;
  TRY(aoti_torch_get_dim(w, &dims));
  TRY(aoti_torch_get_sizes(w, &sizes));
  TRY(aoti_torch_get_strides(w, &wanted));
  TRY(aoti_torch_get_strides(g, &given));
  bool alike = true;
  for (int64_t d = 0; d < dims; ++d) alike = alike && (sizes[d] == 1 || wanted[d] == given[d]);
  if (alike) return 0;
  TRY(aoti_torch_empty_strided(dims, sizes, wanted, aoti_torch_dtype_float32(),
                               aoti_torch_device_type_cpu(), 0, turned));
  return aoti_torch_copy_(*turned, g, 0) != 0;
}

int update(AtenTensorHandle w, AtenTensorHandle g, AtenTensorHandle s1, AtenTensorHandle s2,
           AtenTensorHandle control, AtenTensorHandle* scale, int64_t group) {
  void *weight = nullptr, *gradient = nullptr, *first = nullptr, *second = nullptr;
  hotloop_update u;
  AtenTensorHandle turned = nullptr;
  TRY(row_of(control, group, &u));
  TRY(as_laid_out(w, g, &turned));
  TRY(aoti_torch_get_data_ptr(w, &weight));
  TRY(aoti_torch_get_data_ptr(turned ? turned : g, &gradient));
  if (s1) TRY(aoti_torch_get_data_ptr(s1, &first));
  if (s2) TRY(aoti_torch_get_data_ptr(s2, &second));
  int64_t count = 0;
  TRY(aoti_torch_get_numel(w, &count));
  float factor = 1.0f;
  if (scale && *scale) {
    void* raw = nullptr;
    TRY(aoti_torch_get_data_ptr(*scale, &raw));
    factor = *static_cast<float*>(raw);
  }
  hotloop_update_f32(count, static_cast<float*>(weight), static_cast<float*>(gradient),
                     static_cast<float*>(first), static_cast<float*>(second), &u, factor, threads);
  if (turned) aoti_torch_delete_tensor_object(turned);
  return 0;
}

int gemm_update(decltype(hotloop_gemm_update_f32) kernel, AtenTensorHandle w, AtenTensorHandle a,
                AtenTensorHandle b, AtenTensorHandle s1, AtenTensorHandle s2,
                AtenTensorHandle control, int64_t group) {
  View vw, va, vb, v1, v2;
  hotloop_update u;
  TRY(row_of(control, group, &u));
  TRY(vw.open(w));
  TRY(va.open(a));
  TRY(vb.open(b));
  if (s1) TRY(v1.open(s1));
  if (s2) TRY(v2.open(s2));
  int64_t m = va.sizes[0], k = va.sizes[1], n = vb.sizes[1];
  if (vw.strides[1] == 1) {
    kernel(m, n, k, va.data, va.strides[0], va.strides[1], vb.data, vb.strides[0], vb.strides[1],
           vw.data, vw.strides[0], v1.data, v2.data, vw.strides[0], nullptr, &u, 1.0f, threads);
  } else {  // A weight kept transposed: its transpose is b^T a^T.
    kernel(n, m, k, vb.data, vb.strides[1], vb.strides[0], va.data, va.strides[1], va.strides[0],
           vw.data, vw.strides[1], v1.data, v2.data, vw.strides[1], nullptr, &u, 1.0f, threads);
  }
  return 0;
}

// a @ b with what follows it, as the compiler hands it over.
int gemm(decltype(hotloop_gemm_f32) kernel, AtenTensorHandle a, AtenTensorHandle b,
         AtenTensorHandle* bias, AtenTensorHandle* mask, int64_t act, AtenTensorHandle* result) {
  View va, vb, vc, vm;
  TRY(va.open(a));
  TRY(vb.open(b));
  int64_t m = va.sizes[0], k = va.sizes[1], n = vb.sizes[1];
  const int64_t sizes[] = {m, n}, strides[] = {n, 1};
  TRY(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_float32(),
                               aoti_torch_device_type_cpu(), 0, result));
  TRY(vc.open(*result));
  void* offset = nullptr;
  if (bias && *bias) TRY(aoti_torch_get_data_ptr(*bias, &offset));
  if (mask && *mask) TRY(vm.open(*mask));
  kernel(m, n, k, va.data, va.strides[0], va.strides[1], vb.data, vb.strides[0], vb.strides[1],
         vc.data, n, static_cast<float*>(offset), static_cast<int32_t>(act), vm.data,
         vm.data ? vm.strides[0] : 0, threads);
  return 0;
}

}  // namespace

// An operator without a result gets a last argument that is null.
using H = AtenTensorHandle;
EXPORT int aoti_torch_cpu_update0_(H w, H g, H c, H* scale, int64_t group, H*) {
  return update(w, g, nullptr, nullptr, c, scale, group);
}
EXPORT int aoti_torch_cpu_update1_(H w, H g, H s1, H c, H* scale, int64_t group, H*) {
  return update(w, g, s1, nullptr, c, scale, group);
}
EXPORT int aoti_torch_cpu_update2_(H w, H g, H s1, H s2, H c, H* scale, int64_t group, H*) {
  return update(w, g, s1, s2, c, scale, group);
}
// `format`: f32 or bf16, `infix`: of the operator's name.
#define PRODUCTS(format, infix)                                                                    \
  EXPORT int aoti_torch_cpu_gemm##infix##_update0_(H w, H a, H b, H c, int64_t group, H*) {        \
    return gemm_update(hotloop_gemm_update_##format, w, a, b, nullptr, nullptr, c, group);         \
  }                                                                                                \
  EXPORT int aoti_torch_cpu_gemm##infix##_update1_(H w, H a, H b, H s1, H c, int64_t group, H*) {  \
    return gemm_update(hotloop_gemm_update_##format, w, a, b, s1, nullptr, c, group);              \
  }                                                                                                \
  EXPORT int aoti_torch_cpu_gemm##infix##_update2_(H w, H a, H b, H s1, H s2, H c, int64_t group,  \
                                                   H*) {                                           \
    return gemm_update(hotloop_gemm_update_##format, w, a, b, s1, s2, c, group);                   \
  }                                                                                                \
  EXPORT int aoti_torch_cpu_gemm##infix(H a, H b, H* bias, H* mask, int64_t act, H* result) {      \
    return gemm(hotloop_gemm_##format, a, b, bias, mask, act, result);                             \
  }
PRODUCTS(f32, )
#if defined(__AVX512BF16__)
PRODUCTS(bf16, _bf16)
#endif

// oneDNN's product. Inductor's own lowering of it wants a constant weight; this one does not. Weak: a
// torch without oneDNN has no such entry, and then no graph calls it.
extern "C" AOTITorchError aoti_torch_cpu__linear_pointwise(H x, H w, H* bias, const char* attr,
                                                           const double** scalars,
                                                           int64_t scalars_len,
                                                           const char** algorithm, H* result)
    __attribute__((weak));

EXPORT int aoti_torch_cpu_onednn(H a, H b, H* bias, H* result) {
  View vb;
  TRY(vb.open(b));
  int64_t offset = 0;
  TRY(aoti_torch_get_storage_offset(b, &offset));
  const int64_t sizes[] = {vb.sizes[1], vb.sizes[0]}, strides[] = {vb.strides[1], vb.strides[0]};
  H turned = nullptr;
  TRY(aoti_torch__reinterpret_tensor(b, 2, sizes, strides, offset, &turned));
  const double* none = nullptr;
  const char* algorithm = "";
  const int failed = aoti_torch_cpu__linear_pointwise(a, turned, bias && *bias ? bias : nullptr,
                                                      "none", &none, 0, &algorithm, result);
  aoti_torch_delete_tensor_object(turned);
  return failed;
}

// Dense [N, C, H, W], or with channels adjacent.
int dense(int64_t n, int64_t c, int64_t h, int64_t w, bool last, int32_t dtype, H* result) {
  const int64_t sizes[] = {n, c, h, w};
  const int64_t first[] = {c * h * w, h * w, w, 1}, adjacent[] = {c * h * w, 1, w * c, c};
  return aoti_torch_empty_strided(4, sizes, last ? adjacent : first, dtype,
                                  aoti_torch_device_type_cpu(), 0, result);
}

EXPORT int aoti_torch_cpu_pool(H x, int64_t kh, int64_t kw, int64_t relu, int64_t last, H* out,
                               H* places) {
  View vx, vo;
  TRY(vx.open(x));
  const int64_t *s = vx.sizes, *t = vx.strides;
  const hotloop_pool_shape shape{s[0], s[1], s[2], s[3], kh, kw, relu, last, t[0], t[1], t[2], t[3]};
  TRY(dense(s[0], s[1], s[2] / kh, s[3] / kw, last, aoti_torch_dtype_float32(), out));
  TRY(dense(s[0], s[1], s[2] / kh, s[3] / kw, t[1] == 1, aoti_torch_dtype_uint8(), places));
  TRY(vo.open(*out));
  void* bytes = nullptr;
  TRY(aoti_torch_get_data_ptr(*places, &bytes));
  hotloop_pool_f32(&shape, vx.data, vo.data, static_cast<uint8_t*>(bytes), threads);
  return 0;
}

EXPORT int aoti_torch_cpu_pool_backward(H gradient, H places, int64_t h, int64_t w, int64_t kh,
                                        int64_t kw, H* result) {
  View vg, vp, vr;
  TRY(vg.open(gradient));
  TRY(vp.open(places));
  const int64_t *s = vp.sizes;
  TRY(dense(s[0], s[1], h, w, vp.strides[1] == 1, aoti_torch_dtype_float32(), result));
  TRY(vr.open(*result));
  const int64_t* t = vr.strides;
  const hotloop_pool_shape shape{s[0], s[1], h, w, kh, kw, 0, 0, t[0], t[1], t[2], t[3]};
  hotloop_pool_backward_f32(&shape, vg.data, vg.strides, reinterpret_cast<uint8_t*>(vp.data),
                            vr.data, threads);
  return 0;
}

// Channels of x and of the results are adjacent, those of pooled results where `last`.
int conv_shape(const View& x, const View& w, int64_t pad_h, int64_t pad_w, hotloop_conv_shape* s) {
  const int64_t *n = x.sizes, *xs = x.strides, *ws = w.strides;
  *s = {n[0], n[1], n[2], n[3], w.sizes[0], pad_h, pad_w, 0, xs[0], xs[2], xs[3],
        ws[0], ws[1], ws[2], ws[3]};
  return xs[1] != 1;
}

EXPORT int aoti_torch_cpu_conv3x3(H x, H w, H* bias, int64_t pad_h, int64_t pad_w, int64_t relu,
                                  H* result) {
  View vx, vw, vo;
  hotloop_conv_shape s;
  TRY(vx.open(x));
  TRY(vw.open(w));
  TRY(conv_shape(vx, vw, pad_h, pad_w, &s));
  TRY(dense(s.N, s.O, s.H + 2 * pad_h - 2, s.W + 2 * pad_w - 2, true, aoti_torch_dtype_float32(),
            result));
  TRY(vo.open(*result));
  s.relu = relu, s.on = vo.strides[0], s.oc = 1, s.oh = vo.strides[2], s.ow = vo.strides[3];
  void* offset = nullptr;
  if (bias && *bias) TRY(aoti_torch_get_data_ptr(*bias, &offset));
  hotloop_conv3x3_f32(&s, vx.data, vw.data, static_cast<float*>(offset), vo.data, nullptr, threads);
  return 0;
}

EXPORT int aoti_torch_cpu_conv3x3_pool(H x, H w, H* bias, int64_t pad_h, int64_t pad_w,
                                       int64_t relu, int64_t last, H* out, H* places) {
  View vx, vw, vo;
  hotloop_conv_shape s;
  TRY(vx.open(x));
  TRY(vw.open(w));
  TRY(conv_shape(vx, vw, pad_h, pad_w, &s));
  const int64_t h = (s.H + 2 * pad_h - 2) / 2, v = (s.W + 2 * pad_w - 2) / 2;
  TRY(dense(s.N, s.O, h, v, last, aoti_torch_dtype_float32(), out));
  TRY(dense(s.N, s.O, h, v, true, aoti_torch_dtype_uint8(), places));
  TRY(vo.open(*out));
  const int64_t* o = vo.strides;
  s.relu = relu, s.on = o[0], s.oc = o[1], s.oh = o[2], s.ow = o[3];
  void *offset = nullptr, *bytes = nullptr;
  if (bias && *bias) TRY(aoti_torch_get_data_ptr(*bias, &offset));
  TRY(aoti_torch_get_data_ptr(*places, &bytes));
  hotloop_conv3x3_f32(&s, vx.data, vw.data, static_cast<float*>(offset), vo.data,
                      static_cast<uint8_t*>(bytes), threads);
  return 0;
}

// What both gradients need: the shape, the gradient of the results, their places if they were pooled.
int conv_gradient(H x, H g, H w, H* places, int64_t pad_h, int64_t pad_w, View* vx, View* vg,
                  View* vw, void** bytes, hotloop_conv_shape* s) {
  TRY(vx->open(x));
  TRY(vg->open(g));
  TRY(vw->open(w));
  TRY(conv_shape(*vx, *vw, pad_h, pad_w, s));
  const int64_t* t = vg->strides;
  s->gn = t[0], s->gc = t[1], s->gh = t[2], s->gw = t[3];
  if (places && *places) TRY(aoti_torch_get_data_ptr(*places, bytes));
  // Pooled gradients may be dense either way; others have their channels adjacent.
  const bool planes = *bytes && t[3] == 1 && t[2] == vg->sizes[3];
  return t[1] != 1 && !planes;
}

EXPORT int aoti_torch_cpu_conv3x3_input_gradient(H x, H g, H w, H* places, H* mask, int64_t pad_h,
                                                 int64_t pad_w, H* result) {
  View vx, vg, vw, vm, vr;
  hotloop_conv_shape s;
  void* bytes = nullptr;
  TRY(conv_gradient(x, g, w, places, pad_h, pad_w, &vx, &vg, &vw, &bytes, &s));
  TRY(dense(s.N, s.C, s.H, s.W, true, aoti_torch_dtype_float32(), result));
  TRY(vr.open(*result));
  if (mask && *mask) TRY(vm.open(*mask));
  s.xn = vr.strides[0], s.xh = vr.strides[2], s.xw = vr.strides[3];
  hotloop_conv3x3_input_gradient_f32(&s, vg.data, static_cast<uint8_t*>(bytes), vw.data, vm.data,
                                     vr.data, threads);
  return 0;
}

EXPORT int aoti_torch_cpu_conv3x3_weight_gradient(H x, H g, H w, H* places, int64_t pad_h,
                                                  int64_t pad_w, int64_t last, H* gw,
                                                  H* gb) {
  View vx, vg, vw, vr, vb;
  hotloop_conv_shape s;
  void* bytes = nullptr;
  TRY(conv_gradient(x, g, w, places, pad_h, pad_w, &vx, &vg, &vw, &bytes, &s));
  TRY(dense(s.O, s.C, 3, 3, last, aoti_torch_dtype_float32(), gw));
  const int64_t sizes[] = {s.O}, strides[] = {1};
  TRY(aoti_torch_empty_strided(1, sizes, strides, aoti_torch_dtype_float32(),
                               aoti_torch_device_type_cpu(), 0, gb));
  TRY(vr.open(*gw));
  TRY(vb.open(*gb));
  s.wo = vr.strides[0], s.wi = vr.strides[1], s.wh = vr.strides[2], s.ww = vr.strides[3];
  hotloop_conv3x3_weight_gradient_f32(&s, vx.data, vg.data, static_cast<uint8_t*>(bytes), vr.data,
                                      vb.data, threads);
  return 0;
}

// ---- The loop -------------------------------------------------------------------------------

namespace {

using Container = void*;
using Create = int (*)(Container*, size_t, const char*, const char*);
using Run = int (*)(Container, AtenTensorHandle*, size_t, AtenTensorHandle*, size_t, void*, void*);

struct Program {
  Run run = nullptr;
  Container container = nullptr;
  int64_t outputs = 1;
  std::vector<AtenTensorHandle> bound;  // All inputs but x and y.
};

// A tensor as Python hands it over: address, dtype code, dimensions, sizes, strides.
const int64_t* tensor_from(const int64_t* at, AtenTensorHandle* tensor, int* error) {
  const int64_t dims = at[2];
  *error = aoti_torch_create_tensor_from_blob(
      reinterpret_cast<void*>(at[0]), dims, at + 3, at + 3 + dims, 0, static_cast<int32_t>(at[1]),
      aoti_torch_device_type_cpu(), 0, tensor);
  return at + 3 + 2 * dims;
}

void forget(Program* program) {
  for (AtenTensorHandle handle : program->bound) aoti_torch_delete_tensor_object(handle);
  program->bound.clear();
}

}  // namespace

// Opens a compiled step. The container lives as long as the process: its library holds OpenMP code
// that must not be unmapped while threads may be in it.
EXPORT void* hotloop_program_open(const char* path, char* message, int64_t message_bytes) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    std::snprintf(message, message_bytes, "%s", dlerror());
    return nullptr;
  }
  auto create =
      reinterpret_cast<Create>(dlsym(library, "AOTInductorModelContainerCreateWithDevice"));
  auto run = reinterpret_cast<Run>(dlsym(library, "AOTInductorModelContainerRun"));
  Container container = nullptr;
  if (!create || !run || create(&container, 1, "cpu", nullptr) != 0) {
    std::snprintf(message, message_bytes, "not a compiled step");
    return nullptr;
  }
  auto* program = new Program;
  program->run = run;
  program->container = container;
  return program;
}

EXPORT void hotloop_program_close(void* opened) {
  auto* program = static_cast<Program*>(opened);
  forget(program);
  delete program;
}

// Fixes all inputs but the last two. Their memory stays the caller's.
EXPORT int hotloop_program_bind(void* opened, const int64_t* tensors, int64_t count) {
  auto* program = static_cast<Program*>(opened);
  forget(program);
  for (int64_t i = 0; i < count; ++i) {
    AtenTensorHandle handle = nullptr;
    int error = 0;
    tensors = tensor_from(tensors, &handle, &error);
    if (error) return 1;
    program->bound.push_back(handle);
  }
  return 0;
}

EXPORT void hotloop_set_threads(int32_t count) { threads = count; }

// What the kernels of all threads keep for packed factors and sums.
EXPORT int64_t hotloop_scratch_bytes() { return scratch_bytes; }

// Runs `steps` steps. Batch i is rows [i * rows, (i + 1) * rows) of x and y (two tensors in
// `batch`, described as for one batch; x_step and y_step are bytes from one batch to the next).
// Before step i, row i of `tables` is copied to `control`. Losses go to `losses`; counters[j], the
// optimizer's float step counts, grow by one a step.
EXPORT int hotloop_program_run(void* opened, const int64_t* batch, int64_t x_step, int64_t y_step,
                               int64_t steps, const char* tables, char* control,
                               int64_t table_bytes, float* losses, float** counters,
                               int64_t num_counters) {
  auto* program = static_cast<Program*>(opened);
  const size_t fixed = program->bound.size();
  std::vector<AtenTensorHandle> inputs(fixed + 2);
  std::vector<int64_t> described(batch, batch + 3 + 2 * batch[2]);
  const int64_t* second = batch + described.size();
  std::vector<int64_t> described_y(second, second + 3 + 2 * second[2]);
  for (int64_t i = 0; i < steps; ++i) {
    if (tables) std::memcpy(control, tables + i * table_bytes, table_bytes);
    for (size_t j = 0; j < fixed; ++j)
      TRY(aoti_torch_new_tensor_handle(program->bound[j], &inputs[j]));
    int error = 0;
    tensor_from(described.data(), &inputs[fixed], &error);
    if (error) return 1;
    tensor_from(described_y.data(), &inputs[fixed + 1], &error);
    if (error) return 1;
    AtenTensorHandle output = nullptr;
    TRY(program->run(program->container, inputs.data(), inputs.size(), &output, 1, nullptr,
                     nullptr));
    void* loss = nullptr;
    TRY(aoti_torch_get_data_ptr(output, &loss));
    losses[i] = *static_cast<float*>(loss);
    aoti_torch_delete_tensor_object(output);
    for (int64_t j = 0; j < num_counters; ++j) *counters[j] += 1.0f;
    described[0] += x_step;
    described_y[0] += y_step;
  }
  return 0;
}

#include "team.cpp"
