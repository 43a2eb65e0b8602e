// A c10::Allocator for large CPU tensors: best fit in one reserved range, pages kept.
//
// Placement is modelled exactly by arena_model.py: change both or neither. Only c10 is used, so
// that this compiles in seconds. The face to Python is plain C, called through ctypes.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <optional>
#include <set>
#include <utility>

namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;

constexpr size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

// (size, offset), so that lower_bound finds the smallest that fits, the lowest among equals.
using FreeSet = std::set<std::pair<size_t, size_t>>;

struct Block {
  size_t size;
  bool is_free;
  // The node that will stand in the free set, kept while the block is in use: freeing then takes
  // no memory, and so cannot throw inside a deleter.
  FreeSet::node_type entry;
};

// Best fit with immediate coalescing. Blocks tile [0, top); the wilderness above is used last.
class Placement {
 public:
  std::optional<size_t> place(size_t size, size_t capacity) {
    auto fit = free_.lower_bound({size, 0});
    if (fit == free_.end()) {
      if (size > capacity || top_ > capacity - size) {
        return std::nullopt;
      }
      const size_t offset = top_;
      auto entry = make_entry(size, offset);
      blocks_.emplace_hint(blocks_.end(), offset, Block{size, false, std::move(entry)});
      top_ += size;
      return offset;
    }
    const auto [found, offset] = *fit;
    auto block = blocks_.find(offset);
    if (found > size) {
      auto rest = make_entry(found - size, offset + size);
      blocks_.emplace_hint(
          std::next(block), offset + size, Block{found - size, true, FreeSet::node_type{}});
      free_.insert(std::move(rest));
    }
    block->second.entry = free_.extract(fit);
    block->second.is_free = false;
    block->second.size = size;
    return offset;
  }

  // Size of the block that was in use at `offset`; 0 if none was.
  size_t release(size_t offset) noexcept {
    auto block = blocks_.find(offset);
    if (block == blocks_.end() || block->second.is_free) {
      return 0;
    }
    const size_t size = block->second.size;
    auto entry = std::move(block->second.entry);
    block->second.is_free = true;
    auto next = std::next(block);
    if (next != blocks_.end() && next->second.is_free) {
      free_.erase({next->second.size, next->first});
      block->second.size += next->second.size;
      blocks_.erase(next);
    }
    if (block != blocks_.begin()) {
      auto previous = std::prev(block);
      if (previous->second.is_free) {
        free_.erase({previous->second.size, previous->first});
        previous->second.size += block->second.size;
        blocks_.erase(block);
        block = previous;
      }
    }
    if (block->first + block->second.size == top_) {
      top_ = block->first;
      blocks_.erase(block);
    } else {
      entry.value() = {block->second.size, block->first};
      free_.insert(std::move(entry));
    }
    return size;
  }

  bool in_use(size_t offset) const {
    auto block = blocks_.find(offset);
    return block != blocks_.end() && !block->second.is_free;
  }
  size_t top() const { return top_; }
  const FreeSet& free_blocks() const { return free_; }

 private:
  static FreeSet::node_type make_entry(size_t size, size_t offset) {
    FreeSet one{{size, offset}};
    return one.extract(one.begin());
  }

  std::map<size_t, Block> blocks_;  // by offset
  FreeSet free_;
  size_t top_ = 0;
};

// The fields and their order are those of _Counters in tensor_arena.py.
struct Counters {
  uint64_t live_bytes, peak_live_bytes, num_live;
  uint64_t top_bytes, peak_top_bytes, touched_bytes;
  uint64_t free_bytes, capacity_bytes, reserved_bytes;
  uint64_t num_allocations, num_fallbacks;
};

struct Event {
  uint64_t offset;
  int64_t requested;  // -1: the block at `offset` was freed
};

void release_pointer(void* pointer);

class TensorArena final : public c10::Allocator {
 public:
  // Storages keep a pointer to their allocator and may be resized long after the run, so this
  // object answers for ever; when inactive it passes requests on.
  c10::DataPtr allocate(size_t n) override {
    if (active_.load(std::memory_order_acquire) &&
        n >= threshold_.load(std::memory_order_relaxed)) {
      if (void* pointer = take(n)) {
        c10::profiledCPUMemoryReporter().New(pointer, n);
        return {pointer, pointer, &release_pointer, c10::Device(c10::DeviceType::CPU)};
      }
    }
    return found()->allocate(n);
  }

  // oneDNN tensors are freed through whatever allocator is installed at that moment, not the one
  // they came from: this must take back both kinds of pointer.
  c10::DeleterFnPtr raw_deleter() const override {
    return found()->raw_deleter() == nullptr ? nullptr : &release_pointer;
  }

