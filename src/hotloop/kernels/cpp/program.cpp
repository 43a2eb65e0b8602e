#include "program.h"

#include <cstring>
#include <memory>

#include "error.h"

namespace hotloop {
namespace {

thread_local int64_t threads = 1;

struct Program {
  Container container;
  std::vector<OwnedTensor> bound;  // All inputs but x and y.

  void run(const ProgramRun& run) const {
    const StepThreads inside(run.num_threads);
    for (int64_t i = 0; i < run.steps; ++i) {
      if (run.tables)
        std::memcpy(run.control, run.tables + i * run.table_bytes,
                    static_cast<size_t>(run.table_bytes));
      run.losses[i] = container.run(bound, moved(run.x, i * run.x_step_bytes),
                                    moved(run.y, i * run.y_step_bytes));
      for (int64_t j = 0; j < run.num_counters; ++j) *run.counters[j] += 1.0f;
    }
  }
};

}  // namespace

int64_t step_threads() { return threads; }

StepThreads::StepThreads(int64_t count) : before_(threads) { threads = count; }

StepThreads::~StepThreads() { threads = before_; }

Container::Container(const CompiledStep& step) : run_(step.run) {
  using Create = int32_t(void**, size_t, const char*, const char*);
  constexpr size_t kModels = 1;  // Each thread has a container of its own.
  if (call_torch<Create>(step.create, &container_, kModels, "cpu", nullptr) != 0)
    throw Error("a compiled step must load (got: its container cannot be made)");
}

float Container::run(const std::vector<OwnedTensor>& fixed, const TensorSpec& x,
                     const TensorSpec& y) const {
  using Run = int32_t(void*, Tensor*, size_t, Tensor*, size_t, void*, void*);
  std::vector<OwnedTensor> inputs;
  inputs.reserve(fixed.size() + 2);
  for (const OwnedTensor& tensor : fixed) inputs.push_back(another(tensor.get()));
  inputs.push_back(tensor_of(x));
  inputs.push_back(tensor_of(y));
  std::vector<Tensor> handles;
  handles.reserve(inputs.size());
  for (OwnedTensor& input : inputs) handles.push_back(input.release());  // The step deletes them.
  Tensor output = nullptr;
  set_error("");
  const int32_t failed = call_torch<Run>(run_, container_, handles.data(), handles.size(), &output,
                                         size_t{1}, nullptr, nullptr);
  const OwnedTensor loss(output);
  if (failed) {
    const char* words = hotloop_error();  // Of a kernel of ours that it called.
    throw Error(*words ? words : "a compiled step must run (got: torch refused an operation)");
  }
  return *data_of<float>(loss.get());
}

std::vector<OwnedTensor> tensors_of(const TensorSpec* specs, int64_t count) {
  std::vector<OwnedTensor> made;
  made.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) made.push_back(tensor_of(specs[i]));
  return made;
}

}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_program_open(const hotloop::CompiledStep* step, void** program) {
  using namespace hotloop;
  return guarded([&] { *program = new Program{Container(*step), {}}; });
}

HOTLOOP_EXPORT void hotloop_program_close(void* program) {
  delete static_cast<hotloop::Program*>(program);
}

HOTLOOP_EXPORT int32_t hotloop_program_bind(void* program, const hotloop::TensorSpec* inputs,
                                            int64_t count) {
  using namespace hotloop;
  return guarded(
      [&] { static_cast<Program*>(program)->bound = tensors_of(inputs, count); });
}

HOTLOOP_EXPORT int32_t hotloop_program_run(void* program, const hotloop::ProgramRun* run) {
  using namespace hotloop;
  return guarded([&] { static_cast<const Program*>(program)->run(*run); });
}
