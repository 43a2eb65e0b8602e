#include "placement.h"

#include <iterator>

namespace hotloop {

std::optional<size_t> Placement::place(size_t size, size_t capacity) {
  const auto fit = free_.lower_bound({size, 0});
  if (fit == free_.end()) {
    if (size > capacity || top_ > capacity - size) return std::nullopt;
    const size_t offset = top_;
    auto entry = make_entry(size, offset);
    blocks_.emplace_hint(blocks_.end(), offset, Block{size, false, std::move(entry)});
    top_ += size;
    return offset;
  }
  const auto [found, offset] = *fit;
  const auto block = blocks_.find(offset);
  if (found > size) {
    auto rest = make_entry(found - size, offset + size);
    blocks_.emplace_hint(std::next(block), offset + size,
                         Block{found - size, true, FreeSet::node_type{}});
    free_.insert(std::move(rest));
  }
  block->second.entry = free_.extract(fit);
  block->second.is_free = false;
  block->second.size = size;
  return offset;
}

size_t Placement::release(size_t offset) noexcept {
  auto block = blocks_.find(offset);
  if (block == blocks_.end() || block->second.is_free) return 0;
  const size_t size = block->second.size;
  auto entry = std::move(block->second.entry);
  block->second.is_free = true;
  const auto next = std::next(block);
  if (next != blocks_.end() && next->second.is_free) {
    free_.erase({next->second.size, next->first});
    block->second.size += next->second.size;
    blocks_.erase(next);
  }
  if (block != blocks_.begin()) {
    const auto previous = std::prev(block);
    if (previous->second.is_free) {
      free_.erase({previous->second.size, previous->first});
      previous->second.size += block->second.size;
      blocks_.erase(block);
      block = previous;
    }
  }
  if (block->first + block->second.size == top_) {
    top_ = block->first;
    blocks_.erase(block);
  } else {
    entry.value() = {block->second.size, block->first};
    free_.insert(std::move(entry));
  }
  return size;
}

bool Placement::in_use(size_t offset) const {
  const auto block = blocks_.find(offset);
  return block != blocks_.end() && !block->second.is_free;
}

Placement::FreeSet::node_type Placement::make_entry(size_t size, size_t offset) {
  FreeSet one{{size, offset}};
  return one.extract(one.begin());
}

}  // namespace hotloop
