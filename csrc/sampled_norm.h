// sampled_norm as kernels see it: raw pointers, sizes and strides in elements, no torch.

#pragma once

#include <cstdint>

#include "elements.h"

namespace dropinf {

// The arguments of sampled_norm. With n[b, t] the normalised x[b, t],
//   sums[b] = sum_t dy[b, t] * n[b, t], then sum_t dy[b, t]  (2 I numbers)
//   out[b, k] = sum_j weights[k, j] * sums[b, index[k, j]]
// With s = 1 the weight multiplies the finished sum. A weight of 0 leaves its sum out, also where
// that is not finite.
struct SampledNormArgs {
  DType dtype;     // of x and dy
  const void* x;   // [B, T, I], stride 1 in I
  const void* dy;  // [B, T, I], stride 1 in I
  int64_t B, T, I;
  int64_t x_stride_b, x_stride_t;
  int64_t dy_stride_b, dy_stride_t;
  const int32_t* index;  // [r, s]
  const float* weights;  // [r, s], or null for ones
  int64_t r, s;
  bool rms;  // x over the root of its mean square; else less its mean, over its deviation
  float eps;
  float* out;  // [B, r]
  int64_t out_stride_b, out_stride_k;
};

}  // namespace dropinf
