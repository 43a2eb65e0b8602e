// A point where the threads of a team wait for one another, again and again, and which can be called off.
#pragma once

#include <atomic>
#include <cstdint>

#include "futex.h"

namespace hotloop {

// Whoever waits for long sleeps: a thread that yields in a loop falls behind every other program on its core,
// and one that shares its core with the worker it waits for keeps it from running.
class Meeting {
 public:
  explicit Meeting(int count) : count_(count) {}

  // Waits for all threads; false: it was called off.
  bool arrive() {
    return arrive([] {});
  }

  // The same; a thread that sleeps calls `look` now and then, which may call the meeting off.
  template <class Look>
  bool arrive(const Look& look) {
    const uint32_t seen = met_.word.load();
    if (is_off()) return false;
    if (arrived_.fetch_add(1) + 1 == count_) {
      arrived_.store(0);
      met_.change();
      return !is_off();
    }
    for (int64_t spin_ns = kSpinNs; !met_.wait(seen, spin_ns, kLookNs); spin_ns = 0) look();
    return !is_off();
  }

  // Nobody waits any more, now or later.
  void call_off() {
    off_ = true;
    met_.change();
  }

  bool is_off() const { return off_; }

 private:
  static constexpr int64_t kSpinNs = 100'000, kLookNs = 20'000'000;

  const int count_;
  std::atomic<int> arrived_{0};
  std::atomic<bool> off_{false};
  Waitable met_;
};

}  // namespace hotloop
