// Threads inside one call of a kernel.
//
// They are those of torch's OpenMP runtime where torch is loaded, so that a program that calls both has one
// set of threads and no two that look for work on one core; else those of a pool of our own, one for each
// thread that calls. Either way a region costs a few microseconds and results do not depend on it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace hotloop {

// One thread of a parallel region.
struct Worker {
  int index, count;

  // Waits until all threads of the region are here.
  void barrier() const;
};

namespace detail {
void run_parallel(int threads, void (*body)(void*, Worker), void* data);

// Compiled once for a body, whatever the threads: where the compiler joins a product and a sum to one operation
// in one copy of it and not in another, results differ.
#if defined(__clang__)
template <class Body>
__attribute__((noinline)) void call_body(void* data, Worker worker) {
#else
template <class Body>
__attribute__((noinline, noclone)) void call_body(void* data, Worker worker) {
#endif
  (*static_cast<const Body*>(data))(worker);
}
}  // namespace detail

// Calls body(Worker) on `threads` threads, or as many as the system gives, and returns when all are done.
// Thread 0 is the calling one. `body` must not throw: reserve what it needs before.
template <class Body>
void parallel(int threads, const Body& body) {
  void* data = const_cast<Body*>(&body);
  if (threads <= 1) detail::call_body<Body>(data, Worker{0, 1});
  else detail::run_parallel(threads, &detail::call_body<Body>, data);
}

struct Range {
  int64_t begin, end;
};

// Part `index` of `parts` of [0, count), cut at multiples of `grain`.
inline Range share(int64_t count, int64_t grain, int index, int parts) {
  const int64_t grains = (count + grain - 1) / grain;
  return {std::min(count, grains * index / parts * grain),
          std::min(count, grains * (index + 1) / parts * grain)};
}

inline Range share(int64_t count, int64_t grain, const Worker& worker) {
  return share(count, grain, worker.index, worker.count);
}

// Calls body(i) for each i of [0, count), each thread a run of them.
template <class Body>
void parallel_for(int threads, int64_t count, const Body& body) {
  parallel(threads, [&](Worker worker) {
    const Range mine = share(count, 1, worker);
    for (int64_t i = mine.begin; i < mine.end; ++i) body(i);
  });
}

// Whether the calling thread is one of several of a parallel region, torch's own among them.
bool is_in_parallel();

// Threads inside each operation of torch that the calling thread makes; what it was before.
int set_operation_threads(int threads);

// A moment's pause of a thread that looks for work.
inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace hotloop
