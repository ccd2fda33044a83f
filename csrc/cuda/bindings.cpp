// The ops on CUDA tensors: checks, scratch from torch's allocator, the launch on the current
// stream.

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"
#include "cuda/cuda_launchers.h"
#include "ops.h"

namespace dropinf {
namespace {

void check(const char* op, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, op,
              ": the CUDA kernel did not launch: ", cudaGetErrorString(error));
}

void same_device(const char* op, const at::Tensor& out, at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK_VALUE(!tensor.defined() || tensor.device() == out.device(), op,
                      ": all tensors must be on ", out.device(), ", got one on ", tensor.device());
  }
}

at::Tensor scratch(const at::Tensor& out, int64_t num_floats) {
  return at::empty({num_floats}, out.options().dtype(at::kFloat));
}

void sampled_outer(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& o_idx,
                   const at::Tensor& i_idx, const std::optional<at::Tensor>& sign, bool bias,
                   double scale, at::TensorList order, const at::Tensor& out) {
  const char* const op = "sampled_outer";
  const c10::cuda::CUDAGuard guard(out.device());
  same_device(op, out, {x, dy, o_idx, i_idx, sign.value_or(x)});
  const SampledOuterArgs args = sampled_outer_args(x, dy, o_idx, i_idx, sign, bias, scale, out);
  if (out.numel() == 0) return;
  if (args.s == 0) {
    out.zero_();
    return;
  }
  cuda::StagedOrder staged{};
  if (!order.empty()) {
    TORCH_CHECK_VALUE(order.size() == 3, op, ": order must be passes, packed and target");
    const at::Tensor &passes = order[0], &packed = order[1], &target = order[2];
    same_device(op, out, {packed, target});
    TORCH_CHECK_VALUE(passes.device().is_cpu() && passes.scalar_type() == at::kLong &&
                          passes.dim() == 2 && passes.size(1) == 6 && passes.is_contiguous(),
                      op, ": passes must be int64 [num_passes, 6] on the CPU");
    TORCH_CHECK_VALUE(packed.scalar_type() == at::kInt && packed.is_contiguous() &&
                          target.scalar_type() == at::kInt && target.is_contiguous() &&
                          packed.dim() == 1 && packed.sizes() == target.sizes(),
                      op, ": packed and target must be int32 [num_slots]");
    staged.passes = passes.const_data_ptr<int64_t>();
    staged.num_passes = passes.size(0);
    staged.packed = packed.const_data_ptr<int32_t>();
    staged.target = target.const_data_ptr<int32_t>();
    for (int64_t p = 0; p < staged.num_passes; ++p) {
      const int64_t* const pass = staged.passes + 6 * p;
      TORCH_CHECK_VALUE(0 <= pass[0] && pass[0] <= pass[1] && pass[1] <= args.r && 0 <= pass[2] &&
                            pass[2] < pass[3] && pass[3] <= args.O && 0 <= pass[4] &&
                            pass[4] + pass[5] <= packed.numel() && 0 < pass[5] &&
                            pass[5] <= cuda::kMaxStagedSlots,
                        op, ": pass ", p, " of the order is not of this call");
    }
  }
  const at::Tensor sums = scratch(out, cuda::sampled_outer_scratch(args));
  check(op, cuda::sampled_outer(args, order.empty() ? nullptr : &staged,
                                sums.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
}

void gather_grads(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList indices,
                  const c10::List<std::optional<at::Tensor>>& signs, at::ArrayRef<double> scales,
                  const at::Tensor& out) {
  const char* const op = "gather_grads";
  const c10::cuda::CUDAGuard guard(out.device());
  GatherCall call = gather_call(grads, indices, signs, scales, out);
  same_device(op, out, call.positions);
  same_device(op, out, call.kept);
  same_device(op, out, call.signs);
  for (size_t l = 0; l < call.layers.size(); ++l) {
    GradEntries& entries = call.layers[l];
    if (entries.num_dims <= cuda::kMaxDims) continue;
    call.kept[l] = call.kept[l].contiguous();
    entries.data = call.kept[l].const_data_ptr();
    entries.num_dims = 0;
  }
  check(op, cuda::gather_grads(call.layers.data(), call.layers.size(),
                               c10::cuda::getCurrentCUDAStream()));
}

void sampled_embedding(const at::Tensor& ids, const at::Tensor& dy, const at::Tensor& o_idx,
                       const at::Tensor& i_idx, double scale, const at::Tensor& out) {
  const char* const op = "sampled_embedding";
  const c10::cuda::CUDAGuard guard(out.device());
  same_device(op, out, {ids, dy, o_idx, i_idx});
  const SampledEmbeddingArgs args = sampled_embedding_args(ids, dy, o_idx, i_idx, scale, out);
  check(op, cuda::sampled_embedding(args, c10::cuda::getCurrentCUDAStream()));
}

void sampled_conv(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& o_idx,
                  const at::Tensor& i_idx, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool bias,
                  double scale, const at::Tensor& out) {
  const char* const op = "sampled_conv";
  const c10::cuda::CUDAGuard guard(out.device());
  same_device(op, out, {x, dy, o_idx, i_idx});
  const SampledConvArgs args = sampled_conv_args(x, dy, o_idx, i_idx, kernel_size, stride, padding,
                                                 dilation, groups, bias, scale, out);
  check(op, cuda::sampled_conv(args, c10::cuda::getCurrentCUDAStream()));
}

void score_topk(const at::Tensor& scores, int64_t first, const at::Tensor& values,
                const at::Tensor& indices) {
  const char* const op = "score_topk";
  const c10::cuda::CUDAGuard guard(values.device());
  same_device(op, values, {scores, indices});
  TORCH_CHECK_VALUE(scores.scalar_type() == at::kFloat && scores.dim() == 2 &&
                        unit_stride(scores) && values.scalar_type() == at::kFloat &&
                        indices.scalar_type() == at::kLong && values.dim() == 2 &&
                        values.size(0) == scores.size(0) && values.sizes() == indices.sizes() &&
                        values.is_contiguous() && indices.is_contiguous(),
                    op,
                    ": scores must be float32 [m, c] with stride 1 in c, values float32 and "
                    "indices int64 contiguous [m, k], got ",
                    scores.sizes(), ", ", values.sizes(), " and ", indices.sizes());
  const int64_t k = values.size(1);
  TORCH_CHECK_VALUE(k <= cuda::kMaxTopk, op, ": backend 'cuda' takes k up to ", cuda::kMaxTopk,
                    ", got ", k, "; backend='reference' takes any");
  if (values.numel() == 0 || scores.numel() == 0) return;
  check(op, cuda::score_topk(scores.const_data_ptr<float>(), scores.size(0), scores.size(1),
                             scores.stride(0), first, values.mutable_data_ptr<float>(),
                             indices.mutable_data_ptr<int64_t>(), k,
                             c10::cuda::getCurrentCUDAStream()));
}

void gram(const at::Tensor& rows, const at::Tensor& offsets, double scale, bool accumulate,
          const at::Tensor& out) {
  const char* const op = "gram";
  const c10::cuda::CUDAGuard guard(out.device());
  const GramArgs args = gram_args(rows, offsets, scale, accumulate, out);
  same_device(op, out, {rows});
  if (out.numel() == 0 || (accumulate && args.n == 0)) return;
  const int64_t size = cuda::gram_scratch(args);
  const at::Tensor scratch = at::empty({size}, out.options());
  float* const sums = size > 0 ? scratch.mutable_data_ptr<float>() : nullptr;
  check(op, cuda::gram(args, sums, c10::cuda::getCurrentCUDAStream()));
}

int64_t widest_cholesky(const char* op) {
  int64_t widest = 0;
  check(op, cuda::widest_cholesky(&widest));
  return widest;
}

// `count` layers of one width, wider than the kernels take, one behind the other.
struct WideLayers {
  int64_t first, count, width, matrix, column;

  at::Tensor of_layers(const at::Tensor& tensor) const { return tensor.narrow(0, first, count); }
  at::Tensor matrices(const at::Tensor& packed) const {
    return packed.narrow(0, matrix, count * width * width).view({count, width, width});
  }
  at::Tensor rows(const at::Tensor& packed) const {  // [count, m, width]
    return packed.narrow(1, column, count * width).unflatten(1, {count, width}).transpose(0, 1);
  }
};

std::vector<WideLayers> wide_layers(const at::Tensor& offsets, int64_t widest) {
  const int64_t* const bounds = offsets.const_data_ptr<int64_t>();
  const int64_t L = offsets.numel() - 1;
  std::vector<WideLayers> wide;
  int64_t matrix = 0;
  for (int64_t l = 0, count = 1; l < L; l += count) {
    const int64_t width = bounds[l + 1] - bounds[l];
    count = 1;
    while (l + count < L && bounds[l + count + 1] - bounds[l + count] == width) ++count;
    if (width > widest) wide.push_back({l, count, width, matrix, bounds[l]});
    matrix += count * width * width;
  }
  return wide;
}

// Wide layers go through torch, equal ones together, which does not wait for the device either.
// How they are summed is torch's.
void factor_wide(const WideLayers& wide, const at::Tensor& matrices, const at::Tensor& shift,
                 const at::Tensor& out, const at::Tensor& info) {
  const at::Tensor damped = wide.matrices(matrices).tril();
  damped.diagonal(0, 1, 2).add_(wide.of_layers(shift).unsqueeze(1));
  const auto [lower, failed] = at::linalg_cholesky_ex(damped);
  // A NaN pivot may have gone unnoticed.
  const at::Tensor bad = lower.diagonal(0, 1, 2).gt(0).logical_not();
  const at::Tensor first_bad = at::where(bad.any(1), bad.to(at::kInt).argmax(1).add(1), 0);
  const at::Tensor pivot = at::where(failed.ne(0), failed, first_bad);
  wide.of_layers(info).copy_(pivot);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  wide.matrices(out).copy_(lower.masked_fill(pivot.ne(0).view({-1, 1, 1}), nan));
}

void solve_wide(const WideLayers& wide, const at::Tensor& factors, const at::Tensor& rows,
                const at::Tensor& out) {
  const at::Tensor lower = wide.matrices(factors);
  const at::Tensor half = at::linalg_solve_triangular(lower.mT(), wide.rows(rows), true, false);
  wide.rows(out).copy_(at::linalg_solve_triangular(lower, half, false, false));
}

void damped_cholesky(const at::Tensor& matrices, const at::Tensor& offsets, const at::Tensor& shift,
                     const std::optional<at::Tensor>& rows, const at::Tensor& out,
                     const at::Tensor& info, const std::optional<at::Tensor>& solved) {
  const char* const op = "damped_cholesky";
  const c10::cuda::CUDAGuard guard(out.device());
  const at::NoGradGuard no_grad;
  const CholeskyArgs args = damped_cholesky_args(matrices, offsets, shift, rows, out, info, solved);
  same_device(op, out, {matrices, shift, info});
  if (rows) same_device(op, out, {*rows, *solved});
  const int64_t widest = widest_cholesky(op);
  for (const WideLayers& wide : wide_layers(offsets, widest)) {
    factor_wide(wide, matrices, shift, out, info);
    if (args.m > 0) solve_wide(wide, out, *rows, *solved);
  }
  check(op, cuda::cholesky(args, widest, c10::cuda::getCurrentCUDAStream()));
}

void cholesky_solve(const at::Tensor& factors, const at::Tensor& offsets, const at::Tensor& rows,
                    const at::Tensor& out) {
  const char* const op = "cholesky_solve";
  const c10::cuda::CUDAGuard guard(out.device());
  const at::NoGradGuard no_grad;
  const CholeskyArgs args = cholesky_solve_args(factors, offsets, rows, out);
  same_device(op, out, {factors, rows});
  if (out.numel() == 0) return;
  const int64_t widest = widest_cholesky(op);
  for (const WideLayers& wide : wide_layers(offsets, widest)) {
    solve_wide(wide, factors, rows, out);
  }
  check(op, cuda::cholesky(args, widest, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

void implement_cuda_ops(torch::Library& m) {
  m.impl("sampled_outer", &sampled_outer);
  m.impl("gather_grads", &gather_grads);
  m.impl("sampled_embedding", &sampled_embedding);
  m.impl("sampled_conv", &sampled_conv);
  m.impl("score_topk", &score_topk);
  m.impl("gram", &gram);
  m.impl("damped_cholesky", &damped_cholesky);
  m.impl("cholesky_solve", &cholesky_solve);
}

}  // namespace dropinf
