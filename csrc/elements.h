// The element types of x, dy and gradients, widened to float; the weight of a sum of them.

#pragma once

#include <cstdint>
#include <cstring>

namespace dropinf {

enum class DType { kFloat32, kBFloat16, kFloat16 };

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

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

inline float to_float(BFloat16 value) { return float_of_bits(uint32_t{value.bits} << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t rest = uint32_t{value.bits & 0x7fffu} << 13;
  if (rest >= 0x7c00u << 13) return float_of_bits(sign | 0x7f800000u | rest);  // inf, NaN
  // 2^112 moves the exponent's bias from 15 to 127, subnormals included.
  const float magnitude = float_of_bits(rest) * 0x1p112f;
  return sign ? -magnitude : magnitude;
}

// What is not finite is left out by a weight of 0 too.
inline float weighted(float weight, float sum) {
  const float product = weight * sum;
  return weight == 0.0f ? 0.0f : product;
}

}  // namespace dropinf
