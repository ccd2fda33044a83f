// The arguments of the ops as raw pointers, after the checks of what would read or write out of
// bounds; dropinf/ops.py checks for people. For the files that include torch.

#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "launchers.h"

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

// A tensor in a list, as one whose memory holds its numbers. Negated and conjugate views, and zeros
// without memory, torch resolves for other arguments, but not in lists of optional tensors.
inline at::Tensor resolved(const at::Tensor& tensor) {
  return tensor._is_zerotensor() ? at::zeros(tensor.sizes(), tensor.options())
                                 : tensor.resolve_neg();
}

inline SampledOuterArgs sampled_outer_args(const at::Tensor& x, const at::Tensor& dy,
                                           const at::Tensor& o_idx, const at::Tensor& i_idx,
                                           const std::optional<at::Tensor>& sign, bool bias,
                                           double scale, const at::Tensor& out) {
  TORCH_CHECK_VALUE(x.dim() == 3 && dy.dim() == 3 && x.size(0) == dy.size(0) &&
                        x.size(1) == dy.size(1) && x.scalar_type() == dy.scalar_type(),
                    "sampled_outer: x must be [B, T, I] and dy [B, T, O] of one dtype, got ",
                    x.scalar_type(), " ", x.sizes(), " and ", dy.scalar_type(), " ", dy.sizes());
  for (const auto& tensor : {x, dy}) {
    TORCH_CHECK_VALUE(unit_stride(tensor),
                      "sampled_outer: x and dy must have stride 1 in the last dimension, got ",
                      tensor.strides());
  }
  TORCH_CHECK_VALUE(o_idx.scalar_type() == at::kInt && i_idx.scalar_type() == at::kInt &&
                        o_idx.is_contiguous() && i_idx.is_contiguous() &&
                        o_idx.sizes() == i_idx.sizes() && o_idx.dim() == (sign ? 2 : 1),
                    "sampled_outer: o_idx and i_idx must be contiguous int32, [r] or with sign "
                    "[r, s], got ",
                    o_idx.sizes(), " and ", i_idx.sizes());
  TORCH_CHECK_VALUE(!sign || (sign->scalar_type() == at::kChar && sign->is_contiguous() &&
                              sign->sizes() == o_idx.sizes()),
                    "sampled_outer: sign must be contiguous int8 ", o_idx.sizes());
  SampledOuterArgs args;
  args.B = x.size(0);
  args.T = x.size(1);
  args.I = x.size(2);
  args.O = dy.size(2);
  args.r = o_idx.size(0);
  args.s = sign ? o_idx.size(1) : 1;
  args.bias = bias;
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat && out.dim() == 2 && out.size(0) == args.B &&
                        out.size(1) == args.r,
                    "sampled_outer: out must be float32 [B=", args.B, ", r=", args.r, "], got ",
                    out.sizes());
  args.o_idx = o_idx.const_data_ptr<int32_t>();
  args.i_idx = i_idx.const_data_ptr<int32_t>();
  args.dtype = dtype_of(x);
  args.x = x.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.x_stride_b = x.stride(0);
  args.x_stride_t = x.stride(1);
  args.dy_stride_b = dy.stride(0);
  args.dy_stride_t = dy.stride(1);
  args.sign = sign ? sign->const_data_ptr<int8_t>() : nullptr;
  args.scale = static_cast<float>(scale);
  args.out = out.mutable_data_ptr<float>();
  args.out_stride_b = out.stride(0);
  args.out_stride_k = out.stride(1);
  return args;
}

