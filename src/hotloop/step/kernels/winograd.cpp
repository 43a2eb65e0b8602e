// Convolutions with 3x3 windows, stride 1, by Winograd's minimal filtering: Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks" (CVPR 2016), F(2x2, 3x3), and F(3x3, 2x2) for the
// gradient of the weight. 16 products stand for 36, and the transforms add and halve only, so float32
// results stay within a small factor of a direct sum's rounding. Part of shim.cpp, after gemm.cpp.
//
// Every sum is taken in one order, whatever the number of threads.

namespace {

constexpr int64_t kPoints = 16;
// Tiles of 2x2 results that are transformed, multiplied and turned back before the next: what they
// take stays in a second-level cache of 512 KiB (first number: floats).
constexpr int64_t kBlockOf = 128 * 1024, kMostTiles = 48, kFewestTiles = 12;
// The gradient of a weight is added up in so many parts, each from its own tiles, and these in order.
constexpr int64_t kParts = 8;

// Images [N, C, H, W] with channels adjacent. With `places`, data is instead the gradient of the result of
// pooling this image by 2x2: an element is that of its window if the window's byte says so, else 0.
struct Image {
  int64_t N, C, H, W, sn, sh, sw;
  const float* data;
  const uint8_t* places = nullptr;
};

// The 2x2 tiles of results [N, OH, OW], in order.
struct Tiles {
  int64_t rows, cols, count;
  Tiles(int64_t N, int64_t OH, int64_t OW)
      : rows((OH + 1) / 2), cols((OW + 1) / 2), count(N * rows * cols) {}
};

struct Tile {
  int64_t n, h, w;
  Tile(const Tiles& tiles, int64_t at)
      : n(at / (tiles.rows * tiles.cols)), h(at / tiles.cols % tiles.rows * 2),
        w(at % tiles.cols * 2) {}
};

typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));
typedef int32_t Words __attribute__((vector_size(kLanes * sizeof(int32_t))));

thread_local Scratch filter_scratch, patch_scratch, result_scratch, part_scratch, turned_scratch;

int64_t padded(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

template <bool whole, class V, class T>
inline V load(const T* from, int64_t count) {
  V value{};
  std::memcpy(&value, from, (whole ? kLanes : count) * sizeof(T));
  return value;
}

template <class V, class T>
inline V load(const T* from, int64_t count) {
  return count >= kLanes ? load<true, V>(from, count) : load<false, V>(from, count);
}

template <class V, class T>
inline void store(T* to, const V& value, int64_t count) {
  if (count >= kLanes) std::memcpy(to, &value, sizeof(value));
  else std::memcpy(to, &value, count * sizeof(T));
}

inline Words words(const Bytes& bytes) { return __builtin_convertvector(bytes, Words); }

// Where the pixels of a size x size patch lie, from (h, w) on: first channels, and what their windows' bytes
// must be; null outside.
template <int size>
struct Patch {
  const float* data[size][size];
  const uint8_t* places[size][size];
  uint8_t wanted[size][size];

  Patch(const Image& x, int64_t n, int64_t h, int64_t w) {
    const int64_t half = x.places ? 1 : 0, H = x.H >> half << half, W = x.W >> half << half;
    for (int64_t i = h; i < h + size; ++i)
      for (int64_t j = w; j < w + size; ++j) {
        const bool inside = i >= 0 && i < H && j >= 0 && j < W;
        const int64_t row = i >> half, col = j >> half;
        data[i - h][j - w] = inside ? x.data + n * x.sn + row * x.sh + col * x.sw : nullptr;
        if (!x.places) continue;
        places[i - h][j - w] = x.places + ((n * (x.H / 2) + row) * (x.W / 2) + col) * x.C;
        wanted[i - h][j - w] = (i & 1) * 2 + (j & 1);
      }
  }

  // The channels from c on. Pooled: whole windows, or pixel by pixel.
  template <bool whole>
  inline void read(int64_t c, int64_t count, Vector d[size][size]) const {
#pragma GCC unroll 4
    for (int i = 0; i < size; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < size; ++j)
        d[i][j] = data[i][j] ? load<whole, Vector>(data[i][j] + c, count) : Vector{};
  }

  template <bool whole>
  inline void read_windows(int64_t c, int64_t count, Vector d[size][size]) const {
#pragma GCC unroll 2
    for (int i = 0; i < size; i += 2)
#pragma GCC unroll 2
      for (int j = 0; j < size; j += 2) {
        Vector value{};
        Words at{};
        if (data[i][j]) {
          value = load<whole, Vector>(data[i][j] + c, count);
          at = words(load<whole, Bytes>(places[i][j] + c, count));
        }
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) d[i + p / 2][j + p % 2] = at == p ? value : Vector{};
      }
  }

  void read_pooled(int64_t c, int64_t count, Vector d[size][size]) const {
    if (wanted[0][0] == 0)
      return count >= kLanes ? read_windows<true>(c, count, d) : read_windows<false>(c, count, d);
    read(false, c, count, d);
    for (int i = 0; i < size; ++i)
      for (int j = 0; j < size; ++j)
        if (data[i][j])
          d[i][j] = words(load<Bytes>(places[i][j] + c, count)) == wanted[i][j] ? d[i][j] : Vector{};
  }

  void read(bool pooled, int64_t c, int64_t count, Vector d[size][size]) const {
    if (pooled) read_pooled(c, count, d);
    else if (count >= kLanes) read<true>(c, count, d);
    else read<false>(c, count, d);
  }
};

