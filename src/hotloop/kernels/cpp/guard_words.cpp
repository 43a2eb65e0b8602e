// Guards of a recorded step: whether the memory of Python's objects and of torch's tensors is as it was.
#include <algorithm>
#include <cstdint>

#include "abi.h"
#include "torch_interface.h"

namespace hotloop {
namespace {

bool is_as_expected(const GuardTensor& guard) {
  const TorchInterface& torch = torch_interface();
  // A handle is the address of a tensor, whose one member is the pointer in the slot.
  const Tensor tensor = const_cast<uint64_t*>(guard.slot);
  void* data = nullptr;
  int64_t dims = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  using Number = int32_t(Tensor, int64_t*);
  using Numbers = int32_t(Tensor, int64_t**);
  return data_of(tensor, &data) == 0 && data == guard.data &&
         call_torch<Number>(torch.aoti_torch_get_dim, tensor, &dims) == 0 && dims == guard.dims &&
         call_torch<Numbers>(torch.aoti_torch_get_sizes, tensor, &sizes) == 0 &&
         std::equal(sizes, sizes + dims, guard.sizes_and_strides) &&
         call_torch<Numbers>(torch.aoti_torch_get_strides, tensor, &strides) == 0 &&
         std::equal(strides, strides + dims, guard.sizes_and_strides + dims);
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int64_t hotloop_first_changed_word(const hotloop::GuardWord* words, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (*words[i].address != words[i].expected) return i;
  return -1;
}

HOTLOOP_EXPORT int64_t hotloop_first_changed_tensor(const hotloop::GuardTensor* tensors,
                                                    int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!hotloop::is_as_expected(tensors[i])) return i;
  return -1;
}
