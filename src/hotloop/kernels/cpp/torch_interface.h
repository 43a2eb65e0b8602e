// torch's C interface, which stays the same from one version of torch to the next. The library is not linked
// with torch: Python looks the entries up and hands them over before anything here is called.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "abi.h"
#include "error.h"

namespace hotloop {

// A tensor of torch's: torch's AtenTensorHandle.
using Tensor = void*;

// Codes of torch::headeronly::ScalarType and of layouts, devices.
constexpr int32_t kFloat32 = 6;
constexpr int32_t kCpu = 0, kStrided = 0;

const TorchInterface& torch_interface();

// Calls an entry, whose type is Signature. Each returns a status: 0 is done.
template <class Signature, class... Arguments>
auto call_torch(void* entry, Arguments... arguments) {
  return reinterpret_cast<Signature*>(entry)(arguments...);
}

inline int32_t data_of(Tensor tensor, void** data) {
  return call_torch<int32_t(Tensor, void**)>(torch_interface().aoti_torch_get_data_ptr, tensor,
                                             data);
}

// What follows throws Error where torch refuses.

template <class Signature, class... Arguments>
void require_torch(const char* name, void* entry, Arguments... arguments) {
  if (!entry) throw Error(std::string("this torch must have ") + name);
  if (call_torch<Signature>(entry, arguments...) != 0)
    throw Error(std::string("torch must do what a kernel asks of it (got: ") + name + " failed)");
}

#define HOTLOOP_TORCH(name, signature, ...) \
  require_torch<signature>(#name, torch_interface().name, __VA_ARGS__)

template <class Value>
Value* data_of(Tensor tensor) {
  void* data = nullptr;
  HOTLOOP_TORCH(aoti_torch_get_data_ptr, int32_t(Tensor, void**), tensor, &data);
  return static_cast<Value*>(data);
}

inline int64_t numel_of(Tensor tensor) {
  int64_t count = 0;
  HOTLOOP_TORCH(aoti_torch_get_numel, int32_t(Tensor, int64_t*), tensor, &count);
  return count;
}

// A handle that is ours to delete, until it is given away.
class OwnedTensor {
 public:
  OwnedTensor() = default;
  explicit OwnedTensor(Tensor handle) : handle_(handle) {}
  OwnedTensor(OwnedTensor&& other) noexcept : handle_(other.release()) {}
  OwnedTensor& operator=(OwnedTensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~OwnedTensor() {
    if (handle_)
      call_torch<int32_t(Tensor)>(torch_interface().aoti_torch_delete_tensor_object, handle_);
  }

  Tensor get() const { return handle_; }
  Tensor release() { return std::exchange(handle_, nullptr); }

 private:
  Tensor handle_ = nullptr;
};

}  // namespace hotloop
