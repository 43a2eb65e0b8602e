#include "scratch.h"

#include <atomic>
#include <cstdlib>

#include "abi.h"
#include "error.h"

namespace hotloop {
namespace {

constexpr int64_t kGrain = 1024;  // Floats: a demand that grows by little does not allocate again.
std::atomic<int64_t> total_bytes{0};

}  // namespace

float* Scratch::reserve(int64_t count) {
  if (count > count_) {
    release();
    const int64_t rounded = (count + kGrain - 1) / kGrain * kGrain;
    const int64_t bytes = rounded * static_cast<int64_t>(sizeof(float));
    data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
    if (!data_) throw_out_of_memory(bytes);
    count_ = rounded;
    total_bytes += bytes;
  }
  return data_;
}

void Scratch::release() {
  std::free(data_);
  total_bytes -= count_ * static_cast<int64_t>(sizeof(float));
  data_ = nullptr;
  count_ = 0;
}

Scratch::~Scratch() { release(); }

int64_t scratch_bytes() { return total_bytes; }

}  // namespace hotloop

HOTLOOP_EXPORT int64_t hotloop_scratch_bytes() { return hotloop::scratch_bytes(); }
