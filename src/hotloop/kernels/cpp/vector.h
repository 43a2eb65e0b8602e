// One SIMD register of float32 lanes, as wide as the level of instruction set has them.
//
// Vector is GNU's vector type: + - * / and comparisons work lane by lane; a comparison gives Words, all
// bits set where it holds; `condition ? a : b` chooses by lane.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace hotloop {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int64_t kLineFloats = 16;  // A cache line of 64 bytes.

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef int32_t Words __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));

inline int64_t vectors_for(int64_t count) { return (count + kLanes - 1) / kLanes; }

// Rounded up to whole vectors.
inline int64_t padded(int64_t count) { return vectors_for(count) * kLanes; }

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
#elif defined(__AVX2__)
inline __m256i first_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
#endif

// The first `count` lanes, less than all; the others become 0 and their memory is not read.
inline Vector load_tail(const float* from, int64_t count) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_loadu_ps(first_lanes(count), from);
#elif defined(__AVX2__)
  return (Vector)_mm256_maskload_ps(from, first_lanes(count));
#else
  Vector value{};
  for (int64_t i = 0; i < count; ++i) value[i] = from[i];
  return value;
#endif
}

inline void store_tail(float* to, Vector value, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)value);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(to, first_lanes(count), (__m256)value);
#else
  for (int64_t i = 0; i < count; ++i) to[i] = value[i];
#endif
}

// whole: known to be all lanes; else the first `count`, or all if it is more.
template <bool whole = false>
inline Vector load(const float* from, int64_t count) {
  return whole || count >= kLanes ? load(from) : load_tail(from, count);
}

template <bool whole = false>
inline void store(float* to, Vector value, int64_t count) {
  if (whole || count >= kLanes) store(to, value);
  else store_tail(to, value, count);
}

#if defined(__AVX512F__)
// With a mask of all lanes: GCC 12 warns of its own _mm512_cvtepu8_epi32 (its bug 105593).
inline Words widen(__m128i bytes) { return (Words)_mm512_maskz_cvtepu8_epi32(0xFFFF, bytes); }
#endif

// The same of bytes.
inline Words load_bytes_tail(const uint8_t* from, int64_t count) {
#if defined(__AVX512F__)
  return widen(_mm_maskz_loadu_epi8(first_lanes(count), from));
#else
  Words value{};
  for (int64_t i = 0; i < count; ++i) value[i] = from[i];
  return value;
#endif
}

// As intrinsics: GCC 12 makes a conversion of bytes that it has just loaded lane by lane.
inline Words load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#elif defined(__SSE4_1__)
  return (Words)_mm_cvtepu8_epi32(_mm_loadu_si32(from));
#else
  Bytes bytes;
  std::memcpy(&bytes, from, kLanes);
  return __builtin_convertvector(bytes, Words);
#endif
}

template <bool whole = false>
inline Words load_bytes(const uint8_t* from, int64_t count) {
  return whole || count >= kLanes ? load_bytes(from) : load_bytes_tail(from, count);
}

inline void store_bytes(uint8_t* to, Words value, int64_t count) {
  const Bytes bytes = __builtin_convertvector(value, Bytes);
  if (count >= kLanes) {
    std::memcpy(to, &bytes, kLanes);
    return;
  }
#if defined(__AVX512F__)
  _mm_mask_storeu_epi8(to, first_lanes(count), (__m128i)bytes);
#else
  for (int64_t i = 0; i < count; ++i) to[i] = bytes[i];
#endif
}

// `value` in the first `count` lanes, `rest` in the others.
inline Vector first_lanes_of(Vector value, int64_t count, float rest) {
  Words lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(count) ? value : Vector{} + rest;
}

// The lanes brought to one by combine(float, float), halves first.
template <class Combine>
inline float reduce(Vector x, const Combine& combine) {
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof lanes);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}

inline float sum_of(Vector x) {
  return reduce(x, [](float a, float b) { return a + b; });
}

}  // namespace hotloop
