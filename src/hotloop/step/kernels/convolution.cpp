// Convolutions with 3x3 windows and stride 1, with what follows them: bias and relu, relu's backward
// mask, max pooling by 2x2. See gemm.h; the method is that of winograd.cpp.
#include "gemm.h"

namespace {

// What becomes of a tile's 2x2 results.
struct Results {
  const hotloop_conv_shape& s;
  const float *bias, *mask;
  float* out;
  uint8_t* places;  // Null: not kept.
  int64_t OH, OW;
  bool pooled = places != nullptr;
  const float* add = nullptr;  // Laid out as `out`, added before relu; not where pooled.

  void put(const Tile& tile, int64_t o, Vector r[2][2]) const {
    const int64_t lanes = s.O - o;
    const Vector offset = bias ? load<Vector>(bias + o, lanes) : Vector{};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        r[i][j] += offset;
        if (s.relu && !pooled && !add) r[i][j] = r[i][j] < 0 ? Vector{} : r[i][j];  // NaN stays NaN.
      }
    if (pooled) {
      if (tile.h + 1 < OH && tile.w + 1 < OW) pool(tile, o, lanes, r);
      return;
    }
    const int64_t at = tile.n * s.on + tile.h * s.oh + tile.w * s.ow + o;
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        if (tile.h + i >= OH || tile.w + j >= OW) continue;
        const int64_t pixel = at + i * s.oh + j * s.ow;
        if (add) {
          r[i][j] += load<Vector>(add + pixel, lanes);
          if (s.relu) r[i][j] = r[i][j] < 0 ? Vector{} : r[i][j];
        }
        if (mask) r[i][j] = load<Vector>(mask + pixel, lanes) <= 0 ? Vector{} : r[i][j];
        store(out + pixel, r[i][j], lanes);
      }
  }

  // The first of equal ones stays, a NaN always wins; as pool.cpp does it.
  void pool(const Tile& tile, int64_t o, int64_t lanes, Vector r[2][2]) const {
    Vector best = r[0][0];
    Words place{};
#pragma GCC unroll 4
    for (int at = 1; at < 4; ++at) {
      const Vector value = r[at / 2][at % 2];
      const Words better = (value > best) | (value != value);
      best = better ? value : best;
      place = better ? Words{} + at : place;
    }
    if (s.relu) {
      const Words cut = best <= 0;  // Not a NaN.
      best = cut ? Vector{} : best;
      place = cut ? Words{} + kNowhere : place;
    }
    const int64_t h = tile.h / 2, w = tile.w / 2;
    if (places)
      store(places + ((tile.n * (OH / 2) + h) * (OW / 2) + w) * s.O + o,
            __builtin_convertvector(place, Bytes), lanes);
    float* to = out + tile.n * s.on + h * s.oh + w * s.ow + o * s.oc;
    if (s.oc == 1) {
      store(to, best, lanes);
    } else {
      for (int64_t l = 0; l < std::min<int64_t>(lanes, kLanes); ++l) to[l * s.oc] = best[l];
    }
  }
};

#ifndef HOTLOOP_FORWARD_ONLY

// Channels of the gradient of pooled results side by side.
const float* side_by_side(const float* g, int64_t N, int64_t C, int64_t pixels, int64_t sn,
                          int64_t sc, int num_threads) {
  float* to = turned_scratch.need(N * C * pixels);
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1) schedule(static)
  for (int64_t n = 0; n < N; ++n) turn(g + n * sn, sc, pixels, C, to + n * C * pixels, C);
  return to;
}

// The gradient of the results: as it lies, or that of their pooling.
Image gradient_image(const hotloop_conv_shape& s, const float* g, const uint8_t* places,
                     int64_t channels, int64_t H, int64_t W, int num_threads) {
  if (!places || s.gc == 1) return {s.N, channels, H, W, s.gn, s.gh, s.gw, g, places};
  const int64_t PH = H / 2, PW = W / 2;
  g = side_by_side(g, s.N, channels, PH * PW, s.gn, s.gc, num_threads);
  return {s.N, channels, H, W, PH * PW * channels, PW * channels, channels, g, places};
}

#endif

