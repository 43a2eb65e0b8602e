// Matrix products of float32 matrices with what follows them done while the results are in registers or in
// the first-level cache. Every sum is taken in one order, whatever the number of threads. They throw Error.
#pragma once

#include "abi.h"

namespace hotloop {

// Calls with `bfloat16` set throw Error where this is false: the processor of this library's level has no
// instruction for it.
bool has_bfloat16_products();

void product(const ProductCall& call);

// The product is a weight's gradient, and what follows is the optimizer's update of that weight.
void product_update(const ProductUpdateCall& call);

}  // namespace hotloop
