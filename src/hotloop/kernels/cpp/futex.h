// Waiting for a word of memory to change: a look for a while, then sleep (Linux, futex(2)).
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

#include "parallel.h"

namespace hotloop {

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

// Sleeps while `word` is `seen`, or until woken, or for at most limit_ns (0: no limit).
inline void sleep_while(std::atomic<uint32_t>& word, uint32_t seen, int64_t limit_ns = 0) {
  const timespec limit{static_cast<time_t>(limit_ns / 1000000000),
                       static_cast<long>(limit_ns % 1000000000)};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen,
          limit_ns ? &limit : nullptr, nullptr, 0);
}

inline void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr,
          nullptr, 0);
}

// A word that threads wait for: whoever changes it calls `wake`, which costs nothing where nobody sleeps.
struct Waitable {
  std::atomic<uint32_t> word{0};
  std::atomic<int> sleepers{0};

  // Looks for spin_ns, then sleeps, until the word is not `seen` or, where there is a limit, has slept for
  // limit_ns. Returns whether the word has changed.
  bool wait(uint32_t seen, int64_t spin_ns, int64_t limit_ns = 0) {
    const int64_t until = spin_ns > 0 ? now_ns() + spin_ns : 0;
    while (spin_ns > 0) {
      for (int i = 0; i < 64; ++i) {
        if (word.load(std::memory_order_acquire) != seen) return true;
        pause_cpu();
      }
      if (now_ns() > until) break;
    }
    sleepers.fetch_add(1);
    if (limit_ns > 0) sleep_while(word, seen, limit_ns);
    while (limit_ns <= 0 && word.load() == seen) sleep_while(word, seen);
    sleepers.fetch_sub(1);
    return word.load() != seen;
  }

  void change() {
    word.fetch_add(1);
    if (sleepers.load()) wake_all(word);
  }
};

}  // namespace hotloop
