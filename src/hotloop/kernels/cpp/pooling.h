// Max pooling, forward and backward, in float32.
#pragma once

#include "abi.h"

namespace hotloop {

void pool(const PoolCall& call);
void pool_backward(const PoolBackwardCall& call);

}  // namespace hotloop
