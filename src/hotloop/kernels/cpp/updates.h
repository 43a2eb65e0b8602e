// Optimizer updates of weights whose gradients lie in memory.
#pragma once

#include "abi.h"

namespace hotloop {

void update(const UpdateCall& call);

}  // namespace hotloop
