// What sampled_conv does with rows of x and dy on the CPU: their dots, and whether dy is finite.
// For sampled_conv.cpp alone: in namespaces without a name, or 16-bit rows with a stride of 2 take
// 14 % more instructions (GCC 12).

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/lanes.h"

namespace dropinf {

constexpr int64_t kShare = 3;  // coordinates that share the loads of dy

// What a dot runs over: sizes, and steps in elements.
struct Box {
  int64_t size[3], x_step[3], dy_step[3];
};

namespace portable {
namespace {

template <bool kUnit, typename E>
void dots_in_steps(const Box& box, const E* const* x, const E* dy, int64_t count, float* lanes) {
  const int64_t W = box.size[2];
  const int64_t x_step = kUnit ? 1 : box.x_step[2], dy_step = kUnit ? 1 : box.dy_step[2];
  for (int64_t n = 0; n < count; ++n, lanes += kLanes) {
    for (int64_t d = 0; d < box.size[0]; ++d) {
      for (int64_t h = 0; h < box.size[1]; ++h) {
        const E* u = x[n] + d * box.x_step[0] + h * box.x_step[1];
        const E* v = dy + d * box.dy_step[0] + h * box.dy_step[1];
        int64_t w = 0;
        for (; w + kLanes <= W; w += kLanes, u += kLanes * x_step, v += kLanes * dy_step) {
          for (int64_t j = 0; j < kLanes; ++j) {
            lanes[j] += to_float(u[j * x_step]) * to_float(v[j * dy_step]);
          }
        }
        for (int64_t j = 0; w < W; ++w, ++j) {
          lanes[j] += to_float(u[j * x_step]) * to_float(v[j * dy_step]);
        }
      }
    }
  }
}

// lanes[n * kLanes + w % kLanes] += the products of dy and x[n], for `count` up to kShare.
template <typename E>
void dots(const Box& box, const void* const* x, const void* dy, int64_t count, float* lanes) {
  const E* pointers[kShare];
  for (int64_t n = 0; n < count; ++n) pointers[n] = static_cast<const E*>(x[n]);
  const bool unit = box.x_step[2] == 1 && box.dy_step[2] == 1;
  const auto run = unit ? dots_in_steps<true, E> : dots_in_steps<false, E>;
  run(box, pointers, static_cast<const E*>(dy), count, lanes);
}

// Whether `count` elements, `step` apart, are all finite.
template <typename E>
bool finite(const void* data, int64_t step, int64_t count) {
  const E* p = static_cast<const E*>(data);
  float sum = 0.0f;
  for (int64_t w = 0; w < count; ++w) sum += 0.0f * to_float(p[w * step]);
  return sum == 0.0f;
}

}  // namespace
}  // namespace portable

#if DROPINF_AVX2

namespace avx2 {
namespace {

// Steps between elements that are known when compiled; kAny is the box's.
constexpr int kAny = 0;

// 8 elements `step` apart.
template <int kStep, typename E>
AVX2 inline Lanes load_apart(const E* p, int64_t step) {
  if (kStep == 1) return load(p);
  if (kStep == 2) {  // the last element read is the last one wanted
    const Lanes both = _mm256_shuffle_ps(load(p), load(p + 7), 0xd8);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(both), 0xd8));
  }
  return _mm256_setr_ps(load1(p), load1(p + step), load1(p + 2 * step), load1(p + 3 * step),
                        load1(p + 4 * step), load1(p + 5 * step), load1(p + 6 * step),
                        load1(p + 7 * step));
}

// The first `count` of 8 elements, 0 < count < 8, and zeros. Nothing beyond them is read.
AVX2 inline Lanes load_first(const float* p, int64_t count) {
  return _mm256_maskload_ps(p, first_lanes(count));
}

template <typename T, typename E>
AVX2 inline uint64_t bits_at(const E* p) {
  T bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

// 16-bit elements have no masked load: two loads of half the width that overlap.
AVX2 inline uint64_t first_bits(const void* data, int64_t count) {
  const auto* p = static_cast<const uint16_t*>(data);
  if (count >= 4) return bits_at<uint64_t>(p);
  if (count == 1) return *p;
  return bits_at<uint32_t>(p) | uint64_t{p[count - 1]} << 16 * (count - 1);
}

template <typename E>
AVX2 inline Lanes load_first(const E* p, int64_t count) {
  const uint64_t low = first_bits(p, count);
  const uint64_t high = count > 4 ? bits_at<uint64_t>(p + count - 4) >> 16 * (8 - count) : 0;
  return widen(_mm_set_epi64x(high, low), E{});
}

// The last `count` of 8 elements that are there, behind zeros. Of 16 bits, they cost less so.
template <typename E>
AVX2 inline Lanes load_last(const E* p, int64_t count) {
  const __m256i lane = _mm256_setr_epi32(8, 7, 6, 5, 4, 3, 2, 1);
  const __m256i left = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count + 1)), lane);
  return _mm256_and_ps(load(p), _mm256_castsi256_ps(left));
}

