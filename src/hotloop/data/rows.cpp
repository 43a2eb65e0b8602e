// Rows of packed storage into the rows of a batch: copied, or bytes turned into floats by a table of
// the 256 values that they stand for, so that conversion and normalization cost no second pass.
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <vector>

#include <unistd.h>

namespace {

// Rows next to each other in a file are read together, up to so many bytes.
constexpr int64_t kRunBytes = 64 * 1024;
constexpr int64_t kDone = -1, kShort = -2, kErrno = -10;

int64_t outside(const int64_t* indices, int64_t count, int64_t num_rows) {
  for (int64_t i = 0; i < count; ++i)
    if (indices[i] < 0 || indices[i] >= num_rows) return i;
  return kDone;
}

// One row; `table` (float [channels][256]): stored rows are bytes, written ones floats.
void put(const unsigned char* from, char* to, int64_t row_bytes, const float* table,
         int64_t channels) {
  if (!table) {
    std::memcpy(to, from, row_bytes);
    return;
  }
  float* values = reinterpret_cast<float*>(to);
  const int64_t area = row_bytes / channels;
  for (int64_t c = 0; c < channels; ++c) {
    const float* worth = table + c * 256;
    for (int64_t k = c * area; k < (c + 1) * area; ++k) values[k] = worth[from[k]];
  }
}

int64_t read_all(int fd, unsigned char* to, int64_t bytes, int64_t at) {
  while (bytes > 0) {
    const ssize_t got = pread(fd, to, bytes, at);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return kErrno - errno;
    if (got == 0) return kShort;
    to += got, at += got, bytes -= got;
  }
  return kDone;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Rows `indices` (count of them) of `rows` go to `out`, out_step bytes apart. Returns the first place
// in `indices` outside [0, num_rows), and then nothing was written; kDone otherwise.
EXPORT int64_t hotloop_copy_rows(const unsigned char* rows, int64_t num_rows, int64_t row_bytes,
                                 const int64_t* indices, int64_t count, char* out,
                                 int64_t out_step, const float* table, int64_t channels,
                                 int32_t num_threads) {
  const int64_t bad = outside(indices, count, num_rows);
  if (bad != kDone) return bad;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
  for (int64_t i = 0; i < count; ++i) {
    if (i + 1 < count) {
      const unsigned char* next = rows + indices[i + 1] * row_bytes;
      for (int64_t at = 0; at < row_bytes && at < 4096; at += 64) __builtin_prefetch(next + at);
    }
    put(rows + indices[i] * row_bytes, out + i * out_step, row_bytes, table, channels);
  }
  return kDone;
}

// The same from a file of dense rows. Also returns kShort, or kErrno less the error's number.
EXPORT int64_t hotloop_read_rows(int32_t fd, int64_t num_rows, int64_t row_bytes,
                                 const int64_t* indices, int64_t count, char* out,
                                 int64_t out_step, const float* table, int64_t channels,
                                 int32_t num_threads) {
  const int64_t bad = outside(indices, count, num_rows);
  if (bad != kDone) return bad;
  const int64_t most = std::max<int64_t>(1, kRunBytes / row_bytes);
  int64_t failed = kDone;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    std::vector<unsigned char> buffer;
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < (count + most - 1) / most; ++block) {
      const int64_t end = std::min(count, (block + 1) * most);
      for (int64_t i = block * most, next; i < end; i = next) {
        next = i + 1;
        while (next < end && indices[next] == indices[next - 1] + 1) ++next;
        const int64_t bytes = (next - i) * row_bytes, at = indices[i] * row_bytes;
        const bool direct = !table && (next == i + 1 || out_step == row_bytes);
        if (!direct && static_cast<int64_t>(buffer.size()) < bytes) buffer.resize(bytes);
        unsigned char* to =
            direct ? reinterpret_cast<unsigned char*>(out + i * out_step) : buffer.data();
        const int64_t result = read_all(fd, to, bytes, at);
        if (result != kDone) {
#pragma omp atomic write
          failed = result;
          break;
        }
        for (int64_t k = i; !direct && k < next; ++k)
          put(to + (k - i) * row_bytes, out + k * out_step, row_bytes, table, channels);
      }
    }
  }
  return failed;
}
