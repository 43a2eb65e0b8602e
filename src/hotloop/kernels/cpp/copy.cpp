// Copies between layouts: of any strides, blocked where the side that is read and the side that is written have
// other neighbours.
#include <cstring>

#include "abi.h"
#include "error.h"
#include "pack.h"
#include "parallel.h"

namespace hotloop {
namespace {

constexpr int kMostDims = 8;
// Fewer elements than so many are one thread's.
constexpr int64_t kOneThreadCount = 32768;
constexpr int64_t kTile = 32;  // Rows and columns of a block that is transposed.

struct Dim {
  int64_t size, from, to;
};

// The dimensions of a copy, the one that is written with the largest stride first; what goes on from one to the
// next on both sides is one dimension.
struct Shape {
  Dim dims[kMostDims];
  int count = 0;

  explicit Shape(const CopyCall& call) {
    for (int64_t i = 0; i < call.num_dims; ++i) {
      const Dim dim{call.sizes[i], call.from_strides[i], call.to_strides[i]};
      if (dim.size == 1) continue;
      int at = count++;
      for (; at > 0 && dims[at - 1].to < dim.to; --at) dims[at] = dims[at - 1];
      dims[at] = dim;
    }
    int kept = 0;
    for (int i = 1; i < count; ++i) {
      Dim& before = dims[kept];
      const Dim& now = dims[i];
      if (before.to == now.to * now.size && before.from == now.from * now.size)
        before = {before.size * now.size, now.from, now.to};
      else
        dims[++kept] = now;
    }
    if (count == 0) dims[count++] = {1, 1, 1};
    else count = kept + 1;
  }

  int64_t elements() const {
    int64_t product = 1;
    for (int i = 0; i < count; ++i) product *= dims[i].size;
    return product;
  }

  void remove(int dim) {
    for (int i = dim; i + 1 < count; ++i) dims[i] = dims[i + 1];
    --count;
  }
};

// Calls body(from, to) with the offsets of elements [begin, end) of the dimensions of `outer`.
template <class Body>
void for_offsets(const Shape& outer, int64_t begin, int64_t end, const Body& body) {
  if (begin >= end) return;
  int64_t index[kMostDims], from = 0, to = 0, rest = begin;
  for (int i = outer.count - 1; i >= 0; --i) {
    index[i] = rest % outer.dims[i].size, rest /= outer.dims[i].size;
    from += index[i] * outer.dims[i].from, to += index[i] * outer.dims[i].to;
  }
  for (int64_t at = begin;;) {
    body(from, to);
    if (++at == end) return;
    for (int i = outer.count - 1; i >= 0; --i) {
      from += outer.dims[i].from, to += outer.dims[i].to;
      if (++index[i] < outer.dims[i].size) break;
      from -= outer.dims[i].size * outer.dims[i].from, to -= outer.dims[i].size * outer.dims[i].to;
      index[i] = 0;
    }
  }
}

template <class T>
void copy_rows(const CopyCall& call, Shape shape, int threads) {
  const Dim inner = shape.dims[shape.count - 1];
  shape.remove(shape.count - 1);
  const T* source = static_cast<const T*>(call.source);
  T* target = static_cast<T*>(call.target);
  parallel(threads, [&](Worker worker) {
    const Range mine = share(shape.elements(), 1, worker);
    for_offsets(shape, mine.begin, mine.end, [&](int64_t from, int64_t to) {
      const T* __restrict a = source + from;
      T* __restrict b = target + to;
      if (inner.from == 1 && inner.to == 1)
        std::memcpy(b, a, static_cast<size_t>(inner.size) * sizeof(T));
      else if (inner.to == 1)
        for (int64_t i = 0; i < inner.size; ++i) b[i] = a[i * inner.from];
      else
        for (int64_t i = 0; i < inner.size; ++i) b[i * inner.to] = a[i * inner.from];
    });
  });
}

// The dimension that is read with stride 1 is not the one that is written so: block by block.
void copy_transposed(const CopyCall& call, Shape shape, int read, int threads) {
  const Dim rows = shape.dims[shape.count - 1], cols = shape.dims[read];
  shape.remove(shape.count - 1);
  shape.remove(read);
  const float* source = static_cast<const float*>(call.source);
  float* target = static_cast<float*>(call.target);
  const int64_t blocks = (cols.size + kTile - 1) / kTile;
  const auto block_of = [&](int64_t from, int64_t to, int64_t block) {
    const int64_t c = block * kTile, width = std::min(kTile, cols.size - c);
    for (int64_t r = 0; r < rows.size; r += kTile)
      transpose(source + from + r * rows.from + c, rows.from, std::min(kTile, rows.size - r), width,
                target + to + c * cols.to + r, cols.to);
  };
  parallel(threads, [&](Worker worker) {
    const Range mine = share(shape.elements() * blocks, 1, worker);
    if (mine.begin >= mine.end) return;
    const int64_t first = mine.begin / blocks, last = (mine.end - 1) / blocks;
    int64_t at = first;
    for_offsets(shape, first, last + 1, [&](int64_t from, int64_t to) {
      const int64_t begin = std::max(mine.begin - at * blocks, int64_t{0});
      const int64_t end = std::min(mine.end - at * blocks, blocks);
      for (int64_t block = begin; block < end; ++block) block_of(from, to, block);
      ++at;
    });
  });
}

void copy(const CopyCall& call) {
  if (call.num_dims < 0 || call.num_dims > kMostDims)
    throw Error("a copy must have at most 8 dimensions (got: " + std::to_string(call.num_dims) +
                ")");
  for (int64_t i = 0; i < call.num_dims; ++i)
    if (call.sizes[i] == 0) return;
  const Shape shape(call);
  const int threads = shape.elements() < kOneThreadCount ? 1 : static_cast<int>(call.num_threads);
  const Dim& inner = shape.dims[shape.count - 1];
  if (call.element_bytes == 4 && inner.to == 1 && inner.from != 1)
    for (int i = 0; i + 1 < shape.count; ++i)
      if (shape.dims[i].from == 1) return copy_transposed(call, shape, i, threads);
  if (call.element_bytes == 4) copy_rows<uint32_t>(call, shape, threads);
  else if (call.element_bytes == 8) copy_rows<uint64_t>(call, shape, threads);
  else if (call.element_bytes == 1) copy_rows<uint8_t>(call, shape, threads);
  else
    throw Error("elements of a copy must have 1, 4 or 8 bytes (got: " +
                std::to_string(call.element_bytes) + ")");
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_copy(const hotloop::CopyCall* call) {
  return hotloop::guarded([&] { hotloop::copy(*call); });
}

HOTLOOP_EXPORT int32_t hotloop_add_count(const hotloop::AddCountCall* call) {
  *call->count += call->addend;
  return 0;
}
