// A network's forward pass, layer by layer, on the products and convolutions of the compiled step. It
// needs neither torch nor Python: what it computes, and where each value lies, `network.py` has laid down.
//
// Weights are packed once, when a model is loaded, in the order in which they are used: a product reads
// them as one run of memory. Values of one sample lie in the arena at an offset, those of a batch of N at
// N times that; images have their channels adjacent.
#define HOTLOOP_FORWARD_ONLY
#include "../../step/kernels/gemm.cpp"
#include "../../step/kernels/winograd.cpp"
#include "../../step/kernels/convolution.cpp"

#include <cmath>
#include <limits>

namespace {

enum Kind {
  kTurnIn, kTurnOut, kLinear, kConvolution, kMaxPool, kMean, kPointwise, kSoftmax, kLayerNorm,
  kAttention
};
enum Act { kNone, kRelu, kGelu, kTanhGelu };
// Places of values that are not in the arena.
constexpr int64_t kInput = -1, kOutput = -2, kAbsent = -3;

}  // namespace

extern "C" {

// network.py fills it. in, other, out: floats from the arena's start for one sample, or a place above.
// Images are C x H x W and become O x OH x OW; a linear layer makes H rows of O from H rows of C.
struct hotloop_layer {
  int64_t kind, in, other, out, C, H, W, O, OH, OW, kh, kw, sh, sw, ph, pw, act, pooled, logarithm,
      width;
  // Of attention: where queries, keys and values lie, how far their heads and their rows are apart.
  int64_t from[3], offset[3], heads_apart[3], rows_apart[3], causal;
  double number;  // The scale of attention, layer norm's epsilon.
  const float *packed, *filter, *bias;
};
}

namespace {

thread_local Scratch arena_scratch, gather_scratch;
// Floats of values between the layers, of all samples that are on their way: 64 MiB.
constexpr int64_t kMostArena = 16 * 1024 * 1024;

// Rows at a time of a product, and how deep the packed side is used before the next rows: kRowsDepth *
// kFlatCols floats stay in a second-level cache.
constexpr int64_t kLeastRows = 24, kMostRows = 96, kRowsDepth = 384;

// e^x to 2 in 10^7: 2^n times Taylor's polynomial within half of ln 2.
inline Vector exponential(Vector x) {
  x = x > 88.0f ? Vector{} + 88.0f : x;
  x = x < -87.0f ? Vector{} - 87.0f : x;
  const Vector turns = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number.
  const Vector whole = turns - 12582912.0f;
  // ln 2 in two parts, so that the rest is exact.
  const Vector r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
  Vector p = Vector{} + 1.0f / 5040;
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = p * r + c;
  const Words bits = (__builtin_convertvector(whole, Words) + 127) << 23;
  Vector power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// x P(x^2) / Q(x^2), and 1 from 3.9 on, where float32 knows no difference. The coefficients are a least-squares
// fit of the error of erf over 4,000 points, weighted by Lawson's method ("Contributions to the theory of linear
// least maximum approximation", 1961): off by 1.5e-8, and by 5e-7 at most with the rounding of float32. It takes no
// exponential: half of the operations of Abramowitz and Stegun's 7.1.26.
inline Vector error_function(Vector x) {
  const Vector u = x * x;
  Vector p = Vector{} + 2.05038564e-6f, q = Vector{} + 3.82307153e-5f;
  for (const float c :
       {2.87457060e-4f, 3.83687337e-3f, 5.29668081e-2f, 1.91940964e-1f, 1.12837903f})
    p = p * u + c;
  for (const float c : {1.18173355e-3f, 1.51091984e-2f, 1.14758179e-1f, 5.03435028e-1f, 1.0f})
    q = q * u + c;
  const Vector one = Vector{} + 1.0f, value = x * p / q;
  return x >= 3.9f ? one : x <= -3.9f ? -one : value;  // NaN stays NaN.
}

// The elements of a vector brought to one, halves first.
template <class Bring>
inline float brought(Vector x, const Bring& bring) {
  float parts[kLanes];
  std::memcpy(parts, &x, sizeof parts);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) parts[i] = bring(parts[i], parts[i + half]);
  return parts[0];
}

inline float sum_of(Vector x) {
  return brought(x, [](float a, float b) { return a + b; });
}

template <class Which>
inline Vector activated(Vector x, Which act) {
  if (act == kRelu) return x < 0 ? Vector{} : x;  // NaN stays NaN.
  if (act == kGelu) return 0.5f * x * (1.0f + error_function(x * 0.707106781f));
  if (act == kTanhGelu) {  // Hendrycks and Gimpel 2016: x times a sigmoid.
    const Vector inner = 1.59576912f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(-inner));
  }
  return x;
}