// `ready`: the filter, transformed before; else it is done here.
void convolve(const hotloop_conv_shape& s, const Image& x, const Filter& filter, int64_t pad_h,
              int64_t pad_w, const Results& results, int num_threads,
              const float* ready = nullptr) {
  const Tiles tiles(x.N, results.OH, results.OW);
  const int64_t C = padded(x.C), O = padded(s.O);
  const int64_t fit = std::clamp(kBlockOf / (kPoints * (C + kFlatCols)) / kFlatRows * kFlatRows,
                                 kFewestTiles, kMostTiles);
  float* made = ready ? nullptr : filter_scratch.need(kPoints * C * O);
  const float* U = ready ? ready : made;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const int me = omp_get_thread_num(), all = omp_get_num_threads();
    if (made) {
      const Range inputs = share(C, 1, me, all);
      transform_filter(filter, x.C, s.O, inputs.begin, inputs.end, made);
    }
    const Range mine = share(tiles.count, kFlatRows, me, all);
    const int64_t most = block_of(mine.end - mine.begin, fit);
    // A line more than the block: points 4 KiB apart would push each other out of the cache.
    const int64_t v_step = most * C + kLanes, m_step = most * kFlatCols + kLanes;
    float* V = patch_scratch.need(kPoints * v_step);
    float* M = result_scratch.need(kPoints * m_step);
    if (made) {
#pragma omp barrier
    }
    for (int64_t first = mine.begin; first < mine.end; first += most) {
      const int64_t count = std::min(most, mine.end - first);
      transform_input(x, tiles, first, count, pad_h, pad_w, V, v_step);
      for (int64_t o = 0; o < O; o += kFlatCols) {
        const int64_t width = std::min(kFlatCols, O - o);
        for (int64_t p = 0; p < kPoints; ++p)
          multiply_rows(vectors_for(width), count, C, V + p * v_step, C, kAdjacent, U + (p * O + o) * C,
                        M + p * m_step, false);
        for (int64_t t = 0; t < count; ++t) {
          const Tile tile(tiles, first + t);
          for (int64_t l = 0; l < width; l += kLanes) {
            Vector r[2][2];
            inverse(M + t * width + l, m_step, r);
            results.put(tile, o + l, r);
          }
        }
      }
    }
  }
}

// Below so many channels an image is convolved directly: transforms would cost more than they save.
constexpr int64_t kFewChannels = 8;

// The 4x4 patches of the channels, for results from (h, w) - pad on; zeros outside.
inline void scalars(const Image& x, int64_t n, int64_t h, int64_t w, float d[][4][4]) {
  const float* from = x.data + n * x.sn + h * x.sh + w * x.sw;
  const bool inside = h >= 0 && w >= 0 && h + 4 <= x.H && w + 4 <= x.W;
  for (int64_t c = 0; c < x.C; ++c)
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) {
        const bool there =
            inside || (h + i >= 0 && h + i < x.H && w + j >= 0 && w + j < x.W);
        d[c][i][j] = there ? from[i * x.sh + j * x.sw + c] : 0.0f;
      }
}

// A filter as it is used there: [input][row][column][output].
void lay_out_filter(const Filter& filter, int64_t inputs, int64_t outputs, float* to) {
  const int64_t O = padded(outputs);
  for (int64_t c = 0; c < inputs; ++c)
    for (int64_t p = 0; p < 9; ++p)
      for (int64_t o = 0; o < O; ++o)
        to[(c * 9 + p) * O + o] =
            o < outputs ? filter.data[o * filter.so + c * filter.si + p / 3 * filter.sh +
                                      p % 3 * filter.sw]
                        : 0.0f;
}

void convolve_directly(const hotloop_conv_shape& s, const Image& x, const Filter& filter,
                       const Results& results, int num_threads, const float* ready = nullptr) {
  const Tiles tiles(x.N, results.OH, results.OW);
  const int64_t O = padded(s.O), taps = 9 * s.C;
  float* made = ready ? nullptr : filter_scratch.need(taps * O);
  if (made) lay_out_filter(filter, s.C, s.O, made);
  const float* W = ready ? ready : made;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const Range mine = share(tiles.count, 1, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t t = mine.begin; t < mine.end; ++t) {
      const Tile tile(tiles, t);
      float d[kFewChannels][4][4];
      scalars(x, tile.n, tile.h - s.pad_h, tile.w - s.pad_w, d);
      for (int64_t o = 0; o < O; o += kLanes) {
        Vector r[2][2] = {};
        for (int64_t c = 0; c < s.C; ++c)
#pragma GCC unroll 9
          for (int p = 0; p < 9; ++p) {
            const Vector w = load<true, Vector>(W + (c * 9 + p) * O + o, kLanes);
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) r[q / 2][q % 2] += d[c][p / 3 + q / 2][p % 3 + q % 2] * w;
          }
        results.put(tile, o, r);
      }
    }
  }
}

