// torch's C interface, which stays the same from one version of torch to the next. The library is not linked
// with torch: Python looks the entries up and hands them over before anything here is called.
#pragma once

#include <cstdint>

#include "abi.h"

namespace hotloop {

// A tensor of torch's: torch's AtenTensorHandle.
using Tensor = void*;

// Codes of torch::headeronly::ScalarType and of layouts, devices.
constexpr int32_t kUInt8 = 0, kFloat32 = 6;
constexpr int32_t kCpu = 0;

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

}  // namespace hotloop