// Results of a product: with bias, another value added, and what follows.
struct Forward {
  const hotloop_layer& layer;
  const float* add;
  float* out;

  void operator()(const float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j,
                  int64_t cols) const {
    const auto known = [&](auto act) {
      if (cols % kLanes == 0) put<true>(act, tile, ld, i, rows, j, cols);
      else put<false>(act, tile, ld, i, rows, j, cols);
    };
    if (layer.act == kRelu) known(std::integral_constant<int, kRelu>());
    else if (layer.act == kGelu) known(std::integral_constant<int, kGelu>());
    else if (layer.act == kTanhGelu) known(std::integral_constant<int, kTanhGelu>());
    else known(std::integral_constant<int, kNone>());
  }

  // whole: no vector is cut off.
  template <bool whole, class Which>
  void put(Which act, const float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j,
           int64_t cols) const {
    const float* offset = layer.bias ? layer.bias + j : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (i + r) * layer.O + j;
      for (int64_t c = 0; c < cols; c += kLanes) {
        const int64_t lanes = std::min<int64_t>(cols - c, kLanes);
        Vector value = *reinterpret_cast<const Vector*>(tile + r * ld + c);
        if (offset) value += load<whole, Vector>(offset + c, lanes);
        if (add) value += load<whole, Vector>(add + at + c, lanes);
        value = activated(value, act);
        std::memcpy(out + at + c, &value, (whole ? kLanes : lanes) * sizeof(float));
      }
    }
  }
};

// Asks for the next panel, a line at each unit: some rows for the first line of each of its units, the next
// rows for the second.
struct NextPanel {
  const float* at;
  int64_t step;
  void operator()() {
    __builtin_prefetch(at, 0, 2);
    at += step;
  }
};

// Where rows of a product's left side lie: in memory, or gathered.
struct Rows {
  const float* data;
  int64_t stride;
};

// finish(X W^T): M rows of K that `source(first, count)` gives; W packed in strips of layer.width columns.
// Threads part the rows where there are enough, else the strips.
template <class Source, class Finish>
void product_of_rows(const hotloop_layer& layer, int64_t M, int64_t K, int num_threads,
                     const Source& source, const Finish& finish) {
  const int64_t O = layer.O, wide = layer.width, strips = (O + wide - 1) / wide;
  if (double(M) * K * O < kOneThread) num_threads = 1;
  // A thread that takes rows alone finds them in its own cache, and reads all weights; with few rows those
  // would keep it waiting.
  const bool enough = M >= kLeastRows * num_threads && 2 * M >= O;
  const bool by_rows = M >= 2 * kMostRows * num_threads || enough || strips < num_threads;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const int me = omp_get_thread_num(), all = omp_get_num_threads();
    const Range mine = by_rows ? share(M, kFlatRows, me, all) : Range{0, M};
    const Range cols = by_rows ? Range{0, strips} : share(strips, 1, me, all);
    const int64_t most = block_of(mine.end - mine.begin, kMostRows);
    float* tile = tile_scratch.need(most * wide);
    for (int64_t first = mine.begin; first < mine.end; first += most) {
      const int64_t count = std::min(most, mine.end - first);
      const Rows rows = source(first, count);
      for (int64_t strip = cols.begin; strip < cols.end; ++strip) {
        const int64_t j = strip * wide, width = std::min(wide, O - j);
        const int vectors = vectors_for(width);
        const int64_t ld = vectors * kLanes;
        const float* panel = layer.packed + j * K;
        // Few rows read the panel once or twice: there is nothing to keep. Else in equal parts.
        const int64_t pieces = count <= 2 * kFlatRows ? 1 : (K + kRowsDepth - 1) / kRowsDepth;
        const int64_t deep = (K + pieces - 1) / pieces;
        for (int64_t k = 0; k < K; k += deep, panel += deep * ld) {
          const int64_t depth = std::min(deep, K - k);
          int64_t line = 0;
          const auto ahead_of = [&](const float*, int64_t, int) {
            const int64_t at = line < ld ? (deep * ld) + line : 0;  // Then it asks for nothing new.
            line += kLineFloats;
            return NextPanel{panel + at, ld};
          };
          multiply_rows(vectors, count, depth, rows.data + k, rows.stride, kAdjacent, panel, tile,
                        k > 0, ahead_of);
        }
        finish(tile, ld, first, count, j, width);
      }
    }
  }
}

