#include "allocating_library.h"

#include <cstdlib>

namespace {

void* allocate(size_t size) {
  void* pointer = nullptr;
  return posix_memalign(&pointer, 64, size) == 0 ? pointer : nullptr;
}

void release(void* pointer) { std::free(pointer); }

void release_by_address(void* pointer) {
  void (*volatile deleter)(void*) = &std::free;
  deleter(pointer);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) AllocatingLibrary NAME() {
  return {&allocate, &release, &release_by_address};
}