// B^T d B of a 4x4 patch; element p of the result goes to out[p * step].
inline void transform_patch(Vector d[4][4], float* out, int64_t step) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector a = d[0][j], b = d[1][j], c = d[2][j], e = d[3][j];
    d[0][j] = a - c;
    d[1][j] = b + c;
    d[2][j] = c - b;
    d[3][j] = b - e;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<Vector*>(out + (4 * i + 0) * step) = d[i][0] - d[i][2];
    *reinterpret_cast<Vector*>(out + (4 * i + 1) * step) = d[i][1] + d[i][2];
    *reinterpret_cast<Vector*>(out + (4 * i + 2) * step) = d[i][2] - d[i][1];
    *reinterpret_cast<Vector*>(out + (4 * i + 3) * step) = d[i][1] - d[i][3];
  }
}

// V[p * step + t * channels] of `count` tiles: the patches of x, for results from -pad on.
void transform_input(const Image& x, const Tiles& tiles, int64_t first, int64_t count,
                     int64_t pad_h, int64_t pad_w, float* V, int64_t step) {
  const int64_t C = padded(x.C);
  for (int64_t t = first; t < first + count; ++t, V += C) {
    const Tile tile(tiles, t);
    const Patch<4> patch(x, tile.n, tile.h - pad_h, tile.w - pad_w);
    Vector d[4][4];
    for (int64_t c = 0; c < C; c += kLanes) {
      patch.read(x.places, c, x.C - c, d);
      transform_patch(d, V + c, step);
    }
  }
}

// G g G^T of each filter: U[p][block of kFlatCols outputs][input][output]. Strides of the weight in
// elements, negative ones for a filter turned round.
struct Filter {
  const float* data;
  int64_t so, si, sh, sw;
};

