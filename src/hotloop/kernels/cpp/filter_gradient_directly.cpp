// The gradient of filters as direct sums, a vector of outputs at a time: gradients of results times pixels.
#include "convolve.h"
#include "direct_sums.h"
#include "scratch.h"

namespace hotloop {
namespace {

thread_local Scratch piece_scratch, gradient_scratch, part_scratch;

constexpr int64_t kResults = 256;  // Whose gradients are used again and again: 16 KiB with 16 lanes.

struct Sizes {
  int64_t inputs, outputs, blocks;  // Blocks: vectors of outputs.
  int64_t cols, run, filter;        // Pixels of a row; taps of a row, and floats of all for a block.
  Cut cut;

  explicit Sizes(const FilterGradient& call)
      : inputs(call.input.channels), outputs(call.gradient.channels), blocks(vectors_for(outputs)),
        cols(call.gradient.width + call.size.width - 1), run(call.size.width * inputs),
        filter(call.size.height * run * kLanes),
        cut{call.gradient.height, call.size.height, cols * inputs, 2 * call.gradient.width,
            kResults} {}

  int64_t part() const { return blocks * (filter + kLanes); }
};

// to[result][output]: the gradients of a vector of outputs from o on; 0 where pooling took another result.
void read_gradients(const Image& g, int64_t o, const Piece& piece, float* to, Vector* total) {
  const int64_t count = g.channels - o, height = g.height / 2, width = g.width / 2;
  for (int64_t h = piece.rows.begin; h < piece.rows.end; ++h, to += g.width * kLanes) {
    if (!g.argmax) {
      const float* from = g.data + piece.n * g.n_stride + h * g.h_stride + o;
      for (int64_t w = 0; w < g.width; ++w) {
        const Vector value = load(from + w * g.w_stride, count);
        store(to + w * kLanes, value);
        *total += value;
      }
      continue;
    }
    std::fill_n(to, g.width * kLanes, 0.0f);
    if (h / 2 >= height) continue;
    const float* from = g.data + piece.n * g.n_stride + h / 2 * g.h_stride + o;
    const uint8_t* argmax = g.argmax + (piece.n * height + h / 2) * width * g.channels + o;
    for (int64_t w = 0; w < width; ++w) {
      const Vector value = load(from + w * g.w_stride, count);
      const Words place = load_bytes(argmax + w * g.channels, count);
      const int32_t left = static_cast<int32_t>(h & 1) * 2;
      for (int32_t j = 0; j < 2; ++j) {
        const Vector taken = place == left + j ? value : Vector{};
        store(to + (2 * w + j) * kLanes, taken);
        *total += taken;
      }
    }
  }
}

// sums[K][V] of a vector of outputs each, rows `run` apart, += gradients times pixels of `count` pieces.
template <int K, int V>
void add_products(const Sizes& sizes, const Piece* pieces, int count, const float* x,
                  const float* g, float* sums, int64_t width) {
  const int64_t row = sizes.cut.row, run = sizes.run;
  Vector sum[K][V];
#pragma GCC unroll 5
  for (int i = 0; i < K; ++i)
#pragma GCC unroll 7
    for (int j = 0; j < V; ++j) sum[i][j] = load(sums + (i * run + j) * kLanes);
  for (const Piece* p = pieces; p < pieces + count; ++p)
    for (int64_t h = 0; h < p->rows.end - p->rows.begin; ++h) {
      const float* at = x + p->at + h * row;
      for (int64_t w = 0; w < width; ++w, at += sizes.inputs, g += kLanes) {
        const Vector value = load(g);
#pragma GCC unroll 5
        for (int i = 0; i < K; ++i)
#pragma GCC unroll 7
          for (int j = 0; j < V; ++j) sum[i][j] += value * at[i * row + j];
      }
    }
#pragma GCC unroll 5
  for (int i = 0; i < K; ++i)
#pragma GCC unroll 7
    for (int j = 0; j < V; ++j) store(sums + (i * run + j) * kLanes, sum[i][j]);
}

// The sums of pairs of rows [range): sums[block][filter row][column][input][output], then the sums of the gradient
// itself.
void add_part(const FilterGradient& call, const Sizes& sizes, Range range, float* sums, float* x,
              float* g) {
  std::memset(sums, 0, static_cast<size_t>(sizes.part()) * sizeof(float));
  float* totals = sums + sizes.blocks * sizes.filter;
  const int64_t width = call.gradient.width;
  Piece pieces[kMostPieces];
  while (range.begin < range.end) {
    const int count = sizes.cut.take(&range, pieces);
    for (const Piece* p = pieces; p < pieces + count; ++p)
      copy_pixels(call.input, p->n, p->rows.begin - call.pad_h, -call.pad_w,
                  p->rows.end - p->rows.begin + call.size.height - 1, sizes.cols, 0, sizes.inputs,
                  x + p->at);
    for (int64_t b = 0; b < sizes.blocks; ++b) {
      Vector total = load(totals + b * kLanes);
      float* to = g;
      for (const Piece* p = pieces; p < pieces + count; ++p) {
        read_gradients(call.gradient, b * kLanes, *p, to, &total);
        to += (p->rows.end - p->rows.begin) * width * kLanes;
      }
      store(totals + b * kLanes, total);
      for_tap_blocks(call.size.height, sizes.run, [&](auto K, auto V, int64_t i, int64_t j) {
        add_products<decltype(K)::value, decltype(V)::value>(
            sizes, pieces, count, x + i * sizes.cut.row + j, g,
            sums + b * sizes.filter + (i * sizes.run + j) * kLanes, width);
      });
    }
  }
}

// The parts' sums, in order, to where they belong: those of row i of the filters of a block.
void put_row(const FilterGradient& call, const Sizes& sizes, const float* parts, int64_t b,
             int64_t i) {
  const FilterStrides& s = call.strides;
  const int64_t count = std::min<int64_t>(kLanes, sizes.outputs - b * kLanes);
  for (int64_t k = 0; k < sizes.run; ++k) {
    const float* from = parts + b * sizes.filter + (i * sizes.run + k) * kLanes;
    Vector sum = load(from);
    for (int64_t part = 1; part < kGradientParts; ++part) sum += load(from + part * sizes.part());
    float* to = call.filter_gradient + b * kLanes * s.o + i * s.h + k / sizes.inputs * s.w +
                k % sizes.inputs * s.i;
    for (int64_t l = 0; l < count; ++l) to[l * s.o] = sum[l];
  }
}

}  // namespace

void filter_gradient_directly(const FilterGradient& call) {
  const Sizes sizes(call);
  float* parts = part_scratch.reserve(kGradientParts * sizes.part());
  const Pieces pixels(piece_scratch, sizes.cut.floats(), call.threads);
  const Pieces gradients(gradient_scratch, sizes.cut.listed() * kLanes, call.threads);
  parallel(call.threads, [&](Worker worker) {
    const Range mine = share(kGradientParts, 1, worker);
    for (int64_t part = mine.begin; part < mine.end; ++part)
      add_part(call, sizes,
               share(call.input.batch * sizes.cut.pairs, 1, static_cast<int>(part), kGradientParts),
               parts + part * sizes.part(), pixels.of(worker.index), gradients.of(worker.index));
    worker.barrier();
    const Range rows = share(sizes.blocks * call.size.height, 1, worker);
    for (int64_t r = rows.begin; r < rows.end; ++r)
      put_row(call, sizes, parts, r / call.size.height, r % call.size.height);
    if (worker.index == 0)
      for (int64_t o = 0; o < sizes.outputs; ++o) {
        const float* from = parts + sizes.blocks * sizes.filter + o;
        float sum = *from;
        for (int64_t part = 1; part < kGradientParts; ++part) sum += from[part * sizes.part()];
        call.bias_gradient[o] = sum;
      }
  });
}

}  // namespace hotloop