void linear(const hotloop_layer& layer, int64_t N, const float* x, const float* add, float* out,
            int num_threads) {
  const auto source = [&](int64_t first, int64_t) {
    return Rows{x + first * layer.C, layer.C};
  };
  product_of_rows(layer, N * layer.H, layer.C, num_threads, source, Forward{layer, add, out});
}

// Rows of kh x kw x C elements: the patches that results first to first + count are made from.
Rows patches(const hotloop_layer& l, const float* x, int64_t first, int64_t count) {
  const int64_t K = l.kh * l.kw * l.C, run = l.kw * l.C;
  float* to = gather_scratch.need(count * K);
  const Rows rows{to, K};
  for (int64_t p = first; p < first + count; ++p) {
    const int64_t n = p / (l.OH * l.OW), h = p / l.OW % l.OH * l.sh - l.ph;
    const int64_t w = p % l.OW * l.sw - l.pw;
    const int64_t left = std::clamp<int64_t>(-w, 0, l.kw);
    const int64_t right = std::clamp<int64_t>(w + l.kw - l.W, 0, l.kw - left);
    for (int64_t i = h; i < h + l.kh; ++i, to += run) {
      if (i < 0 || i >= l.H) {
        std::memset(to, 0, run * sizeof(float));
        continue;
      }
      const float* from = x + ((n * l.H + i) * l.W + w + left) * l.C;
      std::memset(to, 0, left * l.C * sizeof(float));
      std::memcpy(to + left * l.C, from, (l.kw - left - right) * l.C * sizeof(float));
      std::memset(to + (l.kw - right) * l.C, 0, right * l.C * sizeof(float));
    }
  }
  return rows;
}

// A tile or two for each thread leave the units waiting; then patches are better.
bool few_tiles(int64_t N, int64_t OH, int64_t OW, int64_t num_threads) {
  return Tiles(N, OH, OW).count < kFewestTiles * num_threads;
}

void convolution(const hotloop_layer& l, int64_t N, const float* x, const float* add, float* out,
                 int num_threads) {
  if (l.filter) {
    const int64_t half = l.pooled ? 2 : 1, OH = l.OH / half, OW = l.OW / half;
    const hotloop_conv_shape s{
        N, l.C, l.H, l.W, l.O, l.ph, l.pw, l.act == kRelu,
        l.H * l.W * l.C, l.W * l.C, l.C, 0, 0, 0, 0,
        OH * OW * l.O, 1, OW * l.O, l.O, 0, 0, 0, 0};
    const Image image{N, l.C, l.H, l.W, s.xn, s.xh, s.xw, x};
    const Results results{s, l.bias, nullptr, out, nullptr, l.OH, l.OW, l.pooled != 0, add};
    if (l.C < kFewChannels) {
      convolve_directly(s, image, {}, results, num_threads, l.filter);
      return;
    }
    if (!l.packed || !few_tiles(N, l.OH, l.OW, num_threads)) {
      convolve(s, image, {}, l.ph, l.pw, results, num_threads, l.filter);
      return;
    }
  }
  const bool in_place = l.kh * l.kw * l.sh * l.sw == 1 && !l.ph && !l.pw;
  const auto source = [&](int64_t first, int64_t count) {
    return in_place ? Rows{x + first * l.C, l.C} : patches(l, x, first, count);
  };
  product_of_rows(l, N * l.OH * l.OW, l.kh * l.kw * l.C, num_threads, source,
                  Forward{l, add, out});
}

