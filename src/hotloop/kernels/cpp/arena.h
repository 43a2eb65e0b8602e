// The tensor arena: large blocks, best fit, in one reserved range of addresses whose pages are kept.
//
// It knows nothing of torch: allocator_hook.h leads torch's allocations here.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "abi.h"
#include "placement.h"

namespace hotloop {

// Safe for several threads, and across a fork.
class Arena {
 public:
  // The one of this process. Never destroyed: tensors freed at exit still come back to it.
  static Arena& instance();

  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Reserves `wanted` bytes of addresses, or half, a quarter, ... of it, at least `least`; bytes reserved.
  // A range in use stays as it is.
  size_t reserve(size_t wanted, size_t least);

  // Begins to serve requests of at least `threshold` bytes, sizes rounded up to a multiple of
  // `granularity`, below `capacity`. Calls nest: the first one's settings hold until the last `uninstall`.
  // huge_pages: 1 asks for transparent huge pages, -1 for none, 0 leaves them. Throws Error.
  void install(size_t capacity, size_t threshold, size_t granularity, int huge_pages);
  void uninstall();

  // Memory for a request; null: not ours to serve, or no room. Does not throw.
  void* take(size_t alignment, size_t size) noexcept;

  // Takes a block back; false: `pointer` is not in the arena.
  bool release(void* pointer) noexcept;

  // Gives the pages of all free blocks, and those above the top, back to the system.
  void trim();

  ArenaCounters counters();
  void reset_peak();

  // Bytes from the start of the range to a block in use; -1: it is not one.
  int64_t offset_of(const void* pointer);

  // Writes every later placement and release to `events`, up to `capacity`; null stops. Returns how many
  // there were since the last call.
  uint64_t record(ArenaEvent* events, uint64_t capacity);

 private:
  // Replaced as a whole, and never freed: whoever looks a pointer up takes no lock.
  struct Range {
    char* base;
    size_t size;
    void* mapping;
    size_t mapping_size;
    const Range* earlier;

    bool holds(const void* pointer) const {
      return reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(base) < size;
    }
  };

  void note(size_t offset, int64_t requested_bytes);
  void give_back(size_t begin, size_t end);
  static void lock_for_fork();
  static void unlock_after_fork();

  std::mutex mutex_;
  std::atomic<bool> active_{false};
  std::atomic<size_t> threshold_{0};
  std::atomic<const Range*> range_{nullptr};
  size_t capacity_ = 0, granularity_ = 64, touched_ = 0;
  unsigned depth_ = 0;
  Placement placement_;
  uint64_t live_bytes_ = 0, peak_live_ = 0, num_live_ = 0, peak_top_ = 0;
  uint64_t num_allocations_ = 0, num_fallbacks_ = 0;
  ArenaEvent* events_ = nullptr;
  uint64_t events_capacity_ = 0, num_events_ = 0;
};

}  // namespace hotloop
