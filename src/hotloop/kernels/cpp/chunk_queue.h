// The chunks of a step that one worker has still to run.
#pragma once

#include <atomic>
#include <cstdint>

namespace hotloop {

// A range of chunks. Its worker takes the first one, and a worker that has none left the last one, so that the two
// meet as late as they can.
class ChunkQueue {
 public:
  static constexpr int64_t kNone = -1;

  void assign(int64_t begin, int64_t end) { range_ = pack(begin, end); }

  int64_t begin() const { return begin_of(range_); }
  int64_t end() const { return end_of(range_); }

  int64_t left() const {
    const uint64_t range = range_;
    return left_of(range);
  }

  int64_t take_first() {
    uint64_t range = range_;
    while (left_of(range) > 0)
      if (range_.compare_exchange_weak(range, pack(begin_of(range) + 1, end_of(range))))
        return begin_of(range);
    return kNone;
  }

  // Only where at least `least` are left.
  int64_t take_last(int64_t least) {
    uint64_t range = range_;
    while (left_of(range) > 0 && left_of(range) >= least)
      if (range_.compare_exchange_weak(range, pack(begin_of(range), end_of(range) - 1)))
        return end_of(range) - 1;
    return kNone;
  }

 private:
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  static int64_t begin_of(uint64_t range) { return static_cast<int64_t>(range >> 32); }
  static int64_t end_of(uint64_t range) { return static_cast<int64_t>(range & 0xFFFFFFFF); }
  static int64_t left_of(uint64_t range) { return end_of(range) - begin_of(range); }

  std::atomic<uint64_t> range_{0};
};

}  // namespace hotloop
