// The arena: placement against a simple model, and the hook on libraries and on a table, with threads and forks.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "allocating_library.h"
#include "allocator_hook.h"
#include "arena.h"
#include "check.h"
#include "error.h"

using namespace hotloop;

namespace {

constexpr size_t kThreshold = 64 * 1024, kGranularity = 4096;

// One byte for each unit of the range: what is in use. Best fit is looked for from the bottom.
class SimplePlacement {
 public:
  explicit SimplePlacement(size_t capacity) : in_use_(capacity) {}

  std::optional<size_t> place(size_t size) {
    std::optional<size_t> best;
    size_t best_size = SIZE_MAX;
    for (size_t begin = 0, end; begin < top(); begin = end) {
      for (end = begin + 1; end < top() && in_use_[end] == in_use_[begin];) ++end;
      if (!in_use_[begin] && end - begin >= size && end - begin < best_size)
        best = begin, best_size = end - begin;
    }
    if (!best && top() + size <= in_use_.size()) best = top();
    if (best) std::memset(&in_use_[*best], 1, size);
    return best;
  }
  void release(size_t offset, size_t size) { std::memset(&in_use_[offset], 0, size); }
  size_t top() const {
    size_t top = in_use_.size();
    while (top > 0 && !in_use_[top - 1]) --top;
    return top;
  }