// [N, C, pixels] to [N, pixels, C], or back.
void turn_images(int64_t N, int64_t rows, int64_t cols, const float* x, float* out,
                 int num_threads) {
  if (double(N) * rows * cols < kOneThread / 4) num_threads = 1;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1) schedule(static)
  for (int64_t n = 0; n < N; ++n)
    turn(x + n * rows * cols, cols, cols, rows, out + n * rows * cols, rows);
}

void max_pool(const hotloop_layer& l, int64_t N, const float* x, float* out, int num_threads) {
  const int64_t C = l.C;
  if (double(N) * l.OH * l.OW * C * l.kh * l.kw < kOneThread) num_threads = 1;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1) schedule(static)
  for (int64_t row = 0; row < N * l.OH; ++row) {
    const int64_t n = row / l.OH, h = row % l.OH * l.sh - l.ph;
    const int64_t top = std::max<int64_t>(h, 0), bottom = std::min(h + l.kh, l.H);
    for (int64_t ow = 0; ow < l.OW; ++ow) {
      const int64_t w = ow * l.sw - l.pw;
      const int64_t left = std::max<int64_t>(w, 0), right = std::min(w + l.kw, l.W);
      float* to = out + (row * l.OW + ow) * C;
      for (int64_t c = 0; c < C; c += kLanes) {
        Vector best = Vector{} - std::numeric_limits<float>::infinity();
        for (int64_t i = top; i < bottom; ++i)
          for (int64_t j = left; j < right; ++j) {
            const Vector v = load<Vector>(x + ((n * l.H + i) * l.W + j) * C + c, C - c);
            best = (v > best) | (v != v) ? v : best;  // A NaN wins.
          }
        best = activated(best, l.act);
        store(to + c, best, C - c);
      }
    }
  }
}

// The mean of each channel over the pixels of an image.
void mean(const hotloop_layer& l, int64_t N, const float* x, float* out) {
  const int64_t C = l.C, pixels = l.H * l.W;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t c = 0; c < C; c += kLanes) {
      Vector sum{};
      for (int64_t p = 0; p < pixels; ++p)
        sum += load<Vector>(x + (n * pixels + p) * C + c, C - c);
      store(out + n * C + c, sum / static_cast<float>(pixels), C - c);
    }
}

// A value, or the sum of two, and what follows.
void pointwise(const hotloop_layer& l, int64_t count, const float* x, const float* add, float* out,
               int num_threads) {
  if (count < 32768) num_threads = 1;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const Range mine = share(count, kLineFloats, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t i = mine.begin; i < mine.end; i += kLanes) {
      const int64_t lanes = mine.end - i;
      Vector value = load<Vector>(x + i, lanes);
      if (add) value += load<Vector>(add + i, lanes);
      store(out + i, activated(value, l.act), lanes);
    }
  }
}

// Over rows of C elements, less the greatest first; or its logarithm.
void softmax(const hotloop_layer& l, int64_t N, const float* x, float* out) {
  const int64_t C = l.C;
  for (int64_t n = 0; n < N * l.H; ++n, x += C, out += C) {
    float most = x[0], sum = 0;
    for (int64_t c = 1; c < C; ++c) most = x[c] > most || x[c] != x[c] ? x[c] : most;
    for (int64_t c = 0; c < C; ++c) sum += out[c] = std::exp(x[c] - most);
    for (int64_t c = 0; c < C; ++c)
      out[c] = l.logarithm ? x[c] - most - std::log(sum) : out[c] / sum;
  }
}

