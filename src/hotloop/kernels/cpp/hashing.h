// `data/hashing.py` in C++: splitmix64 as a function of words, without state.
#pragma once

#include <cstdint>

namespace hotloop {

constexpr uint64_t kGolden = UINT64_C(0x9E3779B97F4A7C15);

inline uint64_t scrambled(uint64_t word) {
  word = (word ^ (word >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
  word = (word ^ (word >> 27)) * UINT64_C(0x94D049BB133111EB);
  return word ^ (word >> 31);
}

inline uint64_t mix(uint64_t one, uint64_t other) {
  return scrambled(scrambled(scrambled(one + kGolden)) + scrambled(other + kGolden));
}

}  // namespace hotloop
