// A compiled step (a library that torch's AOTInductor made) that runs without the interpreter.
#pragma once

#include <cstdint>
#include <vector>

#include "abi.h"
#include "torch_interface.h"

namespace hotloop {

// Threads inside each kernel that compiled steps of the calling thread call.
int64_t step_threads();

// Sets that number, and the former one when it ends.
class StepThreads {
 public:
  explicit StepThreads(int64_t count);
  ~StepThreads();
  StepThreads(const StepThreads&) = delete;
  StepThreads& operator=(const StepThreads&) = delete;

 private:
  int64_t before_;
};

// What AOTInductor calls a container: a compiled step that one thread runs at a time. It lives as long as the
// process, as its library does: that has OpenMP code that must not be unmapped while threads may be in it.
class Container {
 public:
  // Throws Error.
  explicit Container(const CompiledStep& step);

  // Runs once and returns the loss. `fixed` are all inputs but x and y. Throws Error.
  float run(const std::vector<OwnedTensor>& fixed, const TensorSpec& x, const TensorSpec& y) const;

 private:
  void* run_;
  void* container_ = nullptr;
};

// Tensors of `count` descriptions. Throws Error.
std::vector<OwnedTensor> tensors_of(const TensorSpec* specs, int64_t count);

// `spec`, `bytes` further on.
inline TensorSpec moved(TensorSpec spec, int64_t bytes) {
  spec.data = static_cast<char*>(spec.data) + bytes;
  return spec;
}

}  // namespace hotloop
