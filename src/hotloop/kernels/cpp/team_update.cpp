#include "team_update.h"

#include <algorithm>
#include <cstring>

#include "control_row.h"
#include "parallel.h"
#include "products.h"
#include "updates.h"

namespace hotloop {
namespace {

constexpr int64_t kRowGrain = 8, kElementGrain = 16;  // Of which shares are multiples.
constexpr int64_t kBlockFloats = 1024;                // Of a gradient that is added and used at once.

float* at_if_any(float* data, int64_t offset) { return data ? data + offset : nullptr; }

// sum[i] = the chunks' gradients, added in the order of the chunks.
void add_gradients(const TeamWeight& w, int64_t chunks, int64_t at, int64_t count, float* sum) {
  std::memcpy(sum, w.left + at, static_cast<size_t>(count) * sizeof(float));
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const float* from = w.left + chunk * w.chunk_stride + at;
    for (int64_t i = 0; i < count; ++i) sum[i] += from[i];
  }
}

// The gradient is the product of factors that all chunks wrote a part of.
void update_factored(const TeamWeight& w, const Range& rows, const UpdateRule& rule) {
  const int64_t count = rows.end - rows.begin, at = rows.begin * w.cols;
  if (count <= 0) return;
  const Matrix left{w.left + rows.begin, 1, w.rows}, right{w.right, w.cols, 1};
  if (w.gradient) {
    ProductCall call{};
    call.m = count;
    call.n = w.cols;
    call.k = w.depth;
    call.a = left;
    call.b = right;
    call.c = w.gradient + at;
    call.c_row_stride = w.cols;
    call.num_threads = 1;
    product(call);
    return;
  }
  ProductUpdateCall call{};
  call.m = count;
  call.n = w.cols;
  call.k = w.depth;
  call.a = left;
  call.b = right;
  call.weight = w.weight + at;
  call.weight_row_stride = w.cols;
  call.state1 = at_if_any(w.state1, at);
  call.state2 = at_if_any(w.state2, at);
  call.state_row_stride = w.cols;
  call.rule = rule;
  call.scale = 1.0f;
  call.num_threads = 1;
  product_update(call);
}

void update_added(const TeamWeight& w, int64_t chunks, const Range& elements,
                  const UpdateRule& rule) {
  float sum[kBlockFloats];
  for (int64_t at = elements.begin; at < elements.end; at += kBlockFloats) {
    const int64_t count = std::min(kBlockFloats, elements.end - at);
    add_gradients(w, chunks, at, count, w.gradient ? w.gradient + at : sum);
    if (w.gradient) continue;
    UpdateCall call{};
    call.count = count;
    call.weight = w.weight + at;
    call.gradient = sum;
    call.state1 = at_if_any(w.state1, at);
    call.state2 = at_if_any(w.state2, at);
    call.rule = rule;
    call.scale = 1.0f;
    call.num_threads = 1;
    update(call);
  }
}

}  // namespace

void update_share(const std::vector<TeamWeight>& weights, int64_t chunks, int worker, int workers,
                  const ControlRow* table) {
  for (const TeamWeight& w : weights) {
    const UpdateRule rule = table ? rule_of(table[w.group]) : UpdateRule{};
    if (w.factored) update_factored(w, share(w.rows, kRowGrain, worker, workers), rule);
    else update_added(w, chunks, share(w.cols, kElementGrain, worker, workers), rule);
  }
}

void combine(const std::vector<TeamBuffer>& buffers, int64_t chunks) {
  const double share = 1.0 / static_cast<double>(chunks);
  for (const TeamBuffer& b : buffers) {
    if (!b.is_float) {
      std::memcpy(b.shared, b.copies, static_cast<size_t>(b.bytes));
      continue;
    }
    float* shared = reinterpret_cast<float*>(b.shared);
    for (int64_t i = 0; i < b.bytes / static_cast<int64_t>(sizeof(float)); ++i) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const char* copy = b.copies + chunk * b.chunk_stride_bytes;
        sum += share * reinterpret_cast<const float*>(copy)[i];
      }
      shared[i] = static_cast<float>(sum);
    }
  }
}

}  // namespace hotloop
