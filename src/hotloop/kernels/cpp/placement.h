// Where the tensor arena puts each block: numbers alone, no memory.
//
// memory/arena_model.py is the same algorithm, in the same order of ties: change both or neither.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace hotloop {

// Best fit with immediate coalescing. Blocks tile [0, top); the wilderness above is used last.
// Not safe for several threads at once.
class Placement {
 public:
  // Ordered by (size, offset), so that lower_bound finds the smallest that fits, the lowest among equals.
  using FreeSet = std::set<std::pair<size_t, size_t>>;

  // Offset of a block of `size` bytes; none: it does not fit below `capacity`. Throws std::bad_alloc, and
  // then nothing has changed.
  std::optional<size_t> place(size_t size, size_t capacity);

  // Size of the block that was in use at `offset`; 0: none was.
  size_t release(size_t offset) noexcept;

  bool in_use(size_t offset) const;
  size_t top() const { return top_; }
  const FreeSet& free_blocks() const { return free_; }

 private:
  struct Block {
    size_t size;
    bool is_free;
    // The node that will stand in the free set, kept while the block is in use: to free a block takes no
    // memory, and so cannot fail.
    FreeSet::node_type entry;
  };

  static FreeSet::node_type make_entry(size_t size, size_t offset);

  std::map<size_t, Block> blocks_;  // by offset
  FreeSet free_;
  size_t top_ = 0;
};

}  // namespace hotloop
