// gather_grads as kernels see it: raw pointers, sizes and strides in elements, no torch.

#pragma once

#include <cstdint>

#include "elements.h"

namespace dropinf {

// One gradient of gather_grads, and the entries wanted of it.
struct GradEntries {
  const void* data;  // null counts as zeros
  DType dtype;
  int64_t numel;
  // Sizes and strides, outermost first; num_dims = 0 if the data are contiguous.
  int64_t num_dims;
  const int64_t* sizes;
  const int64_t* strides;
  const int64_t* idx;    // [r, s] positions in the flattened gradient
  const float* weights;  // [r, s], 0 leaves a position out; or null for ones
  int64_t r, s;
  float* out;  // [r]
  int64_t out_stride;
};

// out[k] = sum_j weights[k, j] * gradient.flatten()[idx[k, j]] for k in [k_begin, k_end),
// summed in the order of j. False, with every entry still written, if an index is out of range.
bool gather_entries(const GradEntries& entries, int64_t k_begin, int64_t k_end);

}  // namespace dropinf
