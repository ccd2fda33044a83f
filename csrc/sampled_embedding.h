// sampled_embedding as kernels see it: raw pointers, sizes and strides in elements, no torch.

#pragma once

#include <cstdint>

#include "elements.h"

namespace dropinf {

// The arguments of sampled_embedding:
//   out[b, k] = weights[k] * sum over t with ids[b, t] == i_idx[k] of dy[b, t, o_idx[k]]
// A weight of 0 makes 0, also of what is not finite.
struct SampledEmbeddingArgs {
  const int64_t* ids;  // [B, T], contiguous
  DType dtype;         // of dy
  const void* dy;      // [B, T, O], stride 1 in O
  int64_t B, T, O;
  int64_t dy_stride_b, dy_stride_t;
  const int32_t* o_idx;  // [r]
  const int32_t* i_idx;  // [r], rising
  const float* weights;  // [r], or null for ones
  int64_t r;
  float* out;  // [B, r]
  int64_t out_stride_b, out_stride_k;
};

// out[b_begin:b_end].
void sampled_embedding_rows(const SampledEmbeddingArgs& args, int64_t b_begin, int64_t b_end);

}  // namespace dropinf
