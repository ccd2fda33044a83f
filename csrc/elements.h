// The element types of x, dy, gradients and rows, widened to float; the weight of a sum of them.

#pragma once

#include <cstdint>
#include <cstring>

namespace dropinf {

enum class DType { kFloat32, kBFloat16, kFloat16, kInt8 };  // kInt8: of rows alone

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kInt8 ? 1 : 2;
}

inline const void* advance(const void* data, DType dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * size_of(dtype);
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }

inline float to_float(int8_t value) { return value; }

inline float to_float(BFloat16 value) { return float_of_bits(uint32_t{value.bits} << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t rest = uint32_t{value.bits & 0x7fffu} << 13;
  if (rest >= 0x7c00u << 13) return float_of_bits(sign | 0x7f800000u | rest);  // inf, NaN
  // 2^112 moves the exponent's bias from 15 to 127, subnormals included.
  const float magnitude = float_of_bits(rest) * 0x1p112f;
  return sign ? -magnitude : magnitude;
}

// What is not finite is left out by a weight of 0 too. A mask, for GCC makes a branch of a choice
// of floats, and then no vectors: 1.5 times the time of a call with T = 1.
inline float weighted(float weight, float sum) {
  const float product = weight * sum;
  uint32_t bits;
  std::memcpy(&bits, &product, sizeof bits);
  return float_of_bits(bits & (weight == 0.0f ? 0u : ~0u));
}

// n entries, `stride` apart, times their weights.
inline void weigh(const float* weights, int64_t n, float* entries, int64_t stride) {
  if (stride == 1) {
    for (int64_t k = 0; k < n; ++k) entries[k] = weighted(weights[k], entries[k]);
    return;
  }
  for (int64_t k = 0; k < n; ++k) entries[k * stride] = weighted(weights[k], entries[k * stride]);
}

}  // namespace dropinf
