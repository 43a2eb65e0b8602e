// The program of a chunk: one worker's instructions, with what a chunk takes and hands over.
#pragma once

#include <cstdint>

#include "abi.h"

namespace hotloop {

// Runs chunk number `chunk` of a step. Its part of the batch is number `at` of those at `batch`, which has an address
// for each part; null: of those at the sources of the program's copies. Throws Error.
void run_chunk(const ChunkProgram& program, int64_t chunk, const char* const* batch, int64_t at);

}  // namespace hotloop
