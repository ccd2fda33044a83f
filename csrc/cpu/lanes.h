// Eight floats that are worked on together, as a type for each capability (see capability.h), and
// elements widened to float.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "cpu/capability.h"
#include "elements.h"

namespace dropinf {

constexpr int64_t kLanes = 8;

inline int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// Floats that begin at a cache line.
struct FreeFloats {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], FreeFloats>;

inline Floats make_floats(int64_t size) {
  return Floats(static_cast<float*>(::operator new[](size * sizeof(float), std::align_val_t{64})));
}

namespace portable {

template <typename E>
inline float load1(const E* p) {
  return to_float(*p);
}
inline float fma(float a, float b, float c) { return a * b + c; }

struct Lanes {
  float v[kLanes];
};

template <typename F>
inline Lanes each(F f) {
  Lanes out;
  for (int64_t i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}

template <typename E>
inline Lanes load(const E* p) {
  return each([=](int64_t i) { return to_float(p[i]); });
}
// The first `count` floats, then zeros; reads nothing behind them.
inline Lanes load_part(const float* p, int64_t count) {
  return each([=](int64_t i) { return i < count ? p[i] : 0.0f; });
}
// The first `count` lanes, then zeros.
inline Lanes keep(const Lanes& a, int64_t count) {
  return each([&](int64_t i) { return i < count ? a.v[i] : 0.0f; });
}
inline Lanes spread(float value) {
  return each([=](int64_t) { return value; });
}
inline void store(float* p, const Lanes& a) { std::copy_n(a.v, kLanes, p); }
inline Lanes sub(const Lanes& a, const Lanes& b) {
  return each([&](int64_t i) { return a.v[i] - b.v[i]; });
}
inline Lanes add(const Lanes& a, const Lanes& b) {
  return each([&](int64_t i) { return a.v[i] + b.v[i]; });
}
inline Lanes mul(const Lanes& a, const Lanes& b) {
  return each([&](int64_t i) { return a.v[i] * b.v[i]; });
}
inline Lanes div(const Lanes& a, const Lanes& b) {
  return each([&](int64_t i) { return a.v[i] / b.v[i]; });
}
inline Lanes root(const Lanes& a) {
  return each([&](int64_t i) { return std::sqrt(a.v[i]); });
}
inline Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  return each([&](int64_t i) { return a.v[i] * b.v[i] + c.v[i]; });
}
// A bit for each lane that is above zero.
inline int positive(const Lanes& a) {
  int bits = 0;
  for (int64_t i = 0; i < kLanes; ++i) bits |= (a.v[i] > 0.0f) << i;
  return bits;
}
inline void transpose(Lanes* a) {
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t j = 0; j < i; ++j) std::swap(a[i].v[j], a[j].v[i]);
  }
}

}  // namespace portable

#if DROPINF_AVX2

namespace avx2 {

AVX2 inline float load1(const float* p) { return *p; }
AVX2 inline float load1(const BFloat16* p) { return to_float(*p); }
AVX2 inline float load1(const Float16* p) { return _cvtsh_ss(p->bits); }
AVX2 inline float load1(const int8_t* p) { return *p; }
AVX2 inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

using Lanes = __m256;

AVX2 inline Lanes widen(__m128i bits, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
AVX2 inline Lanes widen(__m128i bits, Float16) { return _mm256_cvtph_ps(bits); }

AVX2 inline Lanes load(const float* p) { return _mm256_loadu_ps(p); }
template <typename E>
AVX2 inline Lanes load(const E* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), E{});
}
AVX2 inline Lanes load(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
AVX2 inline __m256i first_lanes(int64_t count) {
  const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), place);
}
AVX2 inline Lanes load_part(const float* p, int64_t count) {
  return count >= kLanes ? load(p) : _mm256_maskload_ps(p, first_lanes(count));
}
AVX2 inline Lanes keep(Lanes a, int64_t count) {
  return _mm256_and_ps(a, _mm256_castsi256_ps(first_lanes(count)));
}
AVX2 inline Lanes spread(float value) { return _mm256_set1_ps(value); }
AVX2 inline void store(float* p, Lanes a) { _mm256_storeu_ps(p, a); }
AVX2 inline Lanes sub(Lanes a, Lanes b) { return _mm256_sub_ps(a, b); }
AVX2 inline Lanes add(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
AVX2 inline Lanes mul(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
AVX2 inline Lanes div(Lanes a, Lanes b) { return _mm256_div_ps(a, b); }
AVX2 inline Lanes root(Lanes a) { return _mm256_sqrt_ps(a); }
AVX2 inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
AVX2 inline int positive(Lanes a) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ));
}
AVX2 inline void transpose(Lanes* a) {
  __m256 v[8];
  for (int64_t j = 0; j < 4; ++j) {
    v[2 * j] = _mm256_unpacklo_ps(a[2 * j], a[2 * j + 1]);
    v[2 * j + 1] = _mm256_unpackhi_ps(a[2 * j], a[2 * j + 1]);
  }
  __m256 w[8];
  for (int64_t j = 0; j < 8; j += 4) {
    w[j] = _mm256_shuffle_ps(v[j], v[j + 2], 0x44);
    w[j + 1] = _mm256_shuffle_ps(v[j], v[j + 2], 0xee);
    w[j + 2] = _mm256_shuffle_ps(v[j + 1], v[j + 3], 0x44);
    w[j + 3] = _mm256_shuffle_ps(v[j + 1], v[j + 3], 0xee);
  }
  for (int64_t j = 0; j < 4; ++j) {
    a[j] = _mm256_permute2f128_ps(w[j], w[j + 4], 0x20);
    a[j + 4] = _mm256_permute2f128_ps(w[j], w[j + 4], 0x31);
  }
}

}  // namespace avx2

#endif  // DROPINF_AVX2

}  // namespace dropinf
