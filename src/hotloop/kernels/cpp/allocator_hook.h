// torch's CPU tensors from the arena, whatever the version of torch.
//
// torch's allocator (c10::alloc_cpu and c10::free_cpu, both in libc10.so) takes memory from posix_memalign and
// gives it back by free, which are C and stay. libc10's slots of these two are led here; those of all
// other libraries stay as they are.
#pragma once

#include <vector>

#include "relocations.h"

namespace hotloop {

// Slots of the two functions in one library, and what they stood for.
struct AllocatorSlots {
  std::vector<Slot> posix_memalign, free;
  void *found_posix_memalign, *found_free;

  // Of a loaded library. Throws Error: it is not loaded, or does not call both.
  static AllocatorSlots of(const char* file_name);
};

// Leads the slots to the arena, once a process and for ever: a block of the arena may be freed at any time,
// even at exit. Throws Error, and then no allocation has changed.
void hook_allocator(const AllocatorSlots& slots);
bool is_allocator_hooked();

}  // namespace hotloop
