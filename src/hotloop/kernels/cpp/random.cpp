// Random numbers that are functions of a key and of their position: the same whoever draws them, and when.
#include <cmath>

#include "abi.h"
#include "error.h"
#include "hashing.h"

namespace hotloop {
namespace {

constexpr int64_t kUniform = 0, kBelow = 1, kNormal = 2;

// Number `position` of a stream, in [0, 1).
inline float uniform(uint64_t stream, int64_t position) {
  const uint64_t word = scrambled((static_cast<uint64_t>(position) ^ stream) * kGolden);
  return static_cast<float>(static_cast<int32_t>(word >> 40)) * 0x1p-24f;
}

void draw(const RandomCall& call) {
  const uint64_t key = static_cast<uint64_t>(*call.key);
  const uint64_t first = scrambled(key + call.first_stream);
  const uint64_t second = scrambled(key + call.second_stream);
  const float a = call.a, b = call.b;
  float* out = call.out;
  if (call.kind == kUniform) {
    for (int64_t i = 0; i < call.count; ++i) out[i] = a + (b - a) * uniform(first, i);
  } else if (call.kind == kBelow) {
    for (int64_t i = 0; i < call.count; ++i) out[i] = uniform(first, i) < a ? 1.0f : 0.0f;
  } else if (call.kind == kNormal) {
    constexpr float kTurn = 6.283185307179586f;
    for (int64_t i = 0; i < call.count; ++i) {
      const float radius = std::sqrt(-2.0f * std::log(1.0f - uniform(first, i)));
      out[i] = a + b * (radius * std::cos(kTurn * uniform(second, i)));
    }
  } else {
    throw Error("random numbers must be of a known kind");
  }
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_random(const hotloop::RandomCall* call) {
  return hotloop::guarded([&] { hotloop::draw(*call); });
}
