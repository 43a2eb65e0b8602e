// Working memory that a thread keeps from one call of a kernel to the next.
#pragma once

#include <cstdint>

namespace hotloop {

// Grows to the largest demand and is freed when its thread ends. Declare it thread_local at the kernel
// that uses it, and reserve before threads part: memory for all of them comes from the one that calls, so
// a refusal is an error of the call and no other thread has to know.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  // `count` floats at a whole cache line; their values are those of the last use. Throws Error.
  float* reserve(int64_t count);

 private:
  void release();

  float* data_ = nullptr;
  int64_t count_ = 0;
};

// Scratch of all threads.
int64_t scratch_bytes();

// A piece of scratch for each thread of a parallel region: piece i starts at i * stride.
struct Pieces {
  float* data;
  int64_t stride;

  // `count` floats for each of `threads`. Throws Error.
  Pieces(Scratch& scratch, int64_t count, int threads)
      : data(nullptr), stride((count + 15) / 16 * 16) {
    data = scratch.reserve(stride * threads);
  }

  float* of(int thread) const { return data + thread * stride; }
};

}  // namespace hotloop
