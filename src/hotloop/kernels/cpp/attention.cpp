#include "gemm.h"
#include "layers.h"
#include "softmax.h"

namespace hotloop {
namespace {

thread_local Scratch operand_scratch, score_scratch;

// Keys and values of one head, packed: B panels of the two products.
struct PackedHead {
  float *keys, *values;

  PackedHead(const Attention& a, float* buffer)
      : keys(buffer), values(buffer + padded(a.keys) * a.head_size) {}

  static int64_t floats(const Attention& a) {
    return padded(a.keys) * a.head_size + padded(a.value_size) * a.keys;
  }

  void pack(const Attention& a, const float* k, const float* v) const {
    const int64_t k_stride = a.operands[1].row_stride, v_stride = a.operands[2].row_stride;
    for (int64_t at = 0; at < a.keys; at += kDirectNR) {
      const int64_t cols = std::min(kDirectNR, a.keys - at);
      hotloop::pack(k + at * k_stride, k_stride, 1, cols, a.head_size, keys + at * a.head_size,
                    padded(cols));
    }
    for (int64_t at = 0; at < a.value_size; at += kDirectNR) {
      const int64_t cols = std::min(kDirectNR, a.value_size - at);
      hotloop::pack(v + at, 1, v_stride, cols, a.keys, values + at * a.keys, padded(cols));
    }
  }
};

// scores[rows][padded(keys)] = q k^T; `tile` holds a block of columns where there are several.
void multiply_scores(const Attention& a, const PackedHead& head, const float* q, int64_t rows,
                     float* scores, float* tile) {
  const int64_t scores_ld = padded(a.keys), q_stride = a.operands[0].row_stride;
  for (int64_t k = 0; k < a.keys; k += kDirectNR) {
    const int64_t ld = padded(std::min(kDirectNR, a.keys - k));
    float* sums = ld == scores_ld ? scores : tile;
    multiply_rows(vectors_for(ld), rows, a.head_size, q, q_stride, kAdjacent,
                  head.keys + k * a.head_size, sums, false);
    for (int64_t r = 0; r < rows && sums == tile; ++r)
      std::memcpy(scores + r * scores_ld + k, tile + r * ld,
                  static_cast<size_t>(ld) * sizeof(float));
  }
}

// The queries from `first` on see so many keys.
void softmax_scores(const Attention& a, int64_t first, int64_t rows, float* scores) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * padded(a.keys);
    const int64_t seen = a.causal ? std::min(a.keys, first + r + 1) : a.keys;
    softmax_row(row, seen, a.scale, false, row);
    std::fill(row + seen, row + a.keys, 0.0f);
  }
}

// out[r * out_ld] = scores v.
void multiply_values(const Attention& a, const PackedHead& head, const float* scores, int64_t rows,
                     float* tile, float* out, int64_t out_ld) {
  for (int64_t o = 0; o < a.value_size; o += kDirectNR) {
    const int64_t cols = std::min(kDirectNR, a.value_size - o), ld = padded(cols);
    multiply_rows(vectors_for(cols), rows, a.keys, scores, padded(a.keys), kAdjacent,
                  head.values + o * a.keys, tile, false);
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(out + r * out_ld + o, tile + r * ld, static_cast<size_t>(cols) * sizeof(float));
  }
}

}  // namespace

void attention(const Attention& a, int64_t batch, const float* queries, const float* keys,
               const float* values, float* out, int threads) {
  const AttentionOperand &q = a.operands[0], &k = a.operands[1], &v = a.operands[2];
  const int64_t tasks = batch * a.heads, out_ld = a.heads * a.value_size;
  const double work =
      static_cast<double>(tasks) * a.queries * a.keys * (a.head_size + a.value_size);
  if (work < kOneThreadWork) threads = 1;
  const int64_t score_floats = kDirectMC * padded(a.keys);
  const Pieces operands(operand_scratch, PackedHead::floats(a), threads);
  const Pieces scratch(score_scratch, score_floats + kDirectMC * kDirectNR, threads);
  parallel(threads, [&](Worker worker) {
    const Range mine = share(tasks, 1, worker);
    const PackedHead head(a, operands.of(worker.index));
    float* scores = scratch.of(worker.index);
    float* tile = scores + score_floats;
    for (int64_t task = mine.begin; task < mine.end; ++task) {
      const int64_t n = task / a.heads, h = task % a.heads;
      const float* from = queries + n * q.sample_floats + h * q.head_stride;
      float* to = out + n * a.queries * out_ld + h * a.value_size;
      head.pack(a, keys + n * k.sample_floats + h * k.head_stride,
                values + n * v.sample_floats + h * v.head_stride);
      for (int64_t first = 0; first < a.queries; first += kDirectMC) {
        const int64_t rows = std::min(kDirectMC, a.queries - first);
        multiply_scores(a, head, from + first * q.row_stride, rows, scores, tile);
        softmax_scores(a, first, rows, scores);
        multiply_values(a, head, scores, rows, tile, to + first * out_ld, out_ld);
      }
    }
  });
}

}  // namespace hotloop
