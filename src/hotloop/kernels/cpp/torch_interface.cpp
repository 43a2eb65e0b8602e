#include "torch_interface.h"

#include "error.h"

namespace hotloop {
namespace {

TorchInterface interface{};

}  // namespace

const TorchInterface& torch_interface() { return interface; }

}  // namespace hotloop

HOTLOOP_EXPORT void hotloop_use_torch(const hotloop::TorchInterface* torch) {
  hotloop::interface = *torch;
}
