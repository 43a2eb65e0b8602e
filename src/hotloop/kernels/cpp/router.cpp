// Float32 matrix products of a running program by the fastest of torch's kernel, oneDNN's and hotloop's.
//
// Registered over mm and bmm of torch's CPU key, below autograd, through torch's stable C interface. That
// cannot pass a Scalar, which addmm has two of; so `hotloop::routed_addmm` is addmm with beta = alpha = 1 and a bias, and
// Python leads addmm here (kernels/router.py).
#include <algorithm>
#include <cstring>
#include <string>

#include "error.h"
#include "parallel.h"
#include "product_choices.h"
#include "products.h"
#include "torch_interface.h"

namespace hotloop {
namespace {

// An argument or result of a kernel as torch's boxed calls pass it: a tensor is an owned handle.
using Value = uint64_t;

class OwnedTensor {
 public:
  OwnedTensor() = default;
  explicit OwnedTensor(Value value) : tensor_(reinterpret_cast<Tensor>(value)) {}
  OwnedTensor(const OwnedTensor&) = delete;
  ~OwnedTensor() {
    if (tensor_)
      call_torch<int32_t(Tensor)>(torch_interface().aoti_torch_delete_tensor_object, tensor_);
  }

  Tensor get() const { return tensor_; }
  Tensor* out() { return &tensor_; }
  Value release() {
    const Value value = reinterpret_cast<Value>(tensor_);
    tensor_ = nullptr;
    return value;
  }

 private:
  Tensor tensor_ = nullptr;
};

// Throws what torch said, which becomes the RuntimeError that the program would have seen.
[[noreturn]] void throw_torchs_error() {
  void* entry = torch_interface().torch_exception_get_what_without_backtrace;
  throw Error(entry ? call_torch<const char*()>(entry) : "torch refused a matrix product");
}

void check(int32_t status) {
  if (status != 0) throw_torchs_error();
}

template <class Result>
Result ask(void* entry, Tensor tensor) {
  Result result{};
  check(call_torch<int32_t(Tensor, Result*)>(entry, tensor, &result));
  return result;
}

// What must be known of a tensor; data only where its elements are used.
struct View {
  Tensor tensor;
  int64_t dim;
  const int64_t *sizes, *strides;

  explicit View(Tensor given) : tensor(given) {
    const TorchInterface& torch = torch_interface();
    dim = ask<int64_t>(torch.aoti_torch_get_dim, tensor);
    sizes = ask<int64_t*>(torch.aoti_torch_get_sizes, tensor);
    strides = ask<int64_t*>(torch.aoti_torch_get_strides, tensor);
  }

  int64_t rows() const { return sizes[dim - 2]; }
  int64_t columns() const { return sizes[dim - 1]; }
  int64_t row_stride() const { return strides[dim - 2]; }
  int64_t column_stride() const { return strides[dim - 1]; }

  bool is_plain() const {
    const TorchInterface& torch = torch_interface();
    return ask<int32_t>(torch.aoti_torch_get_dtype, tensor) == kFloat32 &&
           ask<int32_t>(torch.aoti_torch_get_layout, tensor) == kStrided &&
           ask<int32_t>(torch.aoti_torch_get_device_type, tensor) == kCpu;
  }

  // Without a copy of a tensor that is copied when it is written.
  const float* data() const {
    return static_cast<const float*>(
        ask<const void*>(torch_interface().torch_get_const_data_ptr, tensor));
  }

  // Whether the last two dimensions are a matrix as BLAS takes one; `transposed` says which way.
  bool is_matrix(bool* transposed) const {
    if (dim == 3 && sizes[0] > 1 && strides[0] < 1) return false;  // Expanded.
    *transposed = !(column_stride() == 1 && row_stride() >= std::max<int64_t>(1, columns()));
    return !*transposed || (row_stride() == 1 && column_stride() >= std::max<int64_t>(1, rows()));
  }

  bool is_contiguous() const {
    return column_stride() == 1 && row_stride() == columns() &&
           (dim == 2 || strides[0] == rows() * columns());
  }