// Of each row of C elements: less their mean, over their deviation, times weight, plus bias.
void layer_norm(const hotloop_layer& l, int64_t N, const float* x, float* out, int num_threads) {
  const int64_t C = l.C, rows = N * l.H;
  if (rows * C < 32768) num_threads = 1;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x + row * C;
    float* to = out + row * C;
    // Two passes: the sum of squares of what is left is not a difference of large numbers.
    Vector sums{}, squares{};
    for (int64_t c = 0; c < C; c += kLanes) sums += load<Vector>(from + c, C - c);
    const float mean = sum_of(sums) / static_cast<float>(C);
    for (int64_t c = 0; c < C; c += kLanes) {
      const int64_t lanes = C - c;
      const Vector gap = load<Vector>(from + c, lanes) - mean;
      if (lanes >= kLanes) squares += gap * gap;
      else for (int i = 0; i < lanes; ++i) squares[i] += gap[i] * gap[i];
    }
    const float variance = sum_of(squares) / static_cast<float>(C);
    const float inverse = 1.0f / std::sqrt(variance + static_cast<float>(l.number));
    for (int64_t c = 0; c < C; c += kLanes) {
      Vector value = (load<Vector>(from + c, C - c) - mean) * inverse;
      if (l.packed) value *= load<Vector>(l.packed + c, C - c);
      if (l.bias) value += load<Vector>(l.bias + c, C - c);
      store(to + c, value, C - c);
    }
  }
}

// softmax over the first `count` elements of a row; those up to `whole` become 0.
inline void softmax_row(float* x, int64_t count, int64_t whole, float scale) {
  for (int64_t c = count; c < whole; ++c) x[c] = -std::numeric_limits<float>::infinity();
  Vector most = Vector{} - std::numeric_limits<float>::infinity(), sums{};
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Vector v = *reinterpret_cast<Vector*>(x + c) * scale;
    *reinterpret_cast<Vector*>(x + c) = v;
    most = (v > most) | (v != v) ? v : most;
  }
  const float top =
      brought(most, [](float a, float b) { return b > a || b != b ? b : a; });  // A NaN wins.
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Vector gap = *reinterpret_cast<Vector*>(x + c) - top;
    Vector e = exponential(gap);
    e = gap == -std::numeric_limits<float>::infinity() ? Vector{} : e;
    e = gap != gap ? gap : e;
    *reinterpret_cast<Vector*>(x + c) = e;
    sums += e;
  }
  const float inverse = 1.0f / sum_of(sums);
  for (int64_t c = 0; c < whole; c += kLanes) *reinterpret_cast<Vector*>(x + c) *= inverse;
}

