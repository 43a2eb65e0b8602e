// What follows the chunks of a step: their gradients are added and the weights updated.
#pragma once

#include <cstdint>
#include <vector>

#include "abi.h"

namespace hotloop {

// The share of worker `worker` of `workers` of every weight, by the gradients of `chunks` chunks. `table`: a row for
// each parameter group; null where no weight is updated. Throws Error.
void update_share(const std::vector<TeamWeight>& weights, int64_t chunks, int worker, int workers,
                  const ControlRow* table);

// Each buffer becomes the mean of what the chunks made of it, or the first one's.
void combine(const std::vector<TeamBuffer>& buffers, int64_t chunks);

}  // namespace hotloop
