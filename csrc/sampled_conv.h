// sampled_conv as kernels see it: raw pointers, sizes and strides in elements, no torch.

#pragma once

#include <cstdint>
#include <memory>

#include "elements.h"

namespace dropinf {

// The arguments of sampled_conv. Three spatial dimensions; those that are missing are leading ones.
// With (c_k, q_k) = unravel(i_idx[k]) in (C / groups, kernel_size) and g the group of o_idx[k]:
//   out[b, k] = weights[k] * sum_p dy[b, o_idx[k], p]
//                                * x[b, g * C / groups + c_k, p * stride + q_k * dilation -
//                                padding]
// where x counts as zeros outside its sizes. A weight of 0 makes 0, also of what is not finite.
struct SampledConvArgs {
  DType dtype;     // of x and dy
  const void* x;   // [B, C, *x_size]
  const void* dy;  // [B, O, *dy_size]
  int64_t B, C, O, groups;
  int64_t I;  // C / groups * prod(kernel_size)
  int64_t x_size[3], dy_size[3];
  int64_t x_stride_b, x_stride_c, x_stride[3];
  int64_t dy_stride_b, dy_stride_c, dy_stride[3];
  int64_t kernel_size[3], stride[3], padding[3], dilation[3];
  const int32_t* o_idx;  // [r]
  const int32_t* i_idx;  // [r]
  const float* weights;  // [r], or null for ones
  int64_t r;
  bool bias;   // i_idx may be C / groups * prod(kernel_size): an input of ones
  float* out;  // [B, r]
  int64_t out_stride_b, out_stride_k;
};

// One call of sampled_conv, prepared once and then shared by the threads. Each coordinate is summed
// on its own in an order that depends on the layer alone.
class SampledConv {
 public:
  static std::unique_ptr<const SampledConv> make(const SampledConvArgs& args);
  virtual ~SampledConv() = default;

  double entry_ns;  // rough time of one entry

  // out[b, k_begin:k_end].
  virtual void entries(int64_t b, int64_t k_begin, int64_t k_end) const = 0;
};

}  // namespace dropinf