 private:
  std::vector<char> in_use_;
};

void check_placement(unsigned seed) {
  constexpr size_t kCapacity = 400;
  Draw draw(seed);
  Placement placement;
  SimplePlacement simple(kCapacity);
  std::vector<std::pair<size_t, size_t>> blocks;
  for (int i = 0; i < 3000; ++i) {
    if (!blocks.empty() && draw.below(2)) {
      std::swap(blocks[draw.below(blocks.size())], blocks.back());
      const auto [offset, size] = blocks.back();
      blocks.pop_back();
      CHECK(placement.in_use(offset));
      CHECK(placement.release(offset) == size);
      CHECK(placement.release(offset) == 0);
      simple.release(offset, size);
    } else {
      const size_t size = 1 + draw.below(draw.below(4) ? 20 : 120);
      const auto offset = placement.place(size, kCapacity);
      CHECK(offset == simple.place(size));
      if (offset) blocks.push_back({*offset, size});
    }
    CHECK(placement.top() == simple.top());
  }
  for (const auto& [offset, size] : blocks) CHECK(placement.release(offset) == size);
  CHECK(placement.top() == 0 && placement.free_blocks().empty());
}

// Allocates, fills, checks and frees; blocks that overlap would show another one's number.
void churn(const AllocatingLibrary& library, unsigned seed, int rounds) {
  Draw draw(seed);
  std::vector<std::pair<unsigned*, size_t>> blocks;
  const auto drop = [&] {
    const auto [data, count] = blocks.back();
    blocks.pop_back();
    CHECK(data[0] == seed && data[count / 2] == seed && data[count - 1] == seed);
    (draw.below(2) ? library.release : library.release_by_address)(data);
  };
  for (int i = 0; i < rounds; ++i) {
    if (!blocks.empty() && draw.below(2)) {
      drop();
      continue;
    }
    const size_t count = 1 + draw.below(3 * kThreshold / sizeof(unsigned));
    auto* data = static_cast<unsigned*>(library.allocate(count * sizeof(unsigned)));
    CHECK(data);
    data[0] = data[count / 2] = data[count - 1] = seed;
    blocks.push_back({data, count});
  }
  while (!blocks.empty()) drop();
}

void check_forks(const AllocatingLibrary& library) {
  std::atomic<bool> done{false};
  std::thread other([&] {
    while (!done) library.release(library.allocate(2 * kThreshold));
  });
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      void* data = library.allocate(2 * kThreshold);
      const bool is_inside = Arena::instance().offset_of(data) >= 0;
      library.release(data);
      _exit(is_inside ? 0 : 3);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  done = true;
  other.join();
}

void check_hook(const AllocatingLibrary& library, const AllocatorSlots& slots) {
  Arena& arena = Arena::instance();
  void* before = library.allocate(2 * kThreshold);
  hook_allocator(slots);
  hook_allocator(slots);  // Nothing more.
  CHECK(arena.reserve(size_t{256} << 20, size_t{1} << 20) >= size_t{256} << 20);
  void* inactive = library.allocate(2 * kThreshold);
  arena.install(size_t{256} << 20, kThreshold, kGranularity, -1);
  arena.install(1, 1, 64, 0);  // The first one's settings hold.
  CHECK(arena.offset_of(before) < 0 && arena.offset_of(inactive) < 0);
  library.release(before);
  library.release_by_address(inactive);
  library.release(nullptr);
  void* inside = library.allocate(kThreshold);
  void* small = library.allocate(kThreshold - 1);
  CHECK(arena.offset_of(inside) == 0 && arena.offset_of(small) < 0);
  library.release(small);
  // More than an offset's alignment, and more than there is, is left to the system.
  CHECK(!arena.take(2 * kGranularity, kThreshold) && !arena.take(64, size_t{1} << 40));
  CHECK(arena.counters().num_fallbacks == 2 && arena.counters().num_live == 1);

  std::vector<std::thread> threads;
  for (unsigned seed = 1; seed <= 4; ++seed)
    threads.emplace_back([&library, seed] { churn(library, seed, 1000); });
  for (std::thread& thread : threads) thread.join();
  check_forks(library);

  arena.uninstall();
  CHECK(arena.offset_of(inside) == 0);
  arena.uninstall();
  void* late = library.allocate(2 * kThreshold);
  CHECK(arena.offset_of(late) < 0);
  library.release(late);
  library.release(inside);  // Outlived its time.
  CHECK(arena.counters().num_live == 0 && arena.counters().top_bytes == 0);
  arena.trim();
  CHECK(arena.counters().touched_bytes == 0);
  // A larger range, once it is empty.
  CHECK(arena.reserve(size_t{512} << 20, size_t{1} << 20) == size_t{512} << 20);
}

// The hook is for ever: each way in a process of its own.
template <class Body>
void in_child(const Body& body) {
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    body();
    std::exit(0);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

// A table instead of a library's: what the hook itself does.
struct {
  int (*posix_memalign)(void**, size_t, size_t) = &::posix_memalign;
  void (*free)(void*) = &::free;
} table;

void* allocate_by_table(size_t size) {
  void* pointer = nullptr;
  return table.posix_memalign(&pointer, 64, size) == 0 ? pointer : nullptr;
}

void release_by_table(void* pointer) { table.free(pointer); }

void check_table() {
  AllocatorSlots slots;
  slots.posix_memalign = {{reinterpret_cast<void**>(&table.posix_memalign), false}};
  slots.free = {{reinterpret_cast<void**>(&table.free), false}};
  slots.found_posix_memalign = reinterpret_cast<void*>(&::posix_memalign);
  slots.found_free = reinterpret_cast<void*>(&::free);
  check_hook({&allocate_by_table, &release_by_table, &release_by_table}, slots);
}

void check_missing() {
  for (const char* name : {"libnowhere.so", "libm.so.6"}) {
    const int32_t failed = guarded([&] { AllocatorSlots::of(name); });
    CHECK(failed == 1);
  }
}

}  // namespace

int main() {
  for (unsigned seed = 0; seed < 20; ++seed) check_placement(seed);
  check_missing();
  in_child(check_table);
  in_child([] {
    const AllocatorSlots slots = AllocatorSlots::of("liballocating-lazy.so");
    CHECK(!slots.posix_memalign[0].is_read_only);
    check_hook(allocating_lazy(), slots);
  });
  in_child([] {
    const AllocatorSlots slots = AllocatorSlots::of("liballocating-now.so");
    CHECK(slots.posix_memalign[0].is_read_only && slots.free[0].is_read_only);
    check_hook(allocating_now(), slots);
  });
  std::puts("arena: all is right");
}
