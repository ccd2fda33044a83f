// Checks that ops share, of what would read or write out of bounds; dropinf/ops/ checks for
// people. For the files that include torch.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>

#include "elements.h"

namespace dropinf {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "dropinf: need float32, bfloat16 or float16, got ",
                       tensor.scalar_type());
  }
}

// Nothing is read of an empty tensor, whatever its strides.
inline bool unit_stride(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 || tensor.numel() == 0;
}

// [r], or where `summed` [r, s] too.
inline void check_coordinates(const char* op, const at::Tensor& o_idx, const at::Tensor& i_idx,
                              bool summed = false) {
  TORCH_CHECK_VALUE(o_idx.scalar_type() == at::kInt && i_idx.scalar_type() == at::kInt &&
                        o_idx.is_contiguous() && i_idx.is_contiguous() &&
                        (o_idx.dim() == 1 || (summed && o_idx.dim() == 2)) &&
                        o_idx.sizes() == i_idx.sizes(),
                    op, ": o_idx and i_idx must be contiguous int32 [r]",
                    summed ? " or [r, s]" : "", ", got ", o_idx.sizes(), " and ", i_idx.sizes());
}

// The weights of coordinates of these sizes; null for ones.
inline const float* weights_of(const char* op, const std::optional<at::Tensor>& weights,
                               at::IntArrayRef sizes) {
  if (!weights) return nullptr;
  TORCH_CHECK_VALUE(
      weights->scalar_type() == at::kFloat && weights->is_contiguous() && weights->sizes() == sizes,
      op, ": weights must be contiguous float32 ", sizes, ", got ", weights->scalar_type(), " ",
      weights->sizes());
  return weights->const_data_ptr<float>();
}

inline void check_out(const char* op, const at::Tensor& out, int64_t B, int64_t r) {
  TORCH_CHECK_VALUE(
      out.scalar_type() == at::kFloat && out.dim() == 2 && out.size(0) == B && out.size(1) == r, op,
      ": out must be float32 [B=", B, ", r=", r, "], got ", out.sizes());
}

// Whether all n indices are in [0, size).
inline bool indices_in_range(const int32_t* idx, int64_t n, int64_t size) {
  int32_t least = 0, largest = -1;
  for (int64_t q = 0; q < n; ++q) {
    least = std::min(least, idx[q]);
    largest = std::max(largest, idx[q]);
  }
  return least >= 0 && largest < size;
}

// On CPUs: a kernel on a GPU cannot raise, it writes NaN. `what` says what the size is of.
template <typename... What>
void check_range(const char* op, const char* name, const at::Tensor& idx, int64_t size,
                 const What&... what) {
  TORCH_CHECK_INDEX(indices_in_range(idx.const_data_ptr<int32_t>(), idx.numel(), size), op, ": ",
                    name, " is out of range for ", what...);
}

// What gram, damped_cholesky and cholesky_solve repeat of the checks: [L + 1] rising bounds, and
// the packed matrices and rows that fit them.
inline void check_layers(const char* op, const at::Tensor& offsets,
                         std::initializer_list<const at::Tensor*> packed,
                         std::initializer_list<const at::Tensor*> rows) {
  TORCH_CHECK_VALUE(offsets.scalar_type() == at::kLong && offsets.dim() == 1 &&
                        offsets.numel() > 0 && offsets.is_contiguous(),
                    op, ": offsets must be contiguous int64 [L + 1], got ", offsets.sizes());
  const int64_t* const bounds = offsets.const_data_ptr<int64_t>();
  int64_t num_packed = 0;
  bool rising = bounds[0] == 0;
  for (int64_t l = 0; l + 1 < offsets.numel(); ++l) {
    const int64_t r = bounds[l + 1] - bounds[l];
    rising &= r >= 0;
    num_packed += r * r;
  }
  TORCH_CHECK_VALUE(rising, op, ": offsets must rise from 0");
  for (const at::Tensor* tensor : packed) {
    TORCH_CHECK_VALUE(tensor->scalar_type() == at::kFloat && tensor->is_contiguous() &&
                          tensor->dim() == 1 && tensor->numel() == num_packed,
                      op, ": packed matrices must be contiguous float32 [", num_packed, "], got ",
                      tensor->scalar_type(), " ", tensor->sizes());
  }
  const int64_t R = bounds[offsets.numel() - 1];
  for (const at::Tensor* tensor : rows) {
    TORCH_CHECK_VALUE(tensor->scalar_type() == at::kFloat && tensor->dim() == 2 &&
                          tensor->size(0) == (*rows.begin())->size(0) && tensor->size(1) == R &&
                          unit_stride(*tensor),
                      op, ": rows and their solutions must be float32 [m, R=", R,
                      "] with stride 1 in R, got ", tensor->scalar_type(), " ", tensor->sizes());
  }
}

}  // namespace dropinf