#ifndef HOTLOOP_FORWARD_ONLY

// parts[part][c][row][column][output], then the sums of the gradient itself.
void add_directly(const Image& x, const Image& g, const Tiles& tiles, Range range, int64_t pad_h,
                  int64_t pad_w, float* sums) {
  const int64_t O = padded(g.C);
  std::memset(sums, 0, (9 * x.C + 1) * O * sizeof(float));
  for (int64_t t = range.begin; t < range.end; ++t) {
    const Tile tile(tiles, t);
    const Patch<2> patch(g, tile.n, tile.h, tile.w);
    float d[kFewChannels][4][4];
    scalars(x, tile.n, tile.h - pad_h, tile.w - pad_w, d);
    for (int64_t o = 0; o < O; o += kLanes) {
      Vector e[2][2];
      patch.read(g.places, o, g.C - o, e);
      for (int64_t c = 0; c < x.C; ++c)
#pragma GCC unroll 9
        for (int p = 0; p < 9; ++p) {
          Vector* sum = reinterpret_cast<Vector*>(sums + (c * 9 + p) * O + o);
          Vector value = *sum;
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) value += d[c][p / 3 + q / 2][p % 3 + q % 2] * e[q / 2][q % 2];
          *sum = value;
        }
      *reinterpret_cast<Vector*>(sums + x.C * 9 * O + o) +=
          (e[0][0] + e[0][1]) + (e[1][0] + e[1][1]);
    }
  }
}

void weight_gradient_directly(const hotloop_conv_shape& s, const Image& x, const Image& g,
                              float* gw, float* gb, int num_threads) {
  const Tiles tiles(s.N, g.H, g.W);
  const int64_t O = padded(s.O), sums = (9 * s.C + 1) * O;
  float* parts = part_scratch.need(kParts * sums);
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1) schedule(static)
  for (int64_t part = 0; part < kParts; ++part)
    add_directly(x, g, tiles, share(tiles.count, 1, static_cast<int>(part), kParts), s.pad_h,
                 s.pad_w, parts + part * sums);
  for (int64_t i = 0; i < sums; ++i)
    for (int64_t part = 1; part < kParts; ++part) parts[i] += parts[part * sums + i];
  for (int64_t o = 0; o < s.O; ++o) {
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t p = 0; p < 9; ++p)
        gw[o * s.wo + c * s.wi + p / 3 * s.wh + p % 3 * s.ww] = parts[(c * 9 + p) * O + o];
    gb[o] = parts[s.C * 9 * O + o];
  }
}

#endif

}  // namespace

#ifndef HOTLOOP_FORWARD_ONLY

