// Guards of a recorded step: whether the memory of Python's objects and of torch's tensors is as it was.
#include <algorithm>
#include <cstdint>

#include "abi.h"
#include "error.h"

HOTLOOP_EXPORT int64_t hotloop_first_changed_word(const hotloop::GuardWord* words, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (*words[i].address != words[i].expected) return i;
  return -1;
}

HOTLOOP_EXPORT int64_t hotloop_first_changed_block(const hotloop::GuardBlock* blocks,
                                                   int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const hotloop::GuardBlock& block = blocks[i];
    if (*block.slot != block.owner) return i;
    if (!std::equal(block.content, block.content + block.count, block.expected)) return i;
  }
  return -1;
}