template <int kStep, typename E>
AVX2 inline Lanes load_first_apart(const E* p, int64_t step, int64_t count) {
  if (kStep == 1) return load_first(p, count);
  float v[8] = {};
  for (int64_t j = 0; j < count; ++j) v[j] = load1(p + j * step);
  return _mm256_loadu_ps(v);
}

// sums[n] += 8 products.
template <int kXStep, int kDyStep, int kCount, typename E>
AVX2 inline void add8(const E* const* x, int64_t x_step, const E* dy, int64_t dy_step, int64_t w,
                      Lanes* sums) {
  const Lanes v = load_apart<kDyStep>(dy + w * dy_step, dy_step);
  for (int n = 0; n < kCount; ++n) {
    sums[n] = _mm256_fmadd_ps(v, load_apart<kXStep>(x[n] + w * x_step, x_step), sums[n]);
  }
}

template <int kXStep, int kDyStep, int kCount, typename E>
AVX2 void dots_of(const Box& box, const void* const* x_data, const void* dy_data, float* lanes) {
  const int64_t W = box.size[2], rest = W % 8, whole = W - rest;
  const int64_t x_step = kXStep ? kXStep : box.x_step[2];
  const int64_t dy_step = kDyStep ? kDyStep : box.dy_step[2];
  // Four chains hide the latency of an FMA. Each has a name: the compiler keeps an array of them in
  // memory.
  Lanes a[kCount], b[kCount], c[kCount], d[kCount];
  for (int n = 0; n < kCount; ++n) a[n] = b[n] = c[n] = d[n] = _mm256_setzero_ps();
  for (int64_t p = 0; p < box.size[0]; ++p) {
    for (int64_t q = 0; q < box.size[1]; ++q) {
      const E* dy = static_cast<const E*>(dy_data) + p * box.dy_step[0] + q * box.dy_step[1];
      const E* x[kCount];
      for (int n = 0; n < kCount; ++n) {
        x[n] = static_cast<const E*>(x_data[n]) + p * box.x_step[0] + q * box.x_step[1];
      }
      int64_t w = 0;
      for (; w + 32 <= W; w += 32) {
        add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w, a);
        add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w + 8, b);
        add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w + 16, c);
        add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w + 24, d);
      }
      if (w + 8 <= W) add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w, a);
      if (w + 16 <= W) add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w + 8, b);
      if (w + 24 <= W) add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w + 16, c);
      if (rest == 0) continue;
      if (kXStep == 1 && kDyStep == 1 && sizeof(E) == 2 && whole > 0) {
        const Lanes v = load_last(dy + W - 8, rest);
        for (int n = 0; n < kCount; ++n) {
          d[n] = _mm256_fmadd_ps(v, load_last(x[n] + W - 8, rest), d[n]);
        }
        continue;
      }
      const Lanes v = load_first_apart<kDyStep>(dy + whole * dy_step, dy_step, rest);
      for (int n = 0; n < kCount; ++n) {
        const Lanes u = load_first_apart<kXStep>(x[n] + whole * x_step, x_step, rest);
        d[n] = _mm256_fmadd_ps(v, u, d[n]);
      }
    }
  }
  for (int n = 0; n < kCount; ++n, lanes += kLanes) {
    const Lanes sum = _mm256_add_ps(_mm256_add_ps(a[n], b[n]), _mm256_add_ps(c[n], d[n]));
    _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_loadu_ps(lanes), sum));
  }
}

