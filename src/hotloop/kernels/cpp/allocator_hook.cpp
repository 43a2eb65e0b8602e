#include "allocator_hook.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string>

#include "abi.h"
#include "arena.h"
#include "error.h"

namespace hotloop {
namespace {

constexpr const char* kLibrary = "libc10.so";

using AllocateEntry = int (*)(void**, size_t, size_t);
using FreeEntry = void (*)(void*);

// What the slots stood for: glibc's, or those of an allocator that was preloaded.
std::atomic<AllocateEntry> found_posix_memalign{&::posix_memalign};
std::atomic<FreeEntry> found_free{&::free};
std::atomic<bool> is_hooked{false}, is_asked{false};

int allocate(void** pointer, size_t alignment, size_t size) {
  if (!is_asked.load(std::memory_order_relaxed)) is_asked = true;
  if (void* taken = Arena::instance().take(alignment, size)) {
    *pointer = taken;
    return 0;
  }
  return found_posix_memalign.load(std::memory_order_acquire)(pointer, alignment, size);
}

// Also gets what was allocated elsewhere, or before.
void release(void* pointer) {
  if (!Arena::instance().release(pointer)) found_free.load(std::memory_order_acquire)(pointer);
}

// What a slot stands for; `ours` where it is not filled in yet.
void* function_of(const LoadedLibrary& library, const std::vector<Slot>& slots, void* ours) {
  for (const Slot& slot : slots) {
    void* present = __atomic_load_n(slot.address, __ATOMIC_ACQUIRE);
    if (present && !library.holds(present)) return present;
  }
  return ours;
}

}  // namespace

AllocatorSlots AllocatorSlots::of(const char* file_name) {
  const LoadedLibrary library(file_name);
  AllocatorSlots slots{library.slots_of("posix_memalign"), library.slots_of("free"), nullptr, nullptr};
  if (slots.posix_memalign.empty() || slots.free.empty())
    throw Error(std::string("the tensor arena needs a torch whose ") + file_name +
                " calls posix_memalign and free (got: no call of " +
                (slots.free.empty() ? "free)" : "posix_memalign)"));
  slots.found_posix_memalign = function_of(library, slots.posix_memalign,
                                           reinterpret_cast<void*>(&::posix_memalign));
  slots.found_free = function_of(library, slots.free, reinterpret_cast<void*>(&::free));
  return slots;
}

void hook_allocator(const AllocatorSlots& slots) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (is_hooked) return;
  found_posix_memalign = reinterpret_cast<AllocateEntry>(slots.found_posix_memalign);
  found_free = reinterpret_cast<FreeEntry>(slots.found_free);
  // Who can free before who can allocate.
  for (const Slot& slot : slots.free) replace(slot, reinterpret_cast<void*>(&release));
  for (const Slot& slot : slots.posix_memalign) replace(slot, reinterpret_cast<void*>(&allocate));
  is_hooked = true;
}

bool is_allocator_hooked() { return is_hooked; }

}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_arena_check() {
  using namespace hotloop;
  return guarded([] {
    if (!is_allocator_hooked()) AllocatorSlots::of(kLibrary);
  });
}

HOTLOOP_EXPORT int32_t hotloop_arena_is_asked() { return hotloop::is_asked; }

HOTLOOP_EXPORT uint64_t hotloop_arena_reserve(uint64_t wanted_bytes, uint64_t least_bytes) {
  return hotloop::Arena::instance().reserve(wanted_bytes, least_bytes);
}

HOTLOOP_EXPORT int32_t hotloop_arena_install(uint64_t capacity_bytes, uint64_t threshold_bytes,
                                             uint64_t granularity_bytes, int32_t huge_pages) {
  using namespace hotloop;
  return guarded([&] {
    if (!is_allocator_hooked()) hook_allocator(AllocatorSlots::of(kLibrary));
    Arena::instance().install(capacity_bytes, threshold_bytes, granularity_bytes, huge_pages);
  });
}

HOTLOOP_EXPORT void hotloop_arena_uninstall() { hotloop::Arena::instance().uninstall(); }

HOTLOOP_EXPORT void hotloop_arena_trim() { hotloop::Arena::instance().trim(); }

HOTLOOP_EXPORT void hotloop_arena_count(hotloop::ArenaCounters* counters) {
  *counters = hotloop::Arena::instance().counters();
}

HOTLOOP_EXPORT void hotloop_arena_reset_peak() { hotloop::Arena::instance().reset_peak(); }

HOTLOOP_EXPORT int64_t hotloop_arena_offset_of(const void* pointer) {
  return hotloop::Arena::instance().offset_of(pointer);
}

HOTLOOP_EXPORT uint64_t hotloop_arena_record(hotloop::ArenaEvent* events, uint64_t capacity) {
  return hotloop::Arena::instance().record(events, capacity);
}
