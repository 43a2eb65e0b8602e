// X W^T where W has been packed once, when a model was loaded, in the order in which it is used: a product
// reads it as one run of memory.
#pragma once

#include "epilogue.h"
#include "gemm.h"

namespace hotloop {

// W [outputs, depth] in panels of panel_cols columns.
struct PackedMatrix {
  const float* panels;
  int64_t outputs, depth, panel_cols;
};

int64_t packed_floats(int64_t outputs, int64_t depth, int64_t panel_cols);
void pack_panels(const float* weight, int64_t outputs, int64_t depth, int64_t panel_cols, float* to);
// Columns of a panel: as many as there are sums for, fewer where else threads would have unlike parts.
int64_t best_panel_cols(int64_t outputs, int64_t threads);

// Where rows of a product's left side lie: in memory, or gathered.
struct Rows {
  const float* data;
  int64_t stride;
};

// Rows at a time of a product, and how deep the packed side is used before the next rows: kRowsKC *
// kDirectNR floats stay in a second-level cache.
constexpr int64_t kLeastRows = 24, kMostRows = 96, kRowsKC = 384;

// Asks for the next panel, a line at each step: some rows for the first line of each of its steps, the next
// rows for the second.
struct PrefetchPanel {
  const float* at;
  int64_t step;
  void operator()() {
    __builtin_prefetch(at, 0, 2);
    at += step;
  }
};

namespace detail {

inline thread_local Scratch rows_scratch;

// tile[count][ld] = rows times one panel.
inline void multiply_panel(const Rows& rows, int64_t count, int64_t depth, const float* panel,
                           int64_t ld, float* tile) {
  // Few rows read the panel once or twice: there is nothing to keep. Else in equal parts.
  const int64_t pieces = count <= 2 * kDirectMR ? 1 : (depth + kRowsKC - 1) / kRowsKC;
  const int64_t deep = (depth + pieces - 1) / pieces;
  for (int64_t k = 0; k < depth; k += deep, panel += deep * ld) {
    int64_t line = 0;
    const auto overlap_of = [&](const float*, int64_t, int) {
      const int64_t at = line < ld ? deep * ld + line : 0;  // Then it asks for nothing new.
      line += kLineFloats;
      return PrefetchPanel{panel + at, ld};
    };
    multiply_rows(ld / kLanes, count, std::min(deep, depth - k), rows.data + k, rows.stride,
                  kAdjacent, panel, tile, k > 0, overlap_of);
  }
}

}  // namespace detail

// epilogue(X W^T): `m` rows that source(worker, first, count) gives. Threads part the rows where there are
// enough, else the panels.
template <class Source, class Epilogue>
void packed_product(const PackedMatrix& w, int64_t m, int threads, const Source& source,
                    const Epilogue& epilogue) {
  const int64_t wide = w.panel_cols, panels = (w.outputs + wide - 1) / wide;
  if (static_cast<double>(m) * w.depth * w.outputs < kOneThreadWork) threads = 1;
  // A thread that takes rows alone finds them in its own cache, and reads all weights; with few rows those
  // would keep it waiting.
  const bool enough = m >= kLeastRows * threads && 2 * m >= w.outputs;
  const bool by_rows = m >= 2 * kMostRows * threads || enough || panels < threads;
  const int64_t most_rows = (std::min(m, kMostRows) + kDirectMR - 1) / kDirectMR * kDirectMR;
  const Pieces tiles(detail::rows_scratch, most_rows * wide, threads);
  parallel(threads, [&](Worker worker) {
    const Range mine = by_rows ? share(m, kDirectMR, worker) : Range{0, m};
    const Range cols = by_rows ? Range{0, panels} : share(panels, 1, worker);
    const int64_t most = even_block(mine.end - mine.begin, kMostRows);
    float* tile = tiles.of(worker.index);
    for (int64_t first = mine.begin; first < mine.end; first += most) {
      const int64_t count = std::min(most, mine.end - first);
      const Rows rows = source(worker, first, count);
      for (int64_t panel = cols.begin; panel < cols.end; ++panel) {
        const int64_t j = panel * wide, width = std::min(wide, w.outputs - j), ld = padded(width);
        detail::multiply_panel(rows, count, w.depth, w.panels + j * w.depth, ld, tile);
        epilogue(tile, ld, first, count, j, width);
      }
    }
  });
}

}  // namespace hotloop