extern "C" {

__attribute__((visibility("default"))) void hotloop_conv3x3_f32(const hotloop_conv_shape* s,
                                                                const float* x, const float* w,
                                                                const float* bias, float* out,
                                                                uint8_t* places,
                                                                int32_t num_threads) {
  const Image image{s->N, s->C, s->H, s->W, s->xn, s->xh, s->xw, x};
  const int64_t OH = s->H + 2 * s->pad_h - 2, OW = s->W + 2 * s->pad_w - 2;
  const Filter filter{w, s->wo, s->wi, s->wh, s->ww};
  const Results results{*s, bias, nullptr, out, places, OH, OW};
  if (s->C < kFewChannels) convolve_directly(*s, image, filter, results, num_threads);
  else convolve(*s, image, filter, s->pad_h, s->pad_w, results, num_threads);
}

__attribute__((visibility("default"))) void hotloop_conv3x3_input_gradient_f32(
    const hotloop_conv_shape* s, const float* g, const uint8_t* places, const float* w,
    const float* mask, float* gx, int32_t num_threads) {
  const int64_t OH = s->H + 2 * s->pad_h - 2, OW = s->W + 2 * s->pad_w - 2;
  // The gradient convolved with the filters turned round, inputs and outputs exchanged.
  const Filter filter{w + 2 * s->wh + 2 * s->ww, s->wi, s->wo, -s->wh, -s->ww};
  hotloop_conv_shape back = *s;
  back.O = s->C, back.on = s->xn, back.oh = s->xh, back.ow = s->xw, back.oc = 1, back.relu = 0;
  convolve(back, gradient_image(*s, g, places, s->O, OH, OW, num_threads), filter, 2 - s->pad_h,
           2 - s->pad_w, {back, nullptr, mask, gx, nullptr, s->H, s->W}, num_threads);
}

__attribute__((visibility("default"))) void hotloop_conv3x3_weight_gradient_f32(
    const hotloop_conv_shape* s, const float* x, const float* g, const uint8_t* places, float* gw,
    float* gb, int32_t num_threads) {
  const Image image{s->N, s->C, s->H, s->W, s->xn, s->xh, s->xw, x};
  const int64_t OH = s->H + 2 * s->pad_h - 2, OW = s->W + 2 * s->pad_w - 2;
  const Image gradient = gradient_image(*s, g, places, s->O, OH, OW, num_threads);
  if (s->C < kFewChannels) {
    weight_gradient_directly(*s, image, gradient, gw, gb, num_threads);
    return;
  }
  const Tiles tiles(s->N, OH, OW);
  const int64_t C = padded(s->C), O = padded(s->O);
  const int64_t most = std::clamp(kBlockOf / (kPoints * (C + O)) / 8 * 8, kFewestTiles, kMostTiles);
  const int64_t sums = kPoints * C * O + O;  // The last O: sums of the gradient itself.
  float* parts = part_scratch.need(kParts * sums);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const int me = omp_get_thread_num(), all = omp_get_num_threads();
    const int64_t v_step = most * C + kLanes, e_step = most * O + kLanes;
    float* V = patch_scratch.need(kPoints * v_step);
    float* E = result_scratch.need(kPoints * e_step);
    const Range mine = share(kParts, 1, me, all);
    for (int64_t part = mine.begin; part < mine.end; ++part) {
      float *S = parts + part * sums, *total = S + kPoints * C * O;
      std::memset(total, 0, O * sizeof(float));
      const Range range = share(tiles.count, 1, static_cast<int>(part), kParts);
      if (range.begin == range.end) std::memset(S, 0, kPoints * C * O * sizeof(float));
      for (int64_t first = range.begin; first < range.end; first += most) {
        const int64_t count = std::min(most, range.end - first);
        transform_input(image, tiles, first, count, s->pad_h, s->pad_w, V, v_step);
        transform_gradient(gradient, tiles, first, count, E, most, e_step, total);
        for (int64_t p = 0; p < kPoints; ++p)
          for (int64_t o = 0; o < O; o += kFlatCols)
            multiply_rows(vectors_for(std::min(kFlatCols, O - o)), C, count, V + p * v_step, 1, C,
                          E + p * e_step + o * most, S + (p * O + o) * C, first > range.begin);
      }
    }
#pragma omp barrier
    const Range rows = share(s->C, 1, me, all);
    for (int64_t o = 0; o < O; o += kLanes) {
      const int64_t block = o / kFlatCols * kFlatCols, width = std::min(kFlatCols, O - block);
      const int64_t lanes = std::min<int64_t>(kLanes, s->O - o);
      for (int64_t c = rows.begin; c < rows.end; ++c) {
        Vector m[4][4], filter[3][3];
        for (int64_t p = 0; p < kPoints; ++p) {
          const float* from = parts + (p * O + block) * C + c * width + (o - block);
          Vector sum = load<true, Vector>(from, kLanes);
          for (int64_t part = 1; part < kParts; ++part)
            sum += load<true, Vector>(from + part * sums, kLanes);
          m[p / 4][p % 4] = sum;
        }
        inverse_filter(m, filter);
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 3; ++j)
            for (int64_t l = 0; l < lanes; ++l)
              gw[(o + l) * s->wo + c * s->wi + i * s->wh + j * s->ww] = filter[i][j][l];
      }
      if (me == 0)
        for (int64_t l = 0; l < lanes; ++l) {
          const float* from = parts + kPoints * C * O + o + l;
          gb[o + l] = *from;
          for (int64_t part = 1; part < kParts; ++part) gb[o + l] += from[part * sums];
        }
    }
  }
}
}
#endif
