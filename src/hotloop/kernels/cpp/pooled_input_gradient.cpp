// The gradient of an image from that of its convolution's pooled results: each value that is not 0 adds its filter to
// the pixels that the filter saw. Three of four results have none, and more where relu follows.
#include "convolve.h"
#include "gradient_list.h"
#include "parallel.h"
#include "scratch.h"

namespace hotloop {
namespace {

thread_local Scratch filter_scratch, image_scratch, list_scratch;

// Inputs are taken in blocks of a vector. The image has its padding around it.
struct Sizes {
  int64_t inputs, outputs, blocks;
  int64_t rows, cols, row;           // Of the image; floats of a row.
  int64_t filter;                    // Floats of the filter of one output and block.
  int64_t height, width, most_rows;  // Of the pooled results; rows of them that are taken at once.

  explicit Sizes(const PooledInputGradient& call)
      : inputs(call.epilogue.channels), outputs(call.gradient.channels),
        blocks(vectors_for(inputs)), rows(call.gradient.height + call.size.height - 1),
        cols(call.gradient.width + call.size.width - 1), row(cols * kLanes),
        filter(call.size.taps() * kLanes), height(call.gradient.height / 2),
        width(call.gradient.width / 2),
        most_rows(std::max<int64_t>(std::min((kPieceFloats / row - (call.size.height - 1)) / 2,
                                             kListed / std::max<int64_t>(width, 1)),
                                    1)) {}

  int64_t image() const { return rows * row + row + kLanes; }  // A tile may reach one pixel further.
};

// to[row][column][input of the block].
void lay_out_filter(const PooledInputGradient& call, int64_t inputs, int64_t b, int64_t o,
                    float* to) {
  const Filters& f = call.filters;
  const int64_t first = b * kLanes, count = std::min<int64_t>(kLanes, inputs - first);
  const float* from = f.data + o * f.o_stride + first * f.i_stride;
  for (int64_t i = 0; i < call.size.height; ++i)
    for (int64_t j = 0; j < call.size.width; ++j, to += kLanes)
      for (int64_t c = 0; c < kLanes; ++c)
        to[c] = c < count ? from[c * f.i_stride + i * f.h_stride + j * f.w_stride] : 0.0f;
}

// K x V vectors of pixels += each gradient times the filter; rows of it are `width` vectors long.
template <int K, int V>
void add_filters(const Gradient* list, int64_t count, const float* filter, int64_t width, float* to,
                 int64_t row) {
  Vector tap[K][V];
#pragma GCC unroll 5
  for (int i = 0; i < K; ++i)
#pragma GCC unroll 7
    for (int j = 0; j < V; ++j) tap[i][j] = load(filter + (i * width + j) * kLanes);
  for (int64_t g = 0; g < count; ++g) {
    float* at = to + list[g].at;
    const Vector value = Vector{} + list[g].value;
#pragma GCC unroll 5
    for (int i = 0; i < K; ++i)
#pragma GCC unroll 7
      for (int j = 0; j < V; ++j) {
        float* pixel = at + i * row + j * kLanes;
        store(pixel, load(pixel) + value * tap[i][j]);
      }
  }
}

// One block of inputs of image n.
void add_image(const PooledInputGradient& call, const Sizes& sizes, int64_t n, int64_t b,
               const float* filters, float* image, Gradient* list) {
  std::memset(image, 0, static_cast<size_t>(sizes.image()) * sizeof(float));
  float unused = 0;
  for (int64_t h = 0; h < sizes.height; h += sizes.most_rows) {
    const Range rows{2 * h, 2 * std::min(h + sizes.most_rows, sizes.height)};
    const Piece piece{n, rows, 2 * h * sizes.row};
    for (int64_t o = 0; o < sizes.outputs; ++o) {
      const int64_t count =
          list_gradients(call.gradient, o, piece, sizes.row, kLanes, list, &unused);
      const float* filter = filters + (b * sizes.outputs + o) * sizes.filter;
      for_tap_blocks(call.size.height, call.size.width, [&](auto K, auto V, int64_t i, int64_t j) {
        add_filters<decltype(K)::value, decltype(V)::value>(
            list, count, filter + (i * call.size.width + j) * kLanes, call.size.width,
            image + i * sizes.row + j * kLanes, sizes.row);
      });
    }
  }
  const ConvolutionEpilogue& epilogue = call.epilogue;
  epilogue.with_kind([&](auto kind) {
    for (int64_t h = 0; h < epilogue.height; h += 2)
      for (int64_t w = 0; w < epilogue.width; w += 2) {
        const float* at = image + (h + call.pad_h) * sizes.row + (w + call.pad_w) * kLanes;
        const Vector r[2][2] = {{load(at), load(at + kLanes)},
                                {load(at + sizes.row), load(at + sizes.row + kLanes)}};
        epilogue.put(kind, Tile(n, h, w), b * kLanes, r);
      }
  });
}

}  // namespace

void pooled_input_gradient(const PooledInputGradient& call) {
  const Sizes sizes(call);
  const int64_t num_filters = sizes.blocks * sizes.outputs;
  float* filters = filter_scratch.reserve(num_filters * sizes.filter);
  const Pieces images(image_scratch, sizes.image(), call.threads);
  const Pieces lists(list_scratch, 2 * std::max(kListed, sizes.width), call.threads);
  parallel(call.threads, [&](Worker worker) {
    const Range mine = share(num_filters, 1, worker);
    for (int64_t f = mine.begin; f < mine.end; ++f)
      lay_out_filter(call, sizes.inputs, f / sizes.outputs, f % sizes.outputs,
                     filters + f * sizes.filter);
    worker.barrier();
    Gradient* list = reinterpret_cast<Gradient*>(lists.of(worker.index));
    const Range blocks = share(call.gradient.batch * sizes.blocks, 1, worker);
    for (int64_t i = blocks.begin; i < blocks.end; ++i)
      add_image(call, sizes, i / sizes.blocks, i % sizes.blocks, filters, images.of(worker.index),
                list);
  });
}

}  // namespace hotloop
