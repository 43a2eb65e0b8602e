// Rows of packed storage into the rows of a batch: copied, or bytes turned into floats by a table of
// the 256 values that they stand for, so that conversion and normalization cost no second pass.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "abi.h"
#include "error.h"
#include "parallel.h"
#include "scratch.h"

namespace hotloop {
namespace {

// Rows next to each other in a file are read together, up to so many bytes.
constexpr int64_t kRunBytes = 64 * 1024;
// Of the next row, so much is asked of memory while this one is copied.
constexpr int64_t kAskedBytes = 4096, kLineBytes = 64;
constexpr int64_t kDone = 0, kShort = -1;

thread_local Scratch run_scratch;

int64_t first_outside(const RowCopy& copy) {
  for (int64_t i = 0; i < copy.count; ++i)
    if (copy.indices[i] < 0 || copy.indices[i] >= copy.num_rows) return i;
  return -1;
}

void put(const RowCopy& copy, const unsigned char* from, int64_t at) {
  char* to = copy.out + at * copy.out_step_bytes;
  if (!copy.table) {
    std::memcpy(to, from, static_cast<size_t>(copy.row_bytes));
    return;
  }
  float* values = reinterpret_cast<float*>(to);
  const int64_t area = copy.row_bytes / copy.channels;
  for (int64_t c = 0; c < copy.channels; ++c) {
    const float* value_of = copy.table + c * 256;
    for (int64_t k = c * area; k < (c + 1) * area; ++k) values[k] = value_of[from[k]];
  }
}

void copy_from_memory(const RowCopy& copy) {
  parallel_for(static_cast<int>(copy.num_threads), copy.count, [&](int64_t i) {
    if (i + 1 < copy.count) {
      const unsigned char* next = copy.rows + copy.indices[i + 1] * copy.row_bytes;
      for (int64_t at = 0; at < std::min(copy.row_bytes, kAskedBytes); at += kLineBytes)
        __builtin_prefetch(next + at);
    }
    put(copy, copy.rows + copy.indices[i] * copy.row_bytes, i);
  });
}

// kDone, kShort, or the error's number.
int64_t read_all(int fd, unsigned char* to, int64_t bytes, int64_t at) {
  while (bytes > 0) {
    const ssize_t got = pread(fd, to, static_cast<size_t>(bytes), at);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) return kShort;
    to += got, at += got, bytes -= got;
  }
  return kDone;
}

// The rows of [begin, end) of the indices, runs of neighbours at once. `buffer` holds one run.
int64_t read_block(const RowCopy& copy, int64_t begin, int64_t end, unsigned char* buffer) {
  for (int64_t i = begin, next; i < end; i = next) {
    next = i + 1;
    while (next < end && copy.indices[next] == copy.indices[next - 1] + 1) ++next;
    const int64_t bytes = (next - i) * copy.row_bytes, at = copy.indices[i] * copy.row_bytes;
    const bool direct = !copy.table && (next == i + 1 || copy.out_step_bytes == copy.row_bytes);
    unsigned char* to =
        direct ? reinterpret_cast<unsigned char*>(copy.out + i * copy.out_step_bytes) : buffer;
    const int64_t result = read_all(static_cast<int>(copy.fd), to, bytes, at);
    if (result != kDone) return result;
    for (int64_t k = i; !direct && k < next; ++k) put(copy, to + (k - i) * copy.row_bytes, k);
  }
  return kDone;
}

int64_t copy_from_file(const RowCopy& copy) {
  const int64_t most = std::max<int64_t>(1, kRunBytes / copy.row_bytes);
  const int64_t blocks = (copy.count + most - 1) / most;
  const int threads = static_cast<int>(std::min(copy.num_threads, std::max<int64_t>(blocks, 1)));
  const Pieces buffers(run_scratch, (most * copy.row_bytes + 3) / 4, threads);
  std::atomic<int64_t> next{0}, failed{kDone};
  parallel(threads, [&](Worker worker) {
    auto* buffer = reinterpret_cast<unsigned char*>(buffers.of(worker.index));
    // Blocks in turn: a read may take long for one thread and not for another.
    for (int64_t block; failed == kDone && (block = next++) < blocks;) {
      const int64_t result =
          read_block(copy, block * most, std::min(copy.count, (block + 1) * most), buffer);
      if (result != kDone) failed = result;
    }
  });
  return failed;
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_copy_rows(hotloop::RowCopy* copy) {
  using namespace hotloop;
  return guarded([&] {
    copy->file_error = kDone;
    copy->bad_index = first_outside(*copy);
    // Rows of no bytes have no address either.
    if (copy->bad_index >= 0 || copy->row_bytes == 0) return;
    if (copy->rows) copy_from_memory(*copy);
    else copy->file_error = copy_from_file(*copy);
  });
}
