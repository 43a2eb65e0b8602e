// Max pooling over windows that do not overlap, with a relu before it: one pass forward that keeps one
// byte for each result (the window's place of the largest value, or kNowhere where relu cut it off),
// and one pass backward that needs nothing but those bytes.
#include <cmath>
#include <cstdint>
#include <vector>

#include "gemm.h"

namespace {

// What a later value does to the largest so far: the first of equal ones stays, a NaN always wins.
inline void take(float value, uint8_t at, float* best, uint8_t* place) {
  const bool better = value > *best || value != value;
  *best = better ? value : *best;
  *place = better ? at : *place;
}

inline void cut(bool relu, float* best, uint8_t* place) {
  if (relu && !(*best > 0) && *best == *best) {
    *best = 0;
    *place = kNowhere;
  }
}

}  // namespace

extern "C" {

// x [N, C, H, W] by strides; out [N, C, OH, OW] dense, in the order N, OH, OW, C where `last`; places
// dense too, in the order N, OH, OW, C where x's channels are adjacent, else N, C, OH, OW.
__attribute__((visibility("default"))) void hotloop_pool_f32(const hotloop_pool_shape* shape,
                                                             const float* x, float* out,
                                                             uint8_t* places,
                                                             int32_t num_threads) {
  const auto [N, C, H, W, kh, kw, relu, last, sn, sc, sh, sw] = *shape;
  const int64_t OH = H / kh, OW = W / kw;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    // Results of one row of windows, channels adjacent.
    std::vector<float> best(OW * C);
#pragma omp for collapse(2) schedule(static)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t oh = 0; oh < OH; ++oh) {
        if (sc == 1) {
          uint8_t* mine = places + (n * OH + oh) * OW * C;
          for (int64_t ow = 0; ow < OW; ++ow) {
            const float* first = x + n * sn + oh * kh * sh + ow * kw * sw;
            float* to = (last ? out + (n * OH + oh) * OW * C : best.data()) + ow * C;
            uint8_t* place = mine + ow * C;
            if (kh == 2 && kw == 2) {
              const float *b = first + sw, *c = first + sh, *d = first + sh + sw;
#pragma omp simd
              for (int64_t i = 0; i < C; ++i) {
                float largest = first[i];
                uint8_t at = 0;
                take(b[i], 1, &largest, &at);
                take(c[i], 2, &largest, &at);
                take(d[i], 3, &largest, &at);
                cut(relu, &largest, &at);
                to[i] = largest;
                place[i] = at;
              }
              continue;
            }
            for (int64_t i = 0; i < C; ++i) to[i] = first[i], place[i] = 0;
            for (int64_t p = 1; p < kh * kw; ++p) {
              const float* from = first + p / kw * sh + p % kw * sw;
              for (int64_t i = 0; i < C; ++i) take(from[i], uint8_t(p), to + i, place + i);
            }
            for (int64_t i = 0; i < C; ++i) cut(relu, to + i, place + i);
          }
          for (int64_t c = 0; c < C && !last; ++c)
            for (int64_t ow = 0; ow < OW; ++ow)
              out[((n * C + c) * OH + oh) * OW + ow] = best[ow * C + c];
          continue;
        }
        for (int64_t c = 0; c < C; ++c)
          for (int64_t ow = 0; ow < OW; ++ow) {
            const float* first = x + n * sn + c * sc + oh * kh * sh + ow * kw * sw;
            float largest = *first;
            uint8_t at = 0;
            for (int64_t p = 1; p < kh * kw; ++p)
              take(first[p / kw * sh + p % kw * sw], uint8_t(p), &largest, &at);
            cut(relu, &largest, &at);
            const int64_t to = ((n * C + c) * OH + oh) * OW + ow;
            out[last ? ((n * OH + oh) * OW + ow) * C + c : to] = largest;
            places[to] = at;
          }
      }
  }
}

// The gradient of x, every element written. Strides of `shape` are gx's; those of the gradient [N, C, OH,
// OW] are g_strides; places as above, by whether gx's channels are adjacent.
__attribute__((visibility("default"))) void hotloop_pool_backward_f32(
    const hotloop_pool_shape* shape, const float* gradient, const int64_t* g_strides,
    const uint8_t* places, float* gx, int32_t num_threads) {
  const auto [N, C, H, W, kh, kw, relu, last, sn, sc, sh, sw] = *shape;
  const int64_t OH = H / kh, OW = W / kw;
  const int64_t gn = g_strides[0], gc = g_strides[1], gh = g_strides[2], gw = g_strides[3];
  (void)relu, (void)last;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    std::vector<float> turned(OW * C);
#pragma omp for collapse(2) schedule(static)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t oh = 0; oh < OH + (OH * kh < H); ++oh) {
        const int64_t rows = oh < OH ? kh : H - OH * kh;
        float* top = gx + n * sn + oh * kh * sh;
        if (oh == OH || OW * kw < W) {  // What no window covers.
          const int64_t from = oh == OH ? 0 : OW * kw;
          for (int64_t c = 0; c < C; ++c)
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t w = from; w < W; ++w) top[c * sc + r * sh + w * sw] = 0;
          if (oh == OH) continue;
        }
        if (sc == 1) {
          for (int64_t c = 0; c < C; ++c)
            for (int64_t ow = 0; ow < OW; ++ow)
              turned[ow * C + c] = gradient[n * gn + c * gc + oh * gh + ow * gw];
          const uint8_t* mine = places + (n * OH + oh) * OW * C;
          for (int64_t r = 0; r < kh; ++r)
            for (int64_t ow = 0; ow < OW; ++ow)
              for (int64_t k = 0; k < kw; ++k) {
                const float* g = turned.data() + ow * C;
                const uint8_t *place = mine + ow * C, at = uint8_t(r * kw + k);
                float* to = top + r * sh + (ow * kw + k) * sw;
#pragma omp simd
                for (int64_t i = 0; i < C; ++i) to[i] = place[i] == at ? g[i] : 0.0f;
              }
          continue;
        }
        for (int64_t c = 0; c < C; ++c)
          for (int64_t ow = 0; ow < OW; ++ow) {
            const int64_t at = ((n * C + c) * OH + oh) * OW + ow;
            const float g = gradient[n * gn + c * gc + oh * gh + ow * gw];
            float* to = top + c * sc + ow * kw * sw;
            for (int64_t p = 0; p < kh * kw; ++p)
              to[p / kw * sh + p % kw * sw] = places[at] == p ? g : 0.0f;
          }
      }
  }
}
}
