// Products of many small matrices, as those of attention: each is one thread's, and one side of it is packed.
#include <cstring>

#include "gemm.h"
#include "error.h"

namespace hotloop {
namespace {

thread_local Scratch panel_scratch, sum_scratch;

// One product of the batch; `panels`: b, packed here. `tile`: kDirectMC x kDirectNR sums.
template <class Step>
void multiply(const BatchProductCall& call, int64_t i, Step depth_stride, float* panels, float* tile) {
  const Matrix &a = call.a, &b = call.b;
  const float *A = a.data + i * call.a_batch_stride, *B = b.data + i * call.b_batch_stride;
  float* out = call.out + i * call.out_batch_stride;
  for (int64_t n = 0; n < call.n; n += kDirectNR) {
    const int64_t cols = std::min(kDirectNR, call.n - n);
    pack(B + n * b.col_stride, b.col_stride, b.row_stride, cols, call.k, panels + n * call.k, padded(cols));
  }
  for (int64_t m = 0; m < call.m; m += kDirectMC)
    for (int64_t n = 0; n < call.n; n += kDirectNR) {
      const int64_t rows = std::min(kDirectMC, call.m - m), cols = std::min(kDirectNR, call.n - n);
      multiply_rows(vectors_for(cols), rows, call.k, A + m * a.row_stride, a.row_stride, depth_stride,
                    panels + n * call.k, tile, false);
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(out + (m + r) * call.out_row_stride + n, tile + r * padded(cols),
                    static_cast<size_t>(cols) * sizeof(float));
    }
}

void batch_product(const BatchProductCall& call) {
  if (call.m <= 0 || call.n <= 0) return;
  const double work = static_cast<double>(call.batch) * call.m * call.n * std::max<int64_t>(call.k, 1);
  const int threads = work < kOneThreadWork ? 1 : static_cast<int>(call.num_threads);
  const Pieces panels(panel_scratch, padded(call.n) * call.k, threads);
  const Pieces sums(sum_scratch, kDirectMC * kDirectNR, threads);
  parallel(threads, [&](Worker worker) {
    const Range mine = share(call.batch, 1, worker);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      if (call.a.col_stride == 1)
        multiply(call, i, kAdjacent, panels.of(worker.index), sums.of(worker.index));
      else
        multiply(call, i, call.a.col_stride, panels.of(worker.index), sums.of(worker.index));
    }
  });
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_batch_product(const hotloop::BatchProductCall* call) {
  return hotloop::guarded([&] { hotloop::batch_product(*call); });
}