inline SampledEmbeddingArgs sampled_embedding_args(const at::Tensor& ids, const at::Tensor& dy,
                                                   const at::Tensor& o_idx, const at::Tensor& i_idx,
                                                   double scale, const at::Tensor& out) {
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.scalar_type() == at::kLong && ids.is_contiguous() &&
                        dy.dim() == 3 && dy.size(0) == ids.size(0) && dy.size(1) == ids.size(1) &&
                        unit_stride(dy),
                    "sampled_embedding: ids must be contiguous int64 [B, T] and dy [B, T, O] with "
                    "stride 1 in O, got ",
                    ids.scalar_type(), " ", ids.sizes(), " and ", dy.sizes());
  TORCH_CHECK_VALUE(o_idx.scalar_type() == at::kInt && i_idx.scalar_type() == at::kInt &&
                        o_idx.is_contiguous() && i_idx.is_contiguous() && o_idx.dim() == 1 &&
                        o_idx.sizes() == i_idx.sizes(),
                    "sampled_embedding: o_idx and i_idx must be contiguous int32 [r], got ",
                    o_idx.sizes(), " and ", i_idx.sizes());
  SampledEmbeddingArgs args;
  args.r = o_idx.numel();
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat && out.dim() == 2 &&
                        out.size(0) == ids.size(0) && out.size(1) == args.r,
                    "sampled_embedding: out must be float32 [B=", ids.size(0), ", r=", args.r,
                    "], got ", out.sizes());
  args.o_idx = o_idx.const_data_ptr<int32_t>();
  args.i_idx = i_idx.const_data_ptr<int32_t>();
  args.ids = ids.const_data_ptr<int64_t>();
  args.dtype = dtype_of(dy);
  args.dy = dy.const_data_ptr();
  args.B = ids.size(0);
  args.T = ids.size(1);
  args.O = dy.size(2);
  args.dy_stride_b = dy.stride(0);
  args.dy_stride_t = dy.stride(1);
  args.scale = static_cast<float>(scale);
  args.out = out.mutable_data_ptr<float>();
  args.out_stride_b = out.stride(0);
  args.out_stride_k = out.stride(1);
  return args;
}

// The values of one argument of sampled_conv, behind `fill` for the dimensions that are missing.
inline void spatial(const char* name, at::IntArrayRef values, int64_t num_dims, int64_t least,
                    int64_t fill, int64_t* to) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(values.size()) == num_dims, "sampled_conv: ", name,
                    " must be ", num_dims, " ints, got ", values);
  std::fill_n(to, 3, fill);
  for (int64_t d = 0; d < num_dims; ++d) {
    TORCH_CHECK_VALUE(values[d] >= least && values[d] <= kInt32Max, "sampled_conv: ", name,
                      " must be ints from ", least, " to ", kInt32Max, ", got ", values);
    to[3 - num_dims + d] = values[d];
  }
}

// x and dy are the ones that the pointers are to: the caller may have copied them.
inline SampledConvArgs sampled_conv_args(const at::Tensor& x, const at::Tensor& dy,
                                         const at::Tensor& o_idx, const at::Tensor& i_idx,
                                         at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                         at::IntArrayRef padding, at::IntArrayRef dilation,
                                         int64_t groups, bool bias, double scale,
                                         const at::Tensor& out) {
  const int64_t num_dims = x.dim() - 2;
  TORCH_CHECK_VALUE(num_dims >= 1 && num_dims <= 3 && dy.dim() == x.dim() &&
                        x.size(0) == dy.size(0) && x.scalar_type() == dy.scalar_type(),
                    "sampled_conv: x must be [B, C, *S] and dy [B, O, *S'] of one dtype, got ",
                    x.scalar_type(), " ", x.sizes(), " and ", dy.scalar_type(), " ", dy.sizes());
  TORCH_CHECK_VALUE(o_idx.scalar_type() == at::kInt && i_idx.scalar_type() == at::kInt &&
                        o_idx.is_contiguous() && i_idx.is_contiguous() && o_idx.dim() == 1 &&
                        o_idx.sizes() == i_idx.sizes(),
                    "sampled_conv: o_idx and i_idx must be contiguous int32 [r], got ",
                    o_idx.sizes(), " and ", i_idx.sizes());
  SampledConvArgs args;
  args.B = x.size(0);
  args.C = x.size(1);
  args.O = dy.size(1);
  args.groups = groups;
  TORCH_CHECK_VALUE(groups >= 1 && args.C % groups == 0 && args.O % groups == 0,
                    "sampled_conv: groups must divide C=", args.C, " and O=", args.O, ", got ",
                    groups);
  spatial("kernel_size", kernel_size, num_dims, 1, 1, args.kernel_size);
  spatial("stride", stride, num_dims, 1, 1, args.stride);
  spatial("padding", padding, num_dims, 0, 0, args.padding);
  spatial("dilation", dilation, num_dims, 1, 1, args.dilation);
  int64_t taps = 1;
  for (const int64_t size : args.kernel_size) {
    TORCH_CHECK_VALUE(taps <= kInt32Max / size, "sampled_conv: kernel_size ", kernel_size,
                      " is too large");
    taps *= size;
  }
  TORCH_CHECK_VALUE(args.C / groups < kInt32Max / taps, "sampled_conv: C=", args.C,
                    " and kernel_size ", kernel_size, " are too large for int32 indices");
  args.I = args.C / groups * taps;
  args.r = o_idx.numel();
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat && out.dim() == 2 && out.size(0) == x.size(0) &&
                        out.size(1) == args.r,
                    "sampled_conv: out must be float32 [B=", x.size(0), ", r=", args.r, "], got ",
                    out.sizes());
  args.o_idx = o_idx.const_data_ptr<int32_t>();
  args.i_idx = i_idx.const_data_ptr<int32_t>();
  args.dtype = dtype_of(x);
  args.x = x.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.x_stride_b = x.stride(0);
  args.x_stride_c = x.stride(1);
  args.dy_stride_b = dy.stride(0);
  args.dy_stride_c = dy.stride(1);
  for (int64_t d = 0; d < 3; ++d) {
    const int64_t from = d - 3 + x.dim();
    const bool there = from >= 2;
    args.x_size[d] = there ? x.size(from) : 1;
    args.dy_size[d] = there ? dy.size(from) : 1;
    args.x_stride[d] = there ? x.stride(from) : 0;
    args.dy_stride[d] = there ? dy.stride(from) : 0;
  }
  args.bias = bias;
  args.scale = static_cast<float>(scale);
  args.out = out.mutable_data_ptr<float>();
  args.out_stride_b = out.stride(0);
  args.out_stride_k = out.stride(1);
  return args;
}