// softmax(q k^T scale) v of O heads: H queries of C elements, W keys, OW elements of a value. Results lie
// [query][head][element].
void attention(const hotloop_layer& l, int64_t N, const float* const from[3], float* out,
               int num_threads) {
  const int64_t heads = l.O, queries = l.H, keys = l.W, size = l.C, made = l.OW;
  const int64_t across = padded(keys), wide = padded(made), tasks = N * heads;
  const int64_t sizes[3] = {l.kh, l.kw, l.sh};  // Floats of a sample of each of the three.
  if (double(tasks) * queries * keys * (size + made) < kOneThread) num_threads = 1;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const Range mine = share(tasks, 1, omp_get_thread_num(), omp_get_num_threads());
    float* turned = gather_scratch.need(across * size + wide * keys);
    float* values = turned + across * size;
    float* scores = tile_scratch.need(kFlatGroup * (across + kFlatCols));
    float* tile = scores + kFlatGroup * across;
    for (int64_t task = mine.begin; task < mine.end; ++task) {
      const int64_t n = task / heads, h = task % heads;
      const float* at[3];
      for (int i = 0; i < 3; ++i) at[i] = from[i] + n * sizes[i] + h * l.heads_apart[i];
      for (int64_t k = 0; k < keys; k += kFlatCols) {
        const int64_t cols = std::min(kFlatCols, keys - k);
        pack(at[1] + k * l.rows_apart[1], l.rows_apart[1], 1, cols, size, turned + k * size,
             padded(cols));
      }
      for (int64_t o = 0; o < made; o += kFlatCols) {
        const int64_t cols = std::min(kFlatCols, made - o);
        pack(at[2] + o, 1, l.rows_apart[2], cols, keys, values + o * keys, padded(cols));
      }
      for (int64_t q = 0; q < queries; q += kFlatGroup) {
        const int64_t rows = std::min(kFlatGroup, queries - q);
        for (int64_t k = 0; k < keys; k += kFlatCols) {
          const int64_t ld = padded(std::min(kFlatCols, keys - k));
          float* sums = ld == across ? scores : tile;
          multiply_rows(vectors_for(ld), rows, size, at[0] + q * l.rows_apart[0],
                        l.rows_apart[0], kAdjacent, turned + k * size, sums, false);
          for (int64_t r = 0; r < rows && sums == tile; ++r)
            std::memcpy(scores + r * across + k, tile + r * ld, ld * sizeof(float));
        }
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t seen = l.causal ? std::min(keys, q + r + 1) : keys;
          softmax_row(scores + r * across, seen, across, static_cast<float>(l.number));
        }
        for (int64_t o = 0; o < made; o += kFlatCols) {
          const int64_t cols = std::min(kFlatCols, made - o), ld = padded(cols);
          multiply_rows(vectors_for(cols), rows, keys, scores, across, kAdjacent, values + o * keys, tile,
                        false);
          for (int64_t r = 0; r < rows; ++r)
            std::memcpy(out + ((n * queries + q + r) * heads + h) * made + o, tile + r * ld,
                        cols * sizeof(float));
        }
      }
    }
  }
}

// All layers, for so many samples.
void run(const hotloop_layer* layers, int64_t count, int64_t floats, int64_t N, const float* x,
         float* y, int num_threads) {
  float* arena = arena_scratch.need(floats * N);
  const auto place = [&](int64_t at) -> float* {
    if (at == kInput) return const_cast<float*>(x);
    if (at == kOutput) return y;
    return at == kAbsent ? nullptr : arena + at * N;
  };
  for (const hotloop_layer* l = layers; l < layers + count; ++l) {
    const float *in = place(l->in), *other = place(l->other);
    float* out = place(l->out);
    const int64_t pixels = l->H * l->W;
    switch (l->kind) {
      case kTurnIn: turn_images(N, l->C, pixels, in, out, num_threads); break;
      case kTurnOut: turn_images(N, pixels, l->C, in, out, num_threads); break;
      case kLinear: linear(*l, N, in, other, out, num_threads); break;
      case kConvolution: convolution(*l, N, in, other, out, num_threads); break;
      case kMaxPool: max_pool(*l, N, in, out, num_threads); break;
      case kMean: mean(*l, N, in, out); break;
      case kPointwise: pointwise(*l, N * pixels * l->C, in, other, out, num_threads); break;
      case kSoftmax: softmax(*l, N, in, out); break;
      case kLayerNorm: layer_norm(*l, N, in, out, num_threads); break;
      case kAttention: {
        const float* from[3];
        for (int i = 0; i < 3; ++i) from[i] = place(l->from[i]) + l->offset[i];
        attention(*l, N, from, out, num_threads);
        break;
      }
    }
  }
}

// Floats of one sample that a layer reads, and that it makes.
int64_t elements(const hotloop_layer& l) {
  return l.kind == kAttention ? l.kh : l.H * l.W * l.C;
}

int64_t elements_made(const hotloop_layer& l) {
  if (l.kind == kLinear) return l.H * l.O;
  if (l.kind == kMean) return l.C;
  if (l.kind == kAttention) return l.H * l.O * l.OW;
  if (l.kind == kConvolution || l.kind == kMaxPool) {
    const int64_t half = l.pooled ? 2 : 1;
    return l.OH / half * (l.OW / half) * l.O;
  }
  return elements(l);
}

}  // namespace