// The same for rows of less than 16, where what a row costs by itself counts.
template <int kCount, typename E>
AVX2 void short_dots_of(const Box& box, const void* const* x_data, const void* dy_data,
                        float* lanes) {
  const int64_t rest = box.size[2] % 8, whole = box.size[2] - rest;
  Lanes a[kCount], b[kCount];
  for (int n = 0; n < kCount; ++n) a[n] = b[n] = _mm256_setzero_ps();
  for (int64_t p = 0; p < box.size[0]; ++p) {
    for (int64_t q = 0; q < box.size[1]; ++q) {
      const E* dy = static_cast<const E*>(dy_data) + p * box.dy_step[0] + q * box.dy_step[1];
      const E* x[kCount];
      for (int n = 0; n < kCount; ++n) {
        x[n] = static_cast<const E*>(x_data[n]) + p * box.x_step[0] + q * box.x_step[1];
      }
      if (whole > 0) add8<1, 1, kCount>(x, 1, dy, 1, 0, a);
      if (rest == 0) continue;
      const bool last = sizeof(E) == 2 && whole > 0;
      const Lanes v = last ? load_last(dy + rest, rest) : load_first(dy + whole, rest);
      for (int n = 0; n < kCount; ++n) {
        const Lanes u = last ? load_last(x[n] + rest, rest) : load_first(x[n] + whole, rest);
        b[n] = _mm256_fmadd_ps(v, u, b[n]);
      }
    }
  }
  for (int n = 0; n < kCount; ++n, lanes += kLanes) {
    const Lanes sum = _mm256_add_ps(a[n], b[n]);
    _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_loadu_ps(lanes), sum));
  }
}

template <int kXStep, int kDyStep, typename E>
AVX2 void dots_in_steps(const Box& box, const void* const* x, const void* dy, int64_t count,
                        float* lanes) {
  if (kXStep == 1 && kDyStep == 1 && box.size[2] < 16) {
    if (count == 1) return short_dots_of<1, E>(box, x, dy, lanes);
    if (count == 2) return short_dots_of<2, E>(box, x, dy, lanes);
    return short_dots_of<kShare, E>(box, x, dy, lanes);
  }
  switch (count) {
    case 1:
      return dots_of<kXStep, kDyStep, 1, E>(box, x, dy, lanes);
    case 2:
      return dots_of<kXStep, kDyStep, 2, E>(box, x, dy, lanes);
    default:
      return dots_of<kXStep, kDyStep, kShare, E>(box, x, dy, lanes);
  }
}

template <typename E>
AVX2 void dots(const Box& box, const void* const* x, const void* dy, int64_t count, float* lanes) {
  const int64_t x_step = box.x_step[2];
  if (box.dy_step[2] != 1) return dots_in_steps<kAny, kAny, E>(box, x, dy, count, lanes);
  if (x_step == 1) return dots_in_steps<1, 1, E>(box, x, dy, count, lanes);
  if (x_step == 2) return dots_in_steps<2, 1, E>(box, x, dy, count, lanes);
  return dots_in_steps<kAny, 1, E>(box, x, dy, count, lanes);
}

AVX2 inline __m256i larger(__m256i a, __m256i b, float) { return _mm256_max_epi32(a, b); }
template <typename E>
AVX2 inline __m256i larger(__m256i a, __m256i b, E) {
  return _mm256_max_epi16(a, b);
}

// Without their signs, elements are in the order of their bits.
template <typename E>
AVX2 bool finite(const void* data, int64_t step, int64_t count) {
  constexpr int64_t kWide = 32 / sizeof(E);
  const auto* p = static_cast<const E*>(data);
  const __m256i size = sizeof(E) == 4 ? _mm256_set1_epi32(INT32_MAX) : _mm256_set1_epi16(INT16_MAX);
  __m256i largest = _mm256_setzero_si256(), also = largest;
  int64_t w = 0;
  for (; step == 1 && w + 2 * kWide <= count; w += 2 * kWide) {
    const auto* from = reinterpret_cast<const __m256i*>(p + w);
    largest = larger(largest, _mm256_and_si256(_mm256_loadu_si256(from), size), E{});
    also = larger(also, _mm256_and_si256(_mm256_loadu_si256(from + 1), size), E{});
  }
  E found[kWide];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(found), larger(largest, also, E{}));
  return portable::finite<E>(found, 1, kWide) && portable::finite<E>(p + w * step, step, count - w);
}

}  // namespace
}  // namespace avx2

#endif  // DROPINF_AVX2

}  // namespace dropinf