// The gradients of gather_grads, with the tensors that the entries point into.
struct GatherCall {
  std::vector<at::Tensor> kept, positions;
  std::vector<at::Tensor> signs;  // [L], or empty where no layer has any
  std::vector<GradEntries> layers;
  // [L + 1] of each layer's terms among those of all sums, where an empty sum counts as a zero.
  std::vector<int64_t> offsets;
};

inline GatherCall gather_call(const c10::List<std::optional<at::Tensor>>& grads,
                              at::TensorList indices,
                              const c10::List<std::optional<at::Tensor>>& signs,
                              at::ArrayRef<double> scales, const at::Tensor& out) {
  const int64_t L = indices.size();
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(grads.size()) == L && static_cast<int64_t>(scales.size()) == L,
      "gather_grads: grads, indices and scales must be equally long, got ", grads.size(), ", ", L,
      " and ", scales.size());
  const bool any_signs = !signs.empty();
  TORCH_CHECK_VALUE(!any_signs || static_cast<int64_t>(signs.size()) == L,
                    "gather_grads: signs must be none or ", L, ", got ", signs.size());
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat && out.dim() == 1,
                    "gather_grads: out must be float32 [R], got ", out.scalar_type(), " ",
                    out.sizes());
  GatherCall call;
  auto& [kept, positions, kept_signs, layers, offsets] = call;
  kept.resize(L), positions.resize(L), layers.resize(L), offsets.resize(L + 1);
  if (any_signs) kept_signs.resize(L);
  int64_t R = 0;
  for (int64_t l = 0; l < L; ++l) {
    const std::optional<at::Tensor> sign = any_signs ? signs.get(l) : std::nullopt;
    const bool has_signs = sign && sign->defined();
    TORCH_CHECK_VALUE(indices[l].scalar_type() == at::kLong && indices[l].dim() == 1 + has_signs,
                      "gather_grads: indices[", l,
                      "] must be int64 [r], or with signs [r, s], got ", indices[l].sizes());
    const at::Tensor& index = positions[l] = indices[l].contiguous();
    GradEntries& entries = layers[l];
    entries = GradEntries{};
    entries.idx = index.const_data_ptr<int64_t>();
    entries.r = index.sizes()[0];
    entries.s = 1;
    if (has_signs) {
      TORCH_CHECK_VALUE(sign->scalar_type() == at::kChar && sign->sizes() == index.sizes(),
                        "gather_grads: signs[", l, "] must be int8 ", index.sizes(), ", got ",
                        sign->scalar_type(), " ", sign->sizes());
      kept_signs[l] = resolved(*sign).contiguous();
      entries.signs = kept_signs[l].const_data_ptr<int8_t>();
      entries.s = std::max<int64_t>(index.sizes()[1], 1);
    }
    R += entries.r;
    offsets[l + 1] = offsets[l] + entries.r * entries.s;
    entries.scale = static_cast<float>(scales[l]);
    std::optional<at::Tensor> grad = grads.get(l);
    if (!grad || !grad->defined()) continue;
    TORCH_CHECK_VALUE(grad->layout() == at::kStrided, "gather_grads: grads[", l, "] is ",
                      grad->layout(), ", not dense");
    TORCH_CHECK_VALUE(!grad->requires_grad() || !at::GradMode::is_enabled(), "gather_grads: grads[",
                      l, "] requires grad");
    const at::Tensor& g = kept[l] = resolved(*grad);
    entries.dtype = dtype_of(g);
    entries.numel = g.numel();
    TORCH_CHECK_INDEX(entries.numel > 0 || index.numel() == 0, "gather_grads: indices[", l,
                      "] has an index out of range for a gradient of 0 elements");
    if (index.numel() == 0) continue;  // zeros, if there are entries
    entries.data = g.const_data_ptr();
    if (!g.is_contiguous()) {
      entries.num_dims = g.dim();
      entries.sizes = g.sizes().data();
      entries.strides = g.strides().data();
    }
  }
  TORCH_CHECK_VALUE(out.numel() == R, "gather_grads: out must have the ", R,
                    " entries of all indices, got ", out.numel());
  float* data = out.mutable_data_ptr<float>();
  const int64_t out_stride = out.stride(0);
  for (GradEntries& entries : layers) {
    entries.out = data;
    entries.out_stride = out_stride;
    data += entries.r * out_stride;
  }
  return call;
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

