// Matrix products that torch makes, as instructions of a program: no interpreter, no autograd.
#include <cstring>

#include "torch_interface.h"

namespace hotloop {
namespace {

void by_onednn(const TorchProductCall& call) {
  Tensor bias = call.bias, made = nullptr;
  using Linear = int32_t(Tensor, Tensor, Tensor*, const char*, const double**, int64_t,
                         const char**, Tensor*);
  const double* no_scalars = nullptr;
  const char* algorithm = "";
  HOTLOOP_TORCH(aoti_torch_cpu__linear_pointwise, Linear, call.a, call.b, bias ? &bias : nullptr,
                "none", &no_scalars, 0, &algorithm, &made);
  const OwnedTensor result(made);
  std::memcpy(data_of<float>(call.out), data_of<float>(result.get()),
              numel_of(call.out) * sizeof(float));
}

void by_torch(const TorchProductCall& call) {
  if (call.bias) {
    using Addmm = int32_t(Tensor, Tensor, Tensor, Tensor, double, double);
    HOTLOOP_TORCH(aoti_torch_cpu_addmm_out, Addmm, call.out, call.bias, call.a, call.b, 1.0, 1.0);
  } else if (call.is_batch) {
    HOTLOOP_TORCH(aoti_torch_cpu_bmm_out, int32_t(Tensor, Tensor, Tensor), call.out, call.a,
                  call.b);
  } else {
    HOTLOOP_TORCH(aoti_torch_cpu_mm_out, int32_t(Tensor, Tensor, Tensor), call.out, call.a,
                  call.b);
  }
}

}  // namespace
}  // namespace hotloop

using namespace hotloop;

HOTLOOP_EXPORT int32_t hotloop_torch_product(const TorchProductCall* product) {
  return guarded([&] { product->by_onednn ? by_onednn(*product) : by_torch(*product); });
}
