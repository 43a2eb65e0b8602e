// Rows from memory and from a file, copied and through a table, against a plain loop.
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <vector>

#include "abi.h"
#include "check.h"

using namespace hotloop;

namespace {

struct Case {
  int64_t num_rows, channels, area, count, padding;
  bool has_table, is_file;
  int64_t threads;
};

void check_rows(const Case& c, unsigned seed) {
  Draw draw(seed);
  const int64_t row_bytes = c.channels * c.area;
  const int64_t value_bytes = c.has_table ? sizeof(float) : 1;
  std::vector<unsigned char> rows(static_cast<size_t>(c.num_rows * row_bytes));
  for (auto& byte : rows) byte = static_cast<unsigned char>(draw.below(256));
  std::vector<float> table(static_cast<size_t>(c.channels * 256));
  for (auto& value : table) value = static_cast<float>(draw.below(1000)) / 8;
  std::vector<int64_t> indices(static_cast<size_t>(c.count));
  // Half of them in runs, as a file is read.
  for (size_t i = 0; i < indices.size(); ++i)
    indices[i] = i && draw.below(2) ? (indices[i - 1] + 1) % c.num_rows
                                    : static_cast<int64_t>(draw.below(static_cast<size_t>(c.num_rows)));
  const int64_t step = row_bytes * value_bytes + c.padding * 4;
  std::vector<char> out(static_cast<size_t>(c.count * step), 7), wanted = out;
  for (int64_t i = 0; i < c.count; ++i)
    for (int64_t k = 0; k < row_bytes; ++k) {
      const unsigned char byte = rows[static_cast<size_t>(indices[static_cast<size_t>(i)] * row_bytes + k)];
      char* to = &wanted[static_cast<size_t>(i * step + k * value_bytes)];
      if (c.has_table) std::memcpy(to, &table[static_cast<size_t>(k / c.area * 256 + byte)], 4);
      else std::memcpy(to, &byte, 1);
    }

  std::FILE* file = std::tmpfile();
  CHECK(file && std::fwrite(rows.data(), 1, rows.size(), file) == rows.size());
  CHECK(std::fflush(file) == 0);
  RowCopy copy{};
  copy.rows = c.is_file ? nullptr : rows.data();
  copy.fd = fileno(file);
  copy.num_rows = c.num_rows;
  copy.row_bytes = row_bytes;
  copy.indices = indices.data();
  copy.count = c.count;
  copy.out = out.data();
  copy.out_step_bytes = step;
  copy.table = c.has_table ? table.data() : nullptr;
  copy.channels = c.channels;
  copy.num_threads = c.threads;
  CHECK(hotloop_copy_rows(&copy) == 0);
  CHECK(copy.bad_index == -1 && copy.file_error == 0);
  CHECK(out == wanted);

  copy.num_rows = c.num_rows + 1;  // One more than the file has.
  if (c.is_file && c.count) {
    indices[indices.size() - 1] = c.num_rows;
    CHECK(hotloop_copy_rows(&copy) == 0 && copy.file_error == -1);
    copy.fd = -1;
    CHECK(hotloop_copy_rows(&copy) == 0 && copy.file_error == EBADF);
  }
  if (c.count) {
    out.assign(out.size(), 7);
    indices[0] = draw.below(2) ? -1 : c.num_rows + 1;
    CHECK(hotloop_copy_rows(&copy) == 0 && copy.bad_index == 0);
    CHECK(out == std::vector<char>(out.size(), 7));
  }
  std::fclose(file);
}

}  // namespace

int main() {
  Draw draw(1);
  for (unsigned seed = 0; seed < 200; ++seed) {
    const auto one_of = [&](size_t end) { return static_cast<int64_t>(draw.below(end)); };
    Case c{1 + one_of(300), 1 + one_of(3), 1 + one_of(900), one_of(200), one_of(3),
           draw.below(2) == 1, draw.below(2) == 1, 1 + one_of(4)};
    check_rows(c, seed);
  }
  std::puts("rows: all is right");
}
