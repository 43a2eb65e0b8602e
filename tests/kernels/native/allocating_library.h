// A library that allocates as libc10.so does.
#pragma once

#include <cstddef>

struct AllocatingLibrary {
  void* (*allocate)(size_t size);
  void (*release)(void* pointer);
  // By the address of free, as a deleter is kept.
  void (*release_by_address)(void* pointer);
};

extern "C" {
AllocatingLibrary allocating_lazy();
AllocatingLibrary allocating_now();
}
