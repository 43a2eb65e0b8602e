// Random masks as torch draws them on a CPU: by its generator, MT19937 (Matsumoto and Nishimura, "Mersenne Twister",
// 1998), two words for each element. What is drawn is bit for bit torch's, and so is the state it leaves.
#include <algorithm>
#include <cstring>

#include "abi.h"
#include "error.h"

namespace hotloop {
namespace {

constexpr int kWords = 624, kMiddle = 397;
constexpr int64_t kBlock = 1024;  // Elements at a time: their words stay in the first-level cache.

// The state as torch.Generator.get_state gives it: words of 8 bytes, of which the generator uses 4.
struct SavedState {
  uint64_t seed;
  int32_t left, seeded;
  uint64_t next;
  uint64_t words[kWords];
};

uint32_t twist(uint32_t u, uint32_t v) {
  return (((u & 0x80000000u) | (v & 0x7FFFFFFFu)) >> 1) ^ (-(v & 1u) & 0x9908B0DFu);
}

class Generator {
 public:
  explicit Generator(SavedState& saved) : saved_(saved), left_(saved.left), next_(static_cast<int>(saved.next)) {
    if (left_ < 1 || left_ > kWords || next_ < 0 || next_ + left_ - 1 > kWords)
      throw Error("a random state must be one of torch's CPU generator");
    for (int i = 0; i < kWords; ++i) words_[i] = static_cast<uint32_t>(saved.words[i]);
  }
  Generator(const Generator&) = delete;
  Generator& operator=(const Generator&) = delete;
  ~Generator() {
    for (int i = 0; i < kWords; ++i) saved_.words[i] = words_[i];
    saved_.left = left_, saved_.next = static_cast<uint64_t>(next_);
  }

  void take(uint32_t* to, int64_t count) {
    while (count > 0) {
      int taken = static_cast<int>(std::min<int64_t>(count, left_ - 1));
      if (taken == 0) {
        renew();
        taken = static_cast<int>(std::min<int64_t>(count, kWords));
        left_ = kWords + 1;  // The first word of a new state is not counted.
        next_ = 0;
      }
      temper(words_ + next_, taken, to);
      left_ -= taken, next_ += taken, to += taken, count -= taken;
    }
  }

 private:
  void renew() {
    uint32_t* const p = words_;
#pragma GCC ivdep
    for (int i = 0; i < kWords - kMiddle; ++i) p[i] = p[i + kMiddle] ^ twist(p[i], p[i + 1]);
    // What is read was written 227 words before.
#pragma GCC ivdep
    for (int i = kWords - kMiddle; i < kWords - 1; ++i)
      p[i] = p[i + kMiddle - kWords] ^ twist(p[i], p[i + 1]);
    p[kWords - 1] = p[kMiddle - 1] ^ twist(p[kWords - 1], p[0]);
  }

  static void temper(const uint32_t* __restrict from, int count, uint32_t* __restrict to) {
    for (int i = 0; i < count; ++i) {
      uint32_t y = from[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9D2C5680u;
      y ^= (y << 15) & 0xEFC60000u;
      to[i] = y ^ (y >> 18);
    }
  }

  SavedState& saved_;
  int left_, next_;
  uint32_t words_[kWords];
};

// `value` where a number of 53 bits is below the limit.
void compare(const uint32_t* words, int64_t count, int64_t limit, float value, float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    uint64_t pair;
    std::memcpy(&pair, words + 2 * i, sizeof pair);
    const uint64_t number = (pair << 32 | pair >> 32) & ((uint64_t{1} << 53) - 1);
    out[i] = static_cast<int64_t>(number) < limit ? value : 0.0f;
  }
}

void draw(const DrawCall& call) {
  if (!(call.probability >= 0 && call.probability <= 1))
    throw Error("a probability must be from 0 to 1 (got: " + std::to_string(call.probability) + ")");
  // number 2^-53 < probability, in whole numbers.
  const double scaled = call.probability * 9007199254740992.0;
  const int64_t whole = static_cast<int64_t>(scaled);
  const int64_t limit = static_cast<double>(whole) < scaled ? whole + 1 : whole;
  Generator generator(*static_cast<SavedState*>(call.state));
  alignas(64) uint32_t words[2 * kBlock];
  for (int64_t i = 0; i < call.count; i += kBlock) {
    const int64_t count = std::min(kBlock, call.count - i);
    generator.take(words, 2 * count);
    compare(words, count, limit, call.value, call.out + i);
  }
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_draw(const hotloop::DrawCall* call) {
  return hotloop::guarded([&] { hotloop::draw(*call); });
}
