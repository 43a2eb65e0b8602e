#include "chunk_program.h"

#include <cstring>

#include "error.h"

namespace hotloop {
namespace {

void copy(const ChunkCopy& given, const char* source, char* target) {
  if (given.scale == 0.0f) {
    std::memcpy(target, source, static_cast<size_t>(given.bytes));
    return;
  }
  const float* from = reinterpret_cast<const float*>(source);
  float* to = reinterpret_cast<float*>(target);
  const int64_t count = given.bytes / static_cast<int64_t>(sizeof(float));
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] * given.scale;
}

}  // namespace

void run_chunk(const ChunkProgram& program, int64_t chunk, const char* const* batch, int64_t at) {
  for (int64_t i = 0; i < program.num_taken; ++i) {
    const ChunkCopy& taken = program.taken[i];
    const bool of_batch = i < program.num_batch;
    const char* source = of_batch && batch ? batch[i] : taken.source;
    copy(taken, source + (of_batch ? at : chunk) * taken.source_step,
         taken.target + chunk * taken.target_step);
  }
  for (int64_t i = 0; i < program.num_instructions; ++i) {
    const Instruction& instruction = program.instructions[i];
    if (reinterpret_cast<int32_t (*)(void*)>(instruction.entry)(instruction.call))
      throw Error(hotloop_error());
  }
  for (int64_t i = 0; i < program.num_given; ++i) {
    const ChunkCopy& given = program.given[i];
    copy(given, given.source + chunk * given.source_step,
         given.target + chunk * given.target_step);
  }
}

}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_chunk_run(const hotloop::ChunkProgram* program, int64_t chunk) {
  using namespace hotloop;
  return guarded([&] { run_chunk(*program, chunk, nullptr, chunk); });
}