inline GramArgs gram_args(const at::Tensor& rows, const at::Tensor& offsets, double scale,
                          bool accumulate, const at::Tensor& out) {
  check_layers("gram", offsets, {&out}, {&rows});
  GramArgs args;
  args.rows = rows.const_data_ptr<float>();
  args.n = rows.size(0);
  args.rows_stride = rows.stride(0);
  args.L = offsets.numel() - 1;
  args.offsets = offsets.const_data_ptr<int64_t>();
  args.scale = static_cast<float>(scale);
  args.accumulate = accumulate;
  args.out = out.mutable_data_ptr<float>();
  return args;
}

inline CholeskyArgs damped_cholesky_args(const at::Tensor& matrices, const at::Tensor& offsets,
                                         const at::Tensor& shift,
                                         const std::optional<at::Tensor>& rows,
                                         const at::Tensor& out, const at::Tensor& info,
                                         const std::optional<at::Tensor>& solved) {
  const char* const op = "damped_cholesky";
  TORCH_CHECK_VALUE(rows.has_value() == solved.has_value(), op, ": rows and solved go together");
  check_layers(op, offsets, {&matrices, &out}, {});
  if (rows) check_layers(op, offsets, {}, {&*rows, &*solved});
  const int64_t L = offsets.numel() - 1;
  TORCH_CHECK_VALUE(shift.scalar_type() == at::kFloat && shift.is_contiguous() &&
                        shift.numel() == L && info.scalar_type() == at::kInt &&
                        info.is_contiguous() && info.numel() == L,
                    op, ": shift must be float32 and info int32 [L=", L, "], got ", shift.sizes(),
                    " and ", info.sizes());
  CholeskyArgs args{};
  args.L = L;
  args.offsets = offsets.const_data_ptr<int64_t>();
  args.matrices = matrices.const_data_ptr<float>();
  args.factors = out.mutable_data_ptr<float>();
  args.shift = shift.const_data_ptr<float>();
  args.info = info.mutable_data_ptr<int32_t>();
  if (rows) {
    args.rows = rows->const_data_ptr<float>();
    args.solved = solved->mutable_data_ptr<float>();
    args.m = rows->size(0);
    args.rows_stride = rows->stride(0);
    args.solved_stride = solved->stride(0);
  }
  return args;
}

inline CholeskyArgs cholesky_solve_args(const at::Tensor& factors, const at::Tensor& offsets,
                                        const at::Tensor& rows, const at::Tensor& out) {
  check_layers("cholesky_solve", offsets, {&factors}, {&rows, &out});
  CholeskyArgs args{};
  args.L = offsets.numel() - 1;
  args.offsets = offsets.const_data_ptr<int64_t>();
  args.matrices = factors.const_data_ptr<float>();
  args.rows = rows.const_data_ptr<float>();
  args.solved = out.mutable_data_ptr<float>();
  args.m = rows.size(0);
  args.rows_stride = rows.stride(0);
  args.solved_stride = out.stride(0);
  return args;
}

}  // namespace dropinf