extern "C" {

// W [O, K] to strips [K][width]; the last one as wide as its vectors need.
__attribute__((visibility("default"))) void hotloop_network_pack(const float* W, int64_t O,
                                                                 int64_t K, int64_t wide,
                                                                 float* to) {
  for (int64_t j = 0; j < O; j += wide) {
    const int64_t width = std::min(wide, O - j), ld = vectors_for(width) * kLanes;
    pack(W + j * K, K, 1, width, K, to + j * K, ld);
  }
}

__attribute__((visibility("default"))) int64_t hotloop_network_packed(int64_t O, int64_t K,
                                                                      int64_t wide) {
  return (O / wide * wide + padded(O % wide)) * K;
}

// A 3x3 filter W [O, 3, 3, C] as its layer uses it, and how many floats that takes.
__attribute__((visibility("default"))) int64_t hotloop_network_filtered(int64_t O, int64_t C) {
  return C < kFewChannels ? 9 * C * padded(O) : kPoints * padded(C) * padded(O);
}

__attribute__((visibility("default"))) void hotloop_network_filter(const float* W, int64_t O,
                                                                   int64_t C, float* to) {
  const Filter filter{W, 9 * C, 1, 3 * C, C};
  if (C < kFewChannels) lay_out_filter(filter, C, O, to);
  else transform_filter(filter, C, O, 0, padded(C), to);
}

// Columns of a strip: as many as there are sums for, fewer where else threads would have unlike parts.
__attribute__((visibility("default"))) int64_t hotloop_network_width(int64_t O,
                                                                     int64_t num_threads) {
  int64_t best = kFlatCols, least = 0;
  for (int64_t wide = kFlatCols; wide >= kFlatCols / 2; wide -= kLanes) {
    const int64_t strips = (O + wide - 1) / wide;
    const int64_t longest = (strips + num_threads - 1) / num_threads * wide;
    if (!least || longest < least) best = wide, least = longest;
  }
  return best;
}

// Whether a 3x3 convolution of such images is made from patches too, for the smallest batches.
__attribute__((visibility("default"))) int64_t hotloop_network_needs_patches(
    int64_t C, int64_t OH, int64_t OW, int64_t num_threads) {
  return C >= kFewChannels && few_tiles(1, OH, OW, num_threads);
}

// What this process keeps for values and packed rows, of all threads.
__attribute__((visibility("default"))) int64_t hotloop_network_scratch_bytes() {
  return scratch_bytes;
}

// A large batch goes in equal parts, so that memory stays as it is. Samples of the largest part.
static int64_t samples_at_once(int64_t floats, int64_t N) {
  const int64_t most = std::max<int64_t>(kMostArena / std::max<int64_t>(floats, 1), 1);
  const int64_t parts = std::max<int64_t>((N + most - 1) / most, 1);
  return (N + parts - 1) / parts;
}

// Bytes of values between the layers in a call of N samples, `floats` for each.
__attribute__((visibility("default"))) int64_t hotloop_network_values_bytes(int64_t floats,
                                                                            int64_t N) {
  return samples_at_once(floats, N) * floats * static_cast<int64_t>(sizeof(float));
}

// Runs `count` layers on a batch of N; `floats`: of the arena, for one sample.
__attribute__((visibility("default"))) void hotloop_network_run(const hotloop_layer* layers,
                                                                int64_t count, int64_t floats,
                                                                int64_t N, const float* x,
                                                                float* y, int32_t num_threads) {
  const int64_t once = samples_at_once(floats, N), parts = once ? (N + once - 1) / once : 0;
  const int64_t ins = elements(layers[0]), outs = elements_made(layers[count - 1]);
  for (int64_t part = 0; part < parts; ++part) {
    const Range mine = share(N, 1, static_cast<int>(part), static_cast<int>(parts));
    run(layers, count, floats, mine.end - mine.begin, x + mine.begin * ins, y + mine.begin * outs,
        num_threads);
  }
}
}
