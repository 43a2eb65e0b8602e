// The loop over a program: calls of kernels in order, step after step, without the interpreter.
#include <cstring>

#include "control_row.h"
#include "error.h"
#include "parallel.h"

namespace hotloop {
namespace {

// Inputs of fewer bytes are copied by one thread.
constexpr int64_t kOneThreadBytes = 1 << 20, kLineBytes = 64;

void copy_input(const InputCopy& input, int64_t step, int64_t num_threads) {
  const int threads = input.bytes < kOneThreadBytes ? 1 : static_cast<int>(num_threads);
  const char* source = input.source + step * input.step_bytes;
  parallel(threads, [&](Worker worker) {
    const Range mine = share(input.bytes, kLineBytes, worker);
    if (mine.end > mine.begin)
      std::memcpy(input.target + mine.begin, source + mine.begin,
                  static_cast<size_t>(mine.end - mine.begin));
  });
}

int32_t run_step(InstructionRun& run) {
  for (int64_t i = 0; i < run.num_inputs; ++i)
    copy_input(run.inputs[i], run.steps_done, run.num_threads);
  const ControlRow* table = run.tables ? run.tables + run.steps_done * run.groups : nullptr;
  for (int64_t i = 0; i < run.num_instructions; ++i) {
    const Instruction& instruction = run.instructions[i];
    if (instruction.rule && table) *instruction.rule = rule_of(table[instruction.group]);
    const int32_t status = reinterpret_cast<int32_t (*)(void*)>(instruction.entry)(instruction.call);
    if (status == 0) continue;
    run.failed = i;
    return status;
  }
  if (run.loss && run.losses) run.losses[run.steps_done] = *run.loss;
  for (int64_t i = 0; i < run.num_counters; ++i) *run.counters[i] += 1.0f;
  return 0;
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_run_instructions(hotloop::InstructionRun* run) {
  using namespace hotloop;
  run->failed = -1;
  int32_t status = 0;
  const int32_t thrown = guarded([&] {
    for (run->steps_done = 0; run->steps_done < run->steps && status == 0;) {
      status = run_step(*run);
      if (status == 0) ++run->steps_done;
    }
  });
  return thrown ? thrown : status;
}
