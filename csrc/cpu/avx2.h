// What the AVX2 paths share: whether they may run, and elements widened to float.

#pragma once

#include "elements.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define DROPINF_AVX2 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#endif

namespace dropinf {

// True where cpu_capability() is "avx2".
bool use_avx2();

#if DROPINF_AVX2

AVX2 inline float load1(const float* p) { return *p; }
AVX2 inline float load1(const BFloat16* p) { return to_float(*p); }
AVX2 inline float load1(const Float16* p) { return _cvtsh_ss(p->bits); }

AVX2 inline __m256 widen(__m128i bits, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

AVX2 inline __m256 widen(__m128i bits, Float16) { return _mm256_cvtph_ps(bits); }

#endif  // DROPINF_AVX2

}  // namespace dropinf
