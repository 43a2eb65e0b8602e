#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <memory>
#include <vector>

#include "abi.h"
#include "error.h"
#include "futex.h"

namespace hotloop {
namespace {

// Of torch's OpenMP runtime; all null where torch is not loaded.
OpenMp openmp{};
std::atomic<bool> has_openmp{false};
std::atomic<int64_t> spin_ns{200'000};

// A child of fork has none of its parent's threads: pools made before the fork are left to it.
std::atomic<uint32_t> fork_generation{0};
void count_fork() { ++fork_generation; }

// Threads that wait for the regions of one calling thread.
class Pool {
 public:
  Pool() : generation_(fork_generation) {}

  ~Pool() {
    if (is_stale()) return;
    closing_ = true;
    start_.change();
    for (pthread_t thread : threads_) pthread_join(thread, nullptr);
  }

  bool is_stale() const { return generation_ != fork_generation; }

  void run(int wanted, void (*body)(void*, Worker), void* data) {
    grow(wanted - 1);
    // All threads are told, so that none is late for the region after this one; some may have no part.
    const int others = static_cast<int>(threads_.size());
    count_ = std::min(wanted, 1 + others);
    body_ = body, data_ = data;
    left_.store(others);
    start_.change();
    Pool* const outer = current;
    current = this;
    body(data, Worker{0, count_});
    current = outer;
    for (uint32_t seen = done_.word; left_.load() > 0; seen = done_.word)
      done_.wait(seen, spin_ns);
  }

  void barrier() {
    const uint32_t seen = meeting_.word;
    if (arrived_.fetch_add(1) + 1 == count_) {
      arrived_.store(0);
      meeting_.change();
    } else {
      meeting_.wait(seen, spin_ns);
    }
  }

  // The region that the calling thread is in; null outside.
  static thread_local Pool* current;

 private:
  struct Start {
    Pool* pool;
    int index;
    uint32_t seen;
  };

  void grow(int wanted) {
    while (static_cast<int>(threads_.size()) < wanted) {
      auto start = std::make_unique<Start>();
      *start = {this, static_cast<int>(threads_.size()) + 1, start_.word};
      pthread_t thread;
      // Fewer threads than asked for make the same result.
      if (pthread_create(&thread, nullptr, &Pool::serve, start.get()) != 0) return;
      start.release();
      threads_.push_back(thread);
    }
  }

  static void* serve(void* given) {
    const std::unique_ptr<Start> start(static_cast<Start*>(given));
    Pool& pool = *start->pool;
    current = &pool;
    for (uint32_t seen = start->seen;; ++seen) {
      pool.start_.wait(seen, spin_ns);
      if (pool.closing_) return nullptr;
      if (start->index < pool.count_) pool.body_(pool.data_, Worker{start->index, pool.count_});
      if (pool.left_.fetch_sub(1) == 1) pool.done_.change();
    }
  }

  const uint32_t generation_;
  std::vector<pthread_t> threads_;
  Waitable start_, meeting_, done_;
  std::atomic<int> arrived_{0}, left_{0};
  std::atomic<bool> closing_{false};
  int count_ = 1;
  void (*body_)(void*, Worker) = nullptr;
  void* data_ = nullptr;
};

thread_local Pool* Pool::current = nullptr;

Pool& pool_of_this_thread() {
  static const int registered = pthread_atfork(nullptr, nullptr, &count_fork);
  (void)registered;
  thread_local std::unique_ptr<Pool> pool;
  // One from before a fork is not destroyed: its threads do not exist here.
  if (pool && pool->is_stale()) pool.release();
  if (!pool) pool = std::make_unique<Pool>();
  return *pool;
}

// What GOMP_parallel calls on each thread.
struct Region {
  void (*body)(void*, Worker);
  void* data;
};

using Entry = void (*)(void*);
using ParallelEntry = void (*)(Entry, void*, unsigned, unsigned);
using IntEntry = int (*)();
using VoidEntry = void (*)();

void enter(void* given) {
  const auto* region = static_cast<const Region*>(given);
  const int index = reinterpret_cast<IntEntry>(openmp.thread_num)();
  const int count = reinterpret_cast<IntEntry>(openmp.num_threads)();
  region->body(region->data, Worker{index, count});
}

}  // namespace

namespace detail {

void run_parallel(int threads, void (*body)(void*, Worker), void* data) {
  if (Pool::current) {
    body(data, Worker{0, 1});  // A region inside a region has one thread, as in OpenMP.
  } else if (has_openmp.load(std::memory_order_acquire)) {
    Region region{body, data};
    reinterpret_cast<ParallelEntry>(openmp.parallel)(&enter, &region,
                                                     static_cast<unsigned>(threads), 0);
  } else {
    pool_of_this_thread().run(threads, body, data);
  }
}

}  // namespace detail

void Worker::barrier() const {
  if (count <= 1) return;
  if (Pool::current) Pool::current->barrier();
  else reinterpret_cast<VoidEntry>(openmp.barrier)();
}

bool is_in_parallel() {
  if (Pool::current) return true;
  return has_openmp.load(std::memory_order_acquire) &&
         reinterpret_cast<IntEntry>(openmp.num_threads)() > 1;
}

int set_operation_threads(int threads) {
  if (!has_openmp.load(std::memory_order_acquire)) return threads;
  const int before = reinterpret_cast<IntEntry>(openmp.max_threads)();
  reinterpret_cast<void (*)(int)>(openmp.set_num_threads)(threads);
  return before;
}

}  // namespace hotloop

HOTLOOP_EXPORT void hotloop_use_openmp(const hotloop::OpenMp* runtime) {
  hotloop::openmp = *runtime;
  hotloop::has_openmp.store(true, std::memory_order_release);
}

HOTLOOP_EXPORT void hotloop_set_spin(int64_t ns) { hotloop::spin_ns = ns; }
