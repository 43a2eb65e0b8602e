// Convolutions as direct sums: of filters that are not 3 x 3, and of images with few channels, such as a first
// layer's. Each sum is taken in one order: filter row by row, then by columns, then by channels.
#include "convolve.h"
#include "direct_sums.h"
#include "parallel.h"
#include "scratch.h"

namespace hotloop {
namespace {

thread_local Scratch filter_scratch, input_scratch, result_scratch;

// Outputs whose sums are made at once, and how many sums are in registers.
constexpr int kPanelVectors = 2;
constexpr int64_t kPanel = kPanelVectors * kLanes;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24;
#else
constexpr int kSums = 12;
#endif

// to[panel of outputs][row][column][input][output]: outputs [begin, end), whole vectors.
void lay_out_filters(const Filters& filters, const FilterSize& size, int64_t inputs,
                     int64_t outputs, Range range, float* to) {
  const int64_t O = padded(outputs), depth = size.taps() * inputs;
  for (int64_t o = range.begin; o < range.end; ++o) {
    const int64_t panel = o / kPanel * kPanel, width = std::min(kPanel, O - panel);
    float* at = to + panel * depth + (o - panel);
    const float* from = filters.data + o * filters.o_stride;
    for (int64_t i = 0; i < size.height; ++i)
      for (int64_t j = 0; j < size.width; ++j)
        for (int64_t c = 0; c < inputs; ++c, at += width)
          *at = o < outputs
                    ? from[c * filters.i_stride + i * filters.h_stride + j * filters.w_stride]
                    : 0.0f;
  }
}

// A row of a filter's taps at one result is `depth` floats of the piece; the next row lies `row` further.
struct Taps {
  int64_t rows, depth, row;
};

// to[R][V * kLanes]: the sums of R results side by side, `pixel` floats apart.
template <int R, int V, class Step>
void sum_pixels(const Taps& taps, const float* x, Step pixel, const float* filters, float* to) {
  constexpr int kGroups = (R + 2) / 3;
  Vector sum[R][V] = {};
  for (int64_t i = 0; i < taps.rows; ++i, x += taps.row) {
    const float* base[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) base[g] = x + 3 * g * pixel;
    for (int64_t k = 0; k < taps.depth; ++k, filters += V * kLanes) {
      Vector column[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) column[v] = load(filters + v * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[r][v] += base[r / 3][r % 3 * pixel + k] * column[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(to + (r * V + v) * kLanes, sum[r][v]);
}

// Results that are made at once of a row of so many, at most `most`: fewest sums in all, where fewer than eight take
// as long as eight.
int64_t results_at_once(int64_t pixels, int64_t vectors) {
  int64_t best = 1, least = 0;
  for (const int64_t count : {12, 8, 6, 4, 3, 2, 1}) {
    if (count > pixels || count * vectors > kSums) continue;
    const int64_t cost = (pixels + count - 1) / count * std::max<int64_t>(count * vectors, 8);
    if (!least || cost < least) best = count, least = cost;
  }
  return best;
}

// to[pixels][V * kLanes]: a row of results. Where the last block is not whole, some are made twice.
template <int V, class Step>
void sum_row(int64_t pixels, const Taps& taps, const float* x, Step pixel, const float* filters,
             float* to) {
  const auto blocks_of = [&](auto count) {
    constexpr int R = decltype(count)::value;
    if constexpr (R * V <= kSums)
      for (int64_t p = 0; p < pixels; p += R) {
        const int64_t at = std::min(p, pixels - R);
        sum_pixels<R, V>(taps, x + at * pixel, pixel, filters, to + at * V * kLanes);
      }
  };
  switch (results_at_once(pixels, V)) {
    case 12: return blocks_of(std::integral_constant<int, 12>());
    case 8: return blocks_of(std::integral_constant<int, 8>());
    case 6: return blocks_of(std::integral_constant<int, 6>());
    case 4: return blocks_of(std::integral_constant<int, 4>());
    case 3: return blocks_of(std::integral_constant<int, 3>());
    case 2: return blocks_of(std::integral_constant<int, 2>());
    default: return blocks_of(std::integral_constant<int, 1>());
  }
}

struct Sizes {
  int64_t inputs, cols, row, pairs, most_pairs;  // Pairs of rows of results: of an image, of a piece.

  Sizes(const Image& x, const FilterSize& size, const ConvolutionEpilogue& epilogue)
      : inputs(x.channels), cols(epilogue.width + size.width - 1), row(cols * inputs),
        pairs((epilogue.height + 1) / 2),
        most_pairs(std::max<int64_t>((kPieceFloats / row - (size.height - 1)) / 2, 1)) {}

  int64_t piece_floats(const FilterSize& size) const {
    return (2 * most_pairs + size.height - 1) * row;
  }
};

// Two rows of results from row h on, from the piece at x, for a panel of outputs from o on.
template <int V, class Kind>
void put_rows(Kind kind, const ConvolutionEpilogue& epilogue, int64_t n, int64_t h, int64_t o,
              const Taps& taps, int64_t inputs, const float* x, const float* filters, float* made) {
  const int64_t width = epilogue.width, row = (width + 1) * V * kLanes;
  for (int64_t i = 0; i < std::min<int64_t>(2, epilogue.height - h); ++i) {
    if (inputs == 1)
      sum_row<V>(width, taps, x + i * taps.row, std::integral_constant<int64_t, 1>(), filters,
                 made + i * row);
    else sum_row<V>(width, taps, x + i * taps.row, inputs, filters, made + i * row);
  }
  for (int64_t w = 0; w < width; w += 2)
    for (int64_t v = 0; v < V; ++v) {
      const float* at = made + (w * V + v) * kLanes;
      const Vector r[2][2] = {{load(at), load(at + V * kLanes)},
                              {load(at + row), load(at + row + V * kLanes)}};
      epilogue.put(kind, Tile(n, h, w), o + v * kLanes, r);
    }
}

// Pairs of rows [range) of all images.
void convolve_pairs(const Convolution& call, const Sizes& sizes, Range range, const float* filters,
                    float* piece, float* made) {
  const ConvolutionEpilogue& epilogue = call.epilogue;
  const FilterSize& size = call.size;
  const Taps taps{size.height, size.width * sizes.inputs, sizes.row};
  const int64_t O = padded(epilogue.channels), depth = taps.rows * taps.depth;
  for (int64_t at = range.begin; at < range.end;) {
    const int64_t n = at / sizes.pairs, h = at % sizes.pairs * 2;
    const int64_t pairs =
        std::min({sizes.most_pairs, sizes.pairs - at % sizes.pairs, range.end - at});
    const int64_t rows = std::min(2 * pairs, epilogue.height - h);
    copy_pixels(call.input, n, h - call.pad_h, -call.pad_w, rows + size.height - 1, sizes.cols, 0,
                sizes.inputs, piece);
    epilogue.with_kind([&](auto kind) {
      for (int64_t o = 0; o < O; o += kPanel)
        for (int64_t i = 0; i < rows; i += 2) {
          const float *x = piece + i * sizes.row, *w = filters + o * depth;
          if (O - o > kLanes)
            put_rows<2>(kind, epilogue, n, h + i, o, taps, sizes.inputs, x, w, made);
          else put_rows<1>(kind, epilogue, n, h + i, o, taps, sizes.inputs, x, w, made);
        }
    });
    at += pairs;
  }
}

}  // namespace

void convolve_directly(const Convolution& call) {
  const ConvolutionEpilogue& epilogue = call.epilogue;
  const Sizes sizes(call.input, call.size, epilogue);
  const int64_t O = padded(epilogue.channels);
  float* laid_out = call.prepared
                        ? nullptr
                        : filter_scratch.reserve(call.size.taps() * sizes.inputs * O);
  const float* filters = laid_out ? laid_out : call.prepared;
  const Pieces pieces(input_scratch, sizes.piece_floats(call.size), call.threads);
  const Pieces results(result_scratch, 2 * (epilogue.width + 1) * kPanel, call.threads);
  parallel(call.threads, [&](Worker worker) {
    if (laid_out) {
      lay_out_filters(call.filters, call.size, sizes.inputs, epilogue.channels,
                      share(O, 1, worker), laid_out);
      worker.barrier();
    }
    convolve_pairs(call, sizes, share(call.input.batch * sizes.pairs, 1, worker), filters,
                   pieces.of(worker.index), results.of(worker.index));
  });
}

int64_t prepared_filter_floats(int64_t outputs, int64_t inputs) {
  return k3x3.is_for_winograd(inputs) ? kPoints * padded(inputs) * padded(outputs)
                                      : k3x3.taps() * inputs * padded(outputs);
}

void prepare_filters(const Filters& filters, int64_t outputs, int64_t inputs, float* to) {
  if (k3x3.is_for_winograd(inputs))
    transform_filters(filters, inputs, outputs, 0, padded(inputs), to);
  else lay_out_filters(filters, k3x3, inputs, outputs, {0, padded(outputs)}, to);
}

}  // namespace hotloop