  void copy_data(void* target, const void* source, std::size_t count) const override {
    default_copy_data(target, source, count);
  }

  void release(void* pointer) {
    if (!holds(pointer)) {
      found()->raw_deleter()(pointer);
      return;
    }
    c10::profiledCPUMemoryReporter().Delete(pointer);
    const std::lock_guard lock(mutex_);
    const size_t offset = static_cast<char*>(pointer) - base_.load(std::memory_order_relaxed);
    const size_t size = placement_.release(offset);
    if (size == 0) {
      return;
    }
    live_bytes_ -= size;
    --num_live_;
    record(offset, -1);
    leave_if_idle();
  }

  uint64_t reserve(size_t wanted, size_t least) {
    const std::lock_guard lock(mutex_);
    if (reserved_ >= wanted || num_live_ > 0 || depth_ > 0) {
      return reserved_;
    }
    static std::once_flag once;
    std::call_once(once, [] {
      pthread_atfork(&lock_for_fork, &unlock_after_fork, &unlock_after_fork);
    });
    wanted = round_up(wanted, kHugePageBytes);
    for (size_t bytes = wanted; bytes >= least && bytes > reserved_; bytes /= 2) {
      void* raw = mmap(nullptr, bytes + kHugePageBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (raw == MAP_FAILED) {
        continue;
      }
      if (mapping_ != nullptr) {
        munmap(mapping_, reserved_ + kHugePageBytes);
      }
      mapping_ = raw;
      const auto address = reinterpret_cast<uintptr_t>(raw);
      const uintptr_t start = round_up(address, kHugePageBytes);
      base_.store(reinterpret_cast<char*>(start), std::memory_order_relaxed);
      end_.store(reinterpret_cast<char*>(start + bytes), std::memory_order_relaxed);
      reserved_ = bytes;
      touched_ = 0;
      break;
    }
    return reserved_;
  }

  // 0: done; 1: nothing is reserved; 2: the allocator in place does not let itself be replaced.
  int install(size_t capacity, size_t threshold, size_t granularity, int advice) {
    const std::lock_guard lock(mutex_);
    if (reserved_ == 0) {
      return 1;
    }
    if (depth_ > 0) {
      ++depth_;
      return 0;
    }
    c10::Allocator* present = c10::GetAllocator(c10::DeviceType::CPU);
    if (present != this) {
      found_.store(present, std::memory_order_release);
      c10::SetAllocator(c10::DeviceType::CPU, this);
      if (c10::GetAllocator(c10::DeviceType::CPU) != this) {
        return 2;
      }
    }
    capacity_ = std::min(capacity, reserved_);
    granularity_ = granularity;
    threshold_.store(threshold, std::memory_order_relaxed);
#ifdef MADV_HUGEPAGE
    if (advice != 0) {
      madvise(base_.load(), reserved_, advice > 0 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    }
#endif
    depth_ = 1;
    active_.store(true, std::memory_order_release);
    return 0;
  }

  void uninstall() {
    const std::lock_guard lock(mutex_);
    if (depth_ > 0 && --depth_ == 0) {
      active_.store(false, std::memory_order_release);
      leave_if_idle();
    }
  }

  // Give the pages of all free blocks, and those above the top, back to the system.
  void trim() {
    const std::lock_guard lock(mutex_);
    for (const auto& [size, offset] : placement_.free_blocks()) {
      give_back(offset, offset + size);
    }
    // A huge page may reach beyond the bytes that were used of it.
    give_back(placement_.top(), std::min(round_up(touched_, kHugePageBytes), reserved_));
    touched_ = placement_.top();
  }

  void count(Counters& out) {
    const std::lock_guard lock(mutex_);
    const size_t top = placement_.top();
    out = {live_bytes_, peak_live_, num_live_, top, peak_top_, touched_, top - live_bytes_,
           capacity_, reserved_, num_allocations_, num_fallbacks_};
  }

  void reset_peak() {
    const std::lock_guard lock(mutex_);
    peak_live_ = live_bytes_;
    peak_top_ = placement_.top();
  }

  int64_t offset_of(void* pointer) {
    if (!holds(pointer)) {
      return -1;
    }
    const std::lock_guard lock(mutex_);
    const size_t offset = static_cast<char*>(pointer) - base_.load(std::memory_order_relaxed);
    return placement_.in_use(offset) ? static_cast<int64_t>(offset) : -1;
  }

  // Write every later placement and release to `events`, up to `capacity`; null stops. Returns
  // how many there were since the last call.
  uint64_t record_into(Event* events, uint64_t capacity) {
    const std::lock_guard lock(mutex_);
    const uint64_t before = num_events_;
    events_ = events;
    events_capacity_ = events == nullptr ? 0 : capacity;
    num_events_ = 0;
    return before;
  }

 private:
  c10::Allocator* found() const { return found_.load(std::memory_order_acquire); }

  bool holds(const void* pointer) const {
    const char* at = static_cast<const char*>(pointer);
    return at >= base_.load(std::memory_order_relaxed) && at < end_.load(std::memory_order_relaxed);
  }

  void* take(size_t n) {
    const std::lock_guard lock(mutex_);
    if (depth_ == 0) {  // uninstalled since `active_` was read
      return nullptr;
    }
    std::optional<size_t> offset;
    size_t size = 0;
    if (n > 0 && n <= capacity_) {
      size = round_up(n, granularity_);
      try {
        offset = placement_.place(size, capacity_);
      } catch (const std::bad_alloc&) {
        offset = std::nullopt;
      }
    }
    if (!offset) {
      ++num_fallbacks_;
      return nullptr;
    }
    ++num_allocations_;
    ++num_live_;
    live_bytes_ += size;
    peak_live_ = std::max(peak_live_, live_bytes_);
    peak_top_ = std::max(peak_top_, placement_.top());
    touched_ = std::max(touched_, placement_.top());
    record(*offset, static_cast<int64_t>(n));
    return base_.load(std::memory_order_relaxed) + *offset;
  }

  // The allocator found is put back once no block is left that might be freed through the
  // installed one; see raw_deleter. Another allocator installed above this one stays.
  void leave_if_idle() {
    if (depth_ == 0 && num_live_ == 0 && c10::GetAllocator(c10::DeviceType::CPU) == this) {
      c10::SetAllocator(c10::DeviceType::CPU, found());
    }
  }

  void record(size_t offset, int64_t requested) {
    if (events_ != nullptr) {
      if (num_events_ < events_capacity_) {
        events_[num_events_] = {offset, requested};
      }
      ++num_events_;
    }
  }

  void give_back(size_t begin, size_t end) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    begin = round_up(begin, page);
    end = end / page * page;
    if (begin < end) {
      madvise(base_.load() + begin, end - begin, MADV_DONTNEED);
    }
  }

  static void lock_for_fork();
  static void unlock_after_fork();

  std::mutex mutex_;
  std::atomic<bool> active_{false};
  std::atomic<size_t> threshold_{0};
  std::atomic<c10::Allocator*> found_{nullptr};
  std::atomic<char*> base_{nullptr};
  std::atomic<char*> end_{nullptr};
  void* mapping_ = nullptr;
  size_t reserved_ = 0, capacity_ = 0, granularity_ = 64, touched_ = 0;
  unsigned depth_ = 0;
  Placement placement_;
  uint64_t live_bytes_ = 0, peak_live_ = 0, num_live_ = 0, peak_top_ = 0;
  uint64_t num_allocations_ = 0, num_fallbacks_ = 0;
  Event* events_ = nullptr;
  uint64_t events_capacity_ = 0, num_events_ = 0;
};

// Never destroyed: tensors freed at interpreter exit still come back to it.
TensorArena& arena() {
  static TensorArena* const instance = new TensorArena;
  return *instance;
}

void release_pointer(void* pointer) { arena().release(pointer); }

// A child forked while another thread held the lock would wait for it for ever.
void TensorArena::lock_for_fork() { arena().mutex_.lock(); }
void TensorArena::unlock_after_fork() { arena().mutex_.unlock(); }

}  // namespace

#define HOTLOOP_API extern "C" __attribute__((visibility("default")))

HOTLOOP_API uint64_t hotloop_arena_reserve(uint64_t wanted, uint64_t least) {
  return arena().reserve(wanted, least);
}
HOTLOOP_API int hotloop_arena_install(
    uint64_t capacity, uint64_t threshold, uint64_t granularity, int advice) {
  return arena().install(capacity, threshold, granularity, advice);
}
HOTLOOP_API void hotloop_arena_uninstall() { arena().uninstall(); }
HOTLOOP_API void hotloop_arena_trim() { arena().trim(); }
HOTLOOP_API void hotloop_arena_count(Counters* out) { arena().count(*out); }
HOTLOOP_API void hotloop_arena_reset_peak() { arena().reset_peak(); }
HOTLOOP_API int64_t hotloop_arena_offset_of(void* pointer) { return arena().offset_of(pointer); }
HOTLOOP_API uint64_t hotloop_arena_record(Event* events, uint64_t capacity) {
  return arena().record_into(events, capacity);
}
HOTLOOP_API void* hotloop_cpu_allocator() { return c10::GetAllocator(c10::DeviceType::CPU); }