void transform_filter(const Filter& w, int64_t inputs, int64_t outputs, int64_t begin, int64_t end,
                      float* U) {
  const int64_t depth = padded(inputs), all = padded(outputs);
  for (int64_t i = begin; i < end; ++i)
    for (int64_t o = 0; o < all; o += kLanes) {
      const int64_t block = o / kFlatCols * kFlatCols, width = std::min(kFlatCols, all - block);
      float* to = U + block * depth + i * width + (o - block);
      Vector g[3][3] = {}, r[4][3];
      if (i < inputs)
        for (int64_t l = 0; l < std::min<int64_t>(kLanes, outputs - o); ++l)
          for (int64_t a = 0; a < 3; ++a)
            for (int64_t b = 0; b < 3; ++b)
              g[a][b][l] = w.data[(o + l) * w.so + i * w.si + a * w.sh + b * w.sw];
      for (int b = 0; b < 3; ++b) {
        const Vector ends = (g[0][b] + g[2][b]) * 0.5f, middle = g[1][b] * 0.5f;
        r[0][b] = g[0][b];
        r[1][b] = ends + middle;
        r[2][b] = ends - middle;
        r[3][b] = g[2][b];
      }
      for (int a = 0; a < 4; ++a) {
        const Vector ends = (r[a][0] + r[a][2]) * 0.5f, middle = r[a][1] * 0.5f;
        const Vector row[4] = {r[a][0], ends + middle, ends - middle, r[a][2]};
        for (int b = 0; b < 4; ++b)
          *reinterpret_cast<Vector*>(to + (4 * a + b) * depth * all) = row[b];
      }
    }
}

// A^T m A: 2x2 results of one tile from m[p * step].
inline void inverse(const float* m, int64_t step, Vector out[2][2]) {
  Vector r[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector a = *reinterpret_cast<const Vector*>(m + j * step);
    const Vector b = *reinterpret_cast<const Vector*>(m + (4 + j) * step);
    const Vector c = *reinterpret_cast<const Vector*>(m + (8 + j) * step);
    const Vector e = *reinterpret_cast<const Vector*>(m + (12 + j) * step);
    r[0][j] = a + b + c;
    r[1][j] = b - c - e;
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    out[i][0] = r[i][0] + r[i][1] + r[i][2];
    out[i][1] = r[i][1] - r[i][2] - r[i][3];
  }
}

// G g G^T of 2x2 gradients, G = [1 0; 1/2 1/2; 1/2 -1/2; 0 1]: E[p * step + block][t][output]. Their
// sums are added to `total`.
void transform_gradient(const Image& g, const Tiles& tiles, int64_t first, int64_t count, float* E,
                        int64_t most, int64_t step, float* total) {
  const int64_t all = padded(g.C);
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile(tiles, first + t);
    const Patch<2> patch(g, tile.n, tile.h, tile.w);
    for (int64_t o = 0; o < all; o += kLanes) {
      Vector d[2][2], r[4][2];
      patch.read(g.places, o, g.C - o, d);
      *reinterpret_cast<Vector*>(total + o) += (d[0][0] + d[0][1]) + (d[1][0] + d[1][1]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        r[0][j] = d[0][j];
        r[1][j] = (d[0][j] + d[1][j]) * 0.5f;
        r[2][j] = (d[0][j] - d[1][j]) * 0.5f;
        r[3][j] = d[1][j];
      }
      const int64_t block = o / kFlatCols * kFlatCols, width = std::min(kFlatCols, all - block);
      float* to = E + block * most + t * width + (o - block);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vector row[4] = {r[i][0], (r[i][0] + r[i][1]) * 0.5f, (r[i][0] - r[i][1]) * 0.5f,
                               r[i][1]};
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) *reinterpret_cast<Vector*>(to + (4 * i + j) * step) = row[j];
      }
    }
  }
}

// A^T m A with A^T = [1 1 1 0; 0 1 -1 0; 0 1 1 -1]: a filter's 3x3 gradient.
inline void inverse_filter(const Vector m[4][4], Vector out[3][3]) {
  Vector r[3][4];
  for (int j = 0; j < 4; ++j) {
    const Vector both = m[1][j] + m[2][j];
    r[0][j] = m[0][j] + both;
    r[1][j] = m[1][j] - m[2][j];
    r[2][j] = both - m[3][j];
  }
  for (int i = 0; i < 3; ++i) {
    const Vector both = r[i][1] + r[i][2];
    out[i][0] = r[i][0] + both;
    out[i][1] = r[i][1] - r[i][2];
    out[i][2] = both - r[i][3];
  }
}

}  // namespace
