// The gradient of filters from that of pooled results: each value that is not 0 times the pixels its filter saw.
// Three of four results have none, and more where relu follows.
#include "convolve.h"
#include "gradient_list.h"
#include "scratch.h"

namespace hotloop {
namespace {

thread_local Scratch piece_scratch, list_scratch, part_scratch;

struct Sizes {
  int64_t inputs, outputs, blocks;  // Blocks: vectors of inputs.
  int64_t cols, filter;             // Pixels of a row; floats of the sums of one output and block.
  Cut cut;

  explicit Sizes(const FilterGradient& call)
      : inputs(call.input.channels), outputs(call.gradient.channels), blocks(vectors_for(inputs)),
        cols(call.gradient.width + call.size.width - 1), filter(call.size.taps() * kLanes),
        cut{call.gradient.height, call.size.height, cols * kLanes, call.gradient.width / 2,
            kListed} {}

  int64_t part() const { return blocks * outputs * filter + outputs; }
};

// sums[K][V] of a vector of inputs each, rows `width` apart, += gradients times pixels.
template <int K, int V>
void add_products(const Gradient* list, int64_t count, const float* x, int64_t row, float* sums,
                  int64_t width) {
  Vector sum[K][V];
#pragma GCC unroll 5
  for (int i = 0; i < K; ++i)
#pragma GCC unroll 7
    for (int j = 0; j < V; ++j) sum[i][j] = load(sums + (i * width + j) * kLanes);
  for (int64_t g = 0; g < count; ++g) {
    const float* at = x + list[g].at;
    const Vector value = Vector{} + list[g].value;
#pragma GCC unroll 5
    for (int i = 0; i < K; ++i)
#pragma GCC unroll 7
      for (int j = 0; j < V; ++j) sum[i][j] += value * load(at + i * row + j * kLanes);
  }
#pragma GCC unroll 5
  for (int i = 0; i < K; ++i)
#pragma GCC unroll 7
    for (int j = 0; j < V; ++j) store(sums + (i * width + j) * kLanes, sum[i][j]);
}

// The sums of pairs of rows [range): sums[block][output][filter row][column][input], then the sums of the gradient
// itself.
void add_part(const FilterGradient& call, const Sizes& sizes, Range range, float* sums, float* x,
              Gradient* list) {
  const auto [taps, width] = call.size;
  std::memset(sums, 0, static_cast<size_t>(sizes.part()) * sizeof(float));
  float* totals = sums + sizes.part() - sizes.outputs;
  Piece pieces[kMostPieces];
  while (range.begin < range.end) {
    const int count = sizes.cut.take(&range, pieces);
    for (int64_t b = 0; b < sizes.blocks; ++b)
      for (const Piece* p = pieces; p < pieces + count; ++p)
        copy_pixels(call.input, p->n, p->rows.begin - call.pad_h, -call.pad_w,
                    p->rows.end - p->rows.begin + taps - 1, sizes.cols, b * kLanes, kLanes,
                    x + b * sizes.cut.floats() + p->at);
    for (int64_t o = 0; o < sizes.outputs; ++o) {
      int64_t listed = 0;
      for (const Piece* p = pieces; p < pieces + count; ++p)
        listed += list_gradients(call.gradient, o, *p, sizes.cut.row, kLanes, list + listed,
                                 totals + o);
      for (int64_t b = 0; b < sizes.blocks; ++b) {
        float* to = sums + (b * sizes.outputs + o) * sizes.filter;
        for_tap_blocks(taps, width, [&, width = width](auto K, auto V, int64_t i, int64_t j) {
          add_products<decltype(K)::value, decltype(V)::value>(
              list, listed, x + b * sizes.cut.floats() + i * sizes.cut.row + j * kLanes,
              sizes.cut.row, to + (i * width + j) * kLanes, width);
        });
      }
    }
  }
}

// The parts' sums, in order, to where they belong: of one block of inputs and one output.
void put_filter(const FilterGradient& call, const Sizes& sizes, const float* parts, int64_t b,
                int64_t o) {
  const FilterStrides& s = call.strides;
  const float* from = parts + (b * sizes.outputs + o) * sizes.filter;
  const int64_t first = b * kLanes, count = std::min<int64_t>(kLanes, sizes.inputs - first);
  for (int64_t i = 0; i < call.size.height; ++i)
    for (int64_t j = 0; j < call.size.width; ++j, from += kLanes) {
      Vector sum = load(from);
      for (int64_t part = 1; part < kGradientParts; ++part)
        sum += load(from + part * sizes.part());
      float* to = call.filter_gradient + o * s.o + first * s.i + i * s.h + j * s.w;
      for (int64_t c = 0; c < count; ++c) to[c * s.i] = sum[c];
    }
}

}  // namespace

void pooled_filter_gradient(const FilterGradient& call) {
  const Sizes sizes(call);
  float* parts = part_scratch.reserve(kGradientParts * sizes.part());
  const Pieces pixels(piece_scratch, sizes.blocks * sizes.cut.floats(), call.threads);
  const Pieces lists(list_scratch, 2 * sizes.cut.listed(), call.threads);
  parallel(call.threads, [&](Worker worker) {
    Gradient* list = reinterpret_cast<Gradient*>(lists.of(worker.index));
    const Range mine = share(kGradientParts, 1, worker);
    for (int64_t part = mine.begin; part < mine.end; ++part)
      add_part(call, sizes,
               share(call.input.batch * sizes.cut.pairs, 1, static_cast<int>(part), kGradientParts),
               parts + part * sizes.part(), pixels.of(worker.index), list);
    worker.barrier();
    const Range filters = share(sizes.blocks * sizes.outputs, 1, worker);
    for (int64_t f = filters.begin; f < filters.end; ++f)
      put_filter(call, sizes, parts, f / sizes.outputs, f % sizes.outputs);
    if (worker.index == 0)
      for (int64_t o = 0; o < sizes.outputs; ++o) {
        const float* from = parts + sizes.part() - sizes.outputs + o;
        float sum = *from;
        for (int64_t part = 1; part < kGradientParts; ++part) sum += from[part * sizes.part()];
        call.bias_gradient[o] = sum;
      }
  });
}

}  // namespace hotloop