  // One behind the last element.
  const float* end() const {
    int64_t last = 0;
    for (int64_t i = 0; i < dim; ++i) last += (sizes[i] - 1) * strides[i];
    return data() + last + 1;
  }

  bool overlaps(const View& other) const { return data() < other.end() && other.data() < end(); }
};

struct Product {
  const View &a, &b;
  const View* bias;  // [n], or null.
  int64_t batch, m, k, n;
  int threads;

  ProductChoice* choice(bool into_out) const {
    bool a_transposed, b_transposed;
    if (!are_products_exact() || !a.is_plain() || !b.is_plain() || !a.is_matrix(&a_transposed) ||
        !b.is_matrix(&b_transposed) || is_in_parallel())
      return nullptr;
    if (bias && (bias->dim != 1 || bias->sizes[0] != n || bias->strides[0] != 1 || !bias->is_plain()))
      return nullptr;
    const int32_t layout = (a_transposed ? kTransposedA : 0) | (b_transposed ? kTransposedB : 0) |
                           (bias ? kAddsBias : 0) | (into_out ? kIntoOut : 0);
    return find_product_choice({batch, m, k, n, layout, threads});
  }
};

// The product of tensors that may be routed; false: torch's affair, errors included.
bool is_routable(const View& a, const View& b, int64_t dim, int64_t* batch) {
  if (a.dim != dim || b.dim != dim || a.columns() != b.rows()) return false;
  if (dim == 3 && a.sizes[0] != b.sizes[0]) return false;
  *batch = dim == 3 ? a.sizes[0] : 0;
  const double work = static_cast<double>(a.rows()) * static_cast<double>(a.columns()) *
                      static_cast<double>(b.columns()) *
                      static_cast<double>(dim == 3 ? *batch : 1);
  return work != 0 && work >= static_cast<double>(least_product_work());
}

int torch_threads() {
  uint32_t threads = 1;
  check(call_torch<int32_t(uint32_t*)>(torch_interface().torch_get_num_threads, &threads));
  return static_cast<int>(threads);
}

Tensor new_result(const View& a, const View& b, int32_t dtype) {
  const int64_t rows = a.rows(), columns = b.columns();
  const int64_t sizes[3] = {a.sizes[0], rows, columns};
  const int64_t strides[3] = {std::max<int64_t>(1, rows) * std::max<int64_t>(1, columns),
                              std::max<int64_t>(1, columns), 1};
  const int64_t skip = a.dim == 3 ? 0 : 1;
  Tensor made = nullptr;
  check(call_torch<int32_t(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                           Tensor*)>(torch_interface().aoti_torch_empty_strided, 3 - skip,
                                     sizes + skip, strides + skip, dtype, kCpu, 0, &made));
  return made;
}

// Kernels ----------------------------------------------------------------------------------------

void by_torch(Tensor a, Tensor b, Tensor bias, int64_t dim, Tensor out) {
  const TorchInterface& torch = torch_interface();
  if (bias) {
    check(call_torch<int32_t(Tensor, Tensor, Tensor, Tensor, double, double)>(
        torch.aoti_torch_cpu_addmm_out, out, bias, a, b, 1.0, 1.0));
  } else {
    check(call_torch<int32_t(Tensor, Tensor, Tensor)>(
        dim == 3 ? torch.aoti_torch_cpu_bmm_out : torch.aoti_torch_cpu_mm_out, out, a, b));
  }
}

// False: it could not.
bool by_onednn(const Product& product, Tensor* result) {
  const TorchInterface& torch = torch_interface();
  const View& b = product.b;
  const int64_t sizes[2] = {product.n, product.k};
  const int64_t strides[2] = {b.column_stride(), b.row_stride()};
  OwnedTensor weight;
  check(call_torch<int32_t(Tensor, int64_t, const int64_t*, const int64_t*, int64_t, Tensor*)>(
      torch.aoti_torch__reinterpret_tensor, b.tensor, 2, sizes, strides, 0, weight.out()));
  Tensor bias = product.bias ? product.bias->tensor : nullptr;
  const char* algorithm = "";
  return call_torch<int32_t(Tensor, Tensor, Tensor*, const char*, const double**, int64_t,
                            const char**, Tensor*)>(
             torch.aoti_torch_cpu__linear_pointwise, product.a.tensor, weight.get(),
             bias ? &bias : nullptr, "none", nullptr, 0, &algorithm, result) == 0;
}

ProductCall call_of(const Product& product, float* out, int threads) {
  ProductCall call{};
  call.m = product.m, call.n = product.n, call.k = product.k;
  call.a = {product.a.data(), product.a.row_stride(), product.a.column_stride()};
  call.b = {product.b.data(), product.b.row_stride(), product.b.column_stride()};
  call.c = out;
  call.c_row_stride = product.n;
  call.bias = product.bias ? product.bias->data() : nullptr;
  call.num_threads = threads;
  return call;
}

// False: there was no memory for it.
bool by_hotloop(const Product& product, Tensor out) {
  void* data = nullptr;
  check(data_of(out, &data));
  const ProductCall first = call_of(product, static_cast<float*>(data), product.threads);
  if (product.batch < 1) return guarded([&] { hotloop::product(first); }) == 0;
  std::atomic<bool> done{true};
  const bool many = product.batch >= product.threads;  // Else the threads share each product.
  const auto make = [&](int64_t i) {
    ProductCall call = first;
    call.a.data += i * product.a.strides[0];
    call.b.data += i * product.b.strides[0];
    call.c += i * product.m * product.n;
    call.num_threads = many ? 1 : product.threads;
    if (guarded([&] { hotloop::product(call); }) != 0) done = false;
  };
  parallel_for(many ? product.threads : 1, product.batch, make);
  return done;
}

// Operators --------------------------------------------------------------------------------------

unsigned candidates_of(const Product& product, bool into_out) {
  const bool onednn = !into_out && product.batch == 0 &&
                      torch_interface().aoti_torch_cpu__linear_pointwise != nullptr;
  return 1u << kTorch | (onednn ? 1u << kOneDnn : 0) | 1u << kHotloop;
}

// `out`: where the result goes, or null; the result is `made` then.
void route(const Product& product, ProductChoice& choice, Tensor out, OwnedTensor& made) {
  ProductTurn turn(choice, candidates_of(product, out != nullptr));
  if (turn.kernel() == kOneDnn) {
    if (by_onednn(product, made.out())) return;
    turn.give_up();
  }
  if (!out) out = *made.out() = new_result(product.a, product.b, kFloat32);
  if (turn.kernel() == kHotloop) {
    if (by_hotloop(product, out)) return;
    turn.give_up();
  }
  by_torch(product.a.tensor, product.b.tensor, product.bias ? product.bias->tensor : nullptr,
           product.a.dim, out);
}

// The result of a product without `out`, as an owned handle.
Value make(Tensor a_tensor, Tensor b_tensor, Tensor bias_tensor, int64_t dim) {
  const View a(a_tensor), b(b_tensor);
  OwnedTensor made;
  int64_t batch;
  if (is_routable(a, b, dim, &batch)) {
    const View bias(bias_tensor ? bias_tensor : a_tensor);
    const Product product{a, b, bias_tensor ? &bias : nullptr, batch,          a.rows(),
                          a.columns(), b.columns(), torch_threads()};
    if (ProductChoice* choice = product.choice(false)) {
      route(product, *choice, nullptr, made);
      return made.release();
    }
  }
  // torch checks the rest; it makes its result as large as it should be.
  const int32_t dtype = ask<int32_t>(torch_interface().aoti_torch_get_dtype, a_tensor);
  if (a.dim == dim && b.dim == dim) {
    *made.out() = new_result(a, b, dtype);
  } else {
    const int64_t none[1] = {0}, one[1] = {1};
    check(call_torch<int32_t(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                             Tensor*)>(torch_interface().aoti_torch_empty_strided, 1, none, one,
                                       dtype, kCpu, 0, made.out()));
  }
  by_torch(a_tensor, b_tensor, bias_tensor, dim, made.get());
  return made.release();
}

// Into `out`, which may have another shape, layout or type: then it is torch's affair.
void make_into(Tensor a_tensor, Tensor b_tensor, Tensor out_tensor, int64_t dim) {
  const View a(a_tensor), b(b_tensor), out(out_tensor);
  int64_t batch;
  if (is_routable(a, b, dim, &batch) && out.dim == dim && out.rows() == a.rows() &&
      out.columns() == b.columns() && (dim == 2 || out.sizes[0] == batch) && out.is_plain() &&
      out.is_contiguous() && !out.overlaps(a) && !out.overlaps(b)) {
    const Product product{a, b, nullptr, batch, a.rows(), a.columns(), b.columns(), torch_threads()};
    if (ProductChoice* choice = product.choice(true)) {
      OwnedTensor unused;
      route(product, *choice, out_tensor, unused);
      return;
    }
  }
  by_torch(a_tensor, b_tensor, nullptr, dim, out_tensor);
}

// The arguments are owned, and so is the result that takes their place.
template <int dim>
void boxed_product(Value* stack, uint64_t, uint64_t) {
  const OwnedTensor a(stack[0]), b(stack[1]);
  stack[0] = make(a.get(), b.get(), nullptr, dim);
}

template <int dim>
void boxed_product_out(Value* stack, uint64_t, uint64_t) {
  const OwnedTensor a(stack[0]), b(stack[1]);
  OwnedTensor out(stack[2]);
  make_into(a.get(), b.get(), out.get(), dim);
  stack[0] = out.release();
}

void boxed_addmm(Value* stack, uint64_t, uint64_t) {
  const OwnedTensor bias(stack[0]), a(stack[1]), b(stack[2]);
  stack[0] = make(a.get(), b.get(), bias.get(), 2);
}

using Boxed = void (*)(Value*, uint64_t, uint64_t);

void implement(void* library, const char* name, Boxed kernel) {
  check(call_torch<int32_t(void*, const char*, Boxed)>(torch_interface().aoti_torch_library_impl,
                                                       library, name, kernel));
}

void* new_library(const char* space, const char* key) {
  void* library = nullptr;
  check(call_torch<int32_t(const char*, const char*, const char*, uint32_t, void**)>(
      torch_interface().aoti_torch_library_init_impl, space, key, "router.cpp", __LINE__, &library));
  return library;
}

void delete_library(void* library) {
  call_torch<int32_t(void*)>(torch_interface().aoti_torch_delete_library_object, library);
}

void* installed = nullptr;

// The operator of our own, for the life of the process.
void define_addmm() {
  static bool is_defined = false;
  if (is_defined) return;
  void* fragment = nullptr;
  check(call_torch<int32_t(const char*, const char*, uint32_t, void**)>(
      torch_interface().aoti_torch_library_init_fragment, "hotloop", "router.cpp", __LINE__, &fragment));
  check(call_torch<int32_t(void*, const char*)>(
      torch_interface().aoti_torch_library_def, fragment,
      "routed_addmm(Tensor bias, Tensor a, Tensor b) -> Tensor"));
  implement(new_library("hotloop", "CPU"), "routed_addmm", boxed_addmm);
  is_defined = true;
}

}  // namespace
}  // namespace hotloop

using namespace hotloop;

HOTLOOP_EXPORT int32_t hotloop_router_install() {
  return guarded([] {
    if (installed) return;
    const TorchInterface& torch = torch_interface();
    for (void* entry : {torch.aoti_torch_library_init_impl, torch.aoti_torch_library_impl,
                        torch.torch_get_const_data_ptr, torch.aoti_torch_cpu_mm_out})
      if (!entry) throw Error("torch must have its stable C interface (2.11 or newer)");
    define_addmm();
    void* library = new_library("aten", "CPU");
    try {
      implement(library, "mm", boxed_product<2>);
      implement(library, "mm.out", boxed_product_out<2>);
      implement(library, "bmm", boxed_product<3>);
      implement(library, "bmm.out", boxed_product_out<3>);
    } catch (...) {
      delete_library(library);
      throw;
    }
    installed = library;
  });
}

HOTLOOP_EXPORT void hotloop_router_remove() {
  if (installed) delete_library(installed);
  installed = nullptr;
}
