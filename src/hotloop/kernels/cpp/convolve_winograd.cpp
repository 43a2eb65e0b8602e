// See winograd.h. Every sum is taken in one order, whatever the number of threads.
#include "convolve.h"
#include "gemm.h"

namespace hotloop {
namespace {

// Tiles of 2 x 2 results that are transformed, multiplied and transformed back before the next: what they
// take stays in a second-level cache of 512 KiB (first number: floats).
constexpr int64_t kBlockFloats = 128 * 1024, kMostTiles = 48, kFewestTiles = 12;

thread_local Scratch filter_scratch, input_scratch, result_scratch, part_scratch;

int64_t whole_rows(int64_t count) { return (count + kDirectMR - 1) / kDirectMR * kDirectMR; }

// Tiles that are left to the epilogue.
template <class Kind>
void put_tiles(Kind kind, const ConvolutionEpilogue& epilogue, const Tiles& tiles, int64_t first,
               int64_t count, int64_t o, int64_t width, const float* m, int64_t step) {
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile(tiles, first + t);
    for (int64_t l = 0; l < width; l += kLanes) {
      Vector r[2][2];
      inverse_transform(m + t * width + l, step, r);
      epilogue.put(kind, tile, o + l, r);
    }
  }
}

// The sums over the parts, transformed back, of inputs [inputs) and a vector of outputs from o on.
void put_filter_gradient(const FilterGradient& call, const float* parts, int64_t part_floats,
                         Range inputs, int64_t o) {
  const int64_t C = padded(call.input.channels), O = padded(call.gradient.channels);
  const int64_t block = o / kDirectNR * kDirectNR, width = std::min(kDirectNR, O - block);
  const int64_t lanes = std::min<int64_t>(kLanes, call.gradient.channels - o);
  const FilterStrides& s = call.strides;
  for (int64_t c = inputs.begin; c < inputs.end; ++c) {
    Vector m[4][4], filter[3][3];
    for (int64_t p = 0; p < kPoints; ++p) {
      const float* from = parts + (p * O + block) * C + c * width + (o - block);
      Vector sum = load(from);
      for (int64_t part = 1; part < kGradientParts; ++part) sum += load(from + part * part_floats);
      m[p / 4][p % 4] = sum;
    }
    inverse_filter_transform(m, filter);
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j)
        for (int64_t l = 0; l < lanes; ++l)
          call.filter_gradient[(o + l) * s.o + c * s.i + i * s.h + j * s.w] = filter[i][j][l];
  }
}

}  // namespace

bool has_few_tiles(int64_t batch, int64_t height, int64_t width, int64_t threads) {
  return Tiles(batch, height, width).count < kFewestTiles * threads;
}

void convolve_winograd(const Convolution& call) {
  const Image& x = call.input;
  const ConvolutionEpilogue& epilogue = call.epilogue;
  const Tiles tiles(x.batch, epilogue.height, epilogue.width);
  const int64_t C = padded(x.channels), O = padded(epilogue.channels);
  const int64_t fit = std::clamp(kBlockFloats / (kPoints * (C + kDirectNR)) / kDirectMR * kDirectMR,
                                 kFewestTiles, kMostTiles);
  float* made = call.prepared ? nullptr : filter_scratch.reserve(kPoints * C * O);
  const float* filters = made ? made : call.prepared;
  const int64_t largest = whole_rows(std::min(fit, tiles.count));
  const Pieces inputs(input_scratch, kPoints * (largest * C + kLanes), call.threads);
  const Pieces results(result_scratch, kPoints * (largest * kDirectNR + kLanes), call.threads);
  parallel(call.threads, [&](Worker worker) {
    if (made) {
      const Range mine = share(C, 1, worker);
      transform_filters(call.filters, x.channels, epilogue.channels, mine.begin, mine.end, made);
    }
    const Range mine = share(tiles.count, kDirectMR, worker);
    const int64_t most = even_block(mine.end - mine.begin, fit);
    // A line more than the block: points 4 KiB apart would push each other out of the cache.
    const int64_t v_step = most * C + kLanes, m_step = most * kDirectNR + kLanes;
    float *V = inputs.of(worker.index), *M = results.of(worker.index);
    if (made) worker.barrier();
    for (int64_t first = mine.begin; first < mine.end; first += most) {
      const int64_t count = std::min(most, mine.end - first);
      transform_input(x, tiles, first, count, call.pad_h, call.pad_w, V, v_step);
      for (int64_t o = 0; o < O; o += kDirectNR) {
        const int64_t width = std::min(kDirectNR, O - o);
        for (int64_t p = 0; p < kPoints; ++p)
          multiply_rows(vectors_for(width), count, C, V + p * v_step, C, kAdjacent,
                        filters + (p * O + o) * C, M + p * m_step, false);
        epilogue.with_kind([&](auto kind) {
          put_tiles(kind, epilogue, tiles, first, count, o, width, M, m_step);
        });
      }
    }
  });
}

void filter_gradient_winograd(const FilterGradient& call) {
  const Image &x = call.input, &g = call.gradient;
  const Tiles tiles(x.batch, g.height, g.width);
  const int64_t C = padded(x.channels), O = padded(g.channels);
  const int64_t most =
      std::clamp(kBlockFloats / (kPoints * (C + O)) / 8 * 8, kFewestTiles, kMostTiles);
  const int64_t part_floats = kPoints * C * O + O;  // The last O: sums of the gradient itself.
  const int64_t v_step = most * C + kLanes, e_step = most * O + kLanes;
  float* parts = part_scratch.reserve(kGradientParts * part_floats);
  const Pieces inputs(input_scratch, kPoints * v_step, call.threads);
  const Pieces gradients(result_scratch, kPoints * e_step, call.threads);
  parallel(call.threads, [&](Worker worker) {
    float *V = inputs.of(worker.index), *E = gradients.of(worker.index);
    const Range mine = share(kGradientParts, 1, worker);
    for (int64_t part = mine.begin; part < mine.end; ++part) {
      float *sums = parts + part * part_floats, *total = sums + kPoints * C * O;
      std::memset(total, 0, static_cast<size_t>(O) * sizeof(float));
      const Range range = share(tiles.count, 1, static_cast<int>(part), kGradientParts);
      if (range.begin == range.end)
        std::memset(sums, 0, static_cast<size_t>(kPoints * C * O) * sizeof(float));
      for (int64_t first = range.begin; first < range.end; first += most) {
        const int64_t count = std::min(most, range.end - first);
        transform_input(x, tiles, first, count, call.pad_h, call.pad_w, V, v_step);
        transform_gradient(g, tiles, first, count, E, most, e_step, total);
        for (int64_t p = 0; p < kPoints; ++p)
          for (int64_t o = 0; o < O; o += kDirectNR)
            multiply_rows(vectors_for(std::min(kDirectNR, O - o)), C, count, V + p * v_step, 1, C,
                          E + p * e_step + o * most, sums + (p * O + o) * C, first > range.begin);
      }
    }
    worker.barrier();
    const Range rows = share(x.channels, 1, worker);
    for (int64_t o = 0; o < O; o += kLanes) put_filter_gradient(call, parts, part_floats, rows, o);
    if (worker.index == 0)
      for (int64_t o = 0; o < g.channels; ++o) {
        const float* from = parts + kPoints * C * O + o;
        float sum = *from;
        for (int64_t part = 1; part < kGradientParts; ++part) sum += from[part * part_floats];
        call.bias_gradient[o] = sum;
      }
  });
}

}  // namespace hotloop
