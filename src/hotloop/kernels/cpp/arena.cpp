#include "arena.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>

#include "error.h"

namespace hotloop {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;

constexpr size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

}  // namespace

Arena& Arena::instance() {
  static Arena* const arena = [] {
    // A child forked while another thread held the lock would wait for it for ever.
    pthread_atfork(&lock_for_fork, &unlock_after_fork, &unlock_after_fork);
    return new Arena;
  }();
  return *arena;
}

void Arena::lock_for_fork() { instance().mutex_.lock(); }
void Arena::unlock_after_fork() { instance().mutex_.unlock(); }

size_t Arena::reserve(size_t wanted, size_t least) {
  const std::lock_guard lock(mutex_);
  const Range* present = range_.load(std::memory_order_relaxed);
  const size_t reserved = present ? present->size : 0;
  if (reserved >= wanted || num_live_ > 0 || depth_ > 0) return reserved;
  for (size_t bytes = round_up(wanted, kHugePageBytes); bytes >= least && bytes > reserved;
       bytes /= 2) {
    const size_t mapping_size = bytes + kHugePageBytes;
    void* mapping = mmap(nullptr, mapping_size, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) continue;
    const uintptr_t start = round_up(reinterpret_cast<uintptr_t>(mapping), kHugePageBytes);
    range_.store(new Range{reinterpret_cast<char*>(start), bytes, mapping, mapping_size, present},
                 std::memory_order_release);
    // Only now: others may get these addresses at once, and must not find them in a range of ours.
    if (present) munmap(present->mapping, present->mapping_size);
    touched_ = 0;
    return bytes;
  }
  return reserved;
}

void Arena::install(size_t capacity, size_t threshold, size_t granularity, int huge_pages) {
  const std::lock_guard lock(mutex_);
  const Range* range = range_.load(std::memory_order_relaxed);
  if (!range) throw Error("the tensor arena must have a range of addresses (got: none reserved)");
  if (depth_++ > 0) return;
  capacity_ = std::min(capacity, range->size);
  granularity_ = granularity;
  threshold_.store(threshold, std::memory_order_relaxed);
  if (huge_pages)
    madvise(range->base, range->size, huge_pages > 0 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  active_.store(true, std::memory_order_release);
}

void Arena::uninstall() {
  const std::lock_guard lock(mutex_);
  if (depth_ > 0 && --depth_ == 0) active_.store(false, std::memory_order_release);
}

void* Arena::take(size_t alignment, size_t size) noexcept {
  if (!active_.load(std::memory_order_acquire) ||
      size < threshold_.load(std::memory_order_relaxed) || size == 0)
    return nullptr;
  const std::lock_guard lock(mutex_);
  if (depth_ == 0) return nullptr;  // Uninstalled since `active_` was read.
  std::optional<size_t> offset;
  size_t rounded = 0;
  // The range begins at a huge page, so a block is aligned as its offset is.
  if (size <= capacity_ && granularity_ % std::max<size_t>(alignment, 1) == 0) {
    rounded = round_up(size, granularity_);
    try {
      offset = placement_.place(rounded, capacity_);
    } catch (const std::bad_alloc&) {
    }
  }
  if (!offset) {
    ++num_fallbacks_;
    return nullptr;
  }
  ++num_allocations_;
  ++num_live_;
  live_bytes_ += rounded;
  peak_live_ = std::max(peak_live_, live_bytes_);
  peak_top_ = std::max<uint64_t>(peak_top_, placement_.top());
  touched_ = std::max(touched_, placement_.top());
  note(*offset, static_cast<int64_t>(size));
  return range_.load(std::memory_order_relaxed)->base + *offset;
}

bool Arena::release(void* pointer) noexcept {
  const Range* range = range_.load(std::memory_order_acquire);
  if (!range || !range->holds(pointer)) return false;
  const std::lock_guard lock(mutex_);
  const size_t offset = static_cast<size_t>(static_cast<char*>(pointer) - range->base);
  const size_t size = placement_.release(offset);
  if (size == 0) return true;
  live_bytes_ -= size;
  --num_live_;
  note(offset, -1);
  return true;
}

void Arena::trim() {
  const std::lock_guard lock(mutex_);
  const Range* range = range_.load(std::memory_order_relaxed);
  if (!range) return;
  for (const auto& [size, offset] : placement_.free_blocks()) give_back(offset, offset + size);
  // A huge page may reach beyond the bytes that were used of it.
  give_back(placement_.top(), std::min(round_up(touched_, kHugePageBytes), range->size));
  touched_ = placement_.top();
}

ArenaCounters Arena::counters() {
  const std::lock_guard lock(mutex_);
  const Range* range = range_.load(std::memory_order_relaxed);
  ArenaCounters now{};
  now.live_bytes = live_bytes_;
  now.peak_live_bytes = peak_live_;
  now.num_live = num_live_;
  now.top_bytes = placement_.top();
  now.peak_top_bytes = peak_top_;
  now.touched_bytes = touched_;
  now.free_bytes = placement_.top() - live_bytes_;
  now.capacity_bytes = capacity_;
  now.reserved_bytes = range ? range->size : 0;
  now.num_allocations = num_allocations_;
  now.num_fallbacks = num_fallbacks_;
  return now;
}

void Arena::reset_peak() {
  const std::lock_guard lock(mutex_);
  peak_live_ = live_bytes_;
  peak_top_ = placement_.top();
}

int64_t Arena::offset_of(const void* pointer) {
  const std::lock_guard lock(mutex_);
  const Range* range = range_.load(std::memory_order_relaxed);
  if (!range || !range->holds(pointer)) return -1;
  const auto offset = static_cast<const char*>(pointer) - range->base;
  return placement_.in_use(static_cast<size_t>(offset)) ? offset : -1;
}

uint64_t Arena::record(ArenaEvent* events, uint64_t capacity) {
  const std::lock_guard lock(mutex_);
  const uint64_t before = num_events_;
  events_ = events;
  events_capacity_ = events ? capacity : 0;
  num_events_ = 0;
  return before;
}

void Arena::note(size_t offset, int64_t requested_bytes) {
  if (!events_) return;
  if (num_events_ < events_capacity_) events_[num_events_] = {offset, requested_bytes};
  ++num_events_;
}

void Arena::give_back(size_t begin, size_t end) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  begin = round_up(begin, page);
  end = end / page * page;
  if (begin < end)
    madvise(range_.load(std::memory_order_relaxed)->base + begin, end - begin, MADV_DONTNEED);
}

}  // namespace hotloop
