// sampled_outer: its schema and checks, and how a call is run on each device.

#include "sampled_outer.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "checks.h"
#include "registration.h"
#include "threads.h"
#ifdef DROPINF_CUDA
#include "column_order.h"
#include "cuda/calls.h"
#include "cuda/sampled_outer.cuh"
#endif

namespace dropinf {
namespace {

TORCH_LIBRARY_FRAGMENT(DROPINF_LIBRARY, m) {
  define(m,
         "sampled_outer(Tensor x, Tensor dy, Tensor o_idx, Tensor i_idx, Tensor? weights, "
         "bool bias, Tensor[] order, Tensor(a!) out) -> ()");
}

SampledOuterArgs sampled_outer_args(const at::Tensor& x, const at::Tensor& dy,
                                    const at::Tensor& o_idx, const at::Tensor& i_idx,
                                    const std::optional<at::Tensor>& weights, bool bias,
                                    const at::Tensor& out) {
  TORCH_CHECK_VALUE(x.dim() == 3 && dy.dim() == 3 && x.size(0) == dy.size(0) &&
                        x.size(1) == dy.size(1) && x.scalar_type() == dy.scalar_type(),
                    "sampled_outer: x must be [B, T, I] and dy [B, T, O] of one dtype, got ",
                    x.scalar_type(), " ", x.sizes(), " and ", dy.scalar_type(), " ", dy.sizes());
  for (const auto& tensor : {x, dy}) {
    TORCH_CHECK_VALUE(unit_stride(tensor),
                      "sampled_outer: x and dy must have stride 1 in the last dimension, got ",
                      tensor.strides());
  }
  check_coordinates("sampled_outer", o_idx, i_idx, true);
  SampledOuterArgs args;
  args.B = x.size(0);
  args.T = x.size(1);
  args.I = x.size(2);
  args.O = dy.size(2);
  args.r = o_idx.size(0);
  args.s = o_idx.dim() == 2 ? o_idx.size(1) : 1;
  args.bias = bias;
  check_out("sampled_outer", out, args.B, args.r);
  args.o_idx = o_idx.const_data_ptr<int32_t>();
  args.i_idx = i_idx.const_data_ptr<int32_t>();
  args.dtype = dtype_of(x);
  args.x = x.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.x_stride_b = x.stride(0);
  args.x_stride_t = x.stride(1);
  args.dy_stride_b = dy.stride(0);
  args.dy_stride_t = dy.stride(1);
  args.weights = weights_of("sampled_outer", weights, o_idx.sizes());
  args.out = out.mutable_data_ptr<float>();
  args.out_stride_b = out.stride(0);
  args.out_stride_k = out.stride(1);
  return args;
}

#ifndef DROPINF_CUDA_ON_HOST

// Examples whose chunks are summed apart at a time: a few work items for each thread, which bounds
// the memory of the sums.
constexpr int64_t kItemsPerThread = 2;

void run(const SampledOuter& call, const SampledOuterArgs& args) {
  const int64_t threads = num_threads();
  const int64_t num_chunks = call.num_chunks;
  if (threads == 1 || num_chunks == 1 || args.B >= 4 * threads) {
    at::parallel_for(0, args.B, grain(num_chunks * call.chunk_ns),
                     [&](int64_t begin, int64_t end) { call.rows(begin, end); });
    return;
  }
  const int64_t group = std::min(args.B, (kItemsPerThread * threads + num_chunks - 1) / num_chunks);
  const int64_t example_size = num_chunks * call.sums_size;
  const std::unique_ptr<float[]> sums(new float[group * example_size]);
  for (int64_t first = 0; first < args.B; first += group) {
    const int64_t last = std::min(first + group, args.B);
    at::parallel_for(first * num_chunks, last * num_chunks, grain(call.chunk_ns),
                     [&](int64_t begin, int64_t end) {
                       call.chunks(begin, end,
                                   sums.get() + (begin - first * num_chunks) * call.sums_size);
                     });
    for (int64_t b = first; b < last; ++b) {
      at::parallel_for(0, args.r, grain(0.1 * num_chunks * args.s),
                       [&](int64_t begin, int64_t end) {
                         call.finish(b, begin, end, sums.get() + (b - first) * example_size);
                       });
    }
  }
}

void sampled_outer_cpu(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& o_idx,
                       const at::Tensor& i_idx, const std::optional<at::Tensor>& weights, bool bias,
                       at::TensorList, const at::Tensor& out) {
  const SampledOuterArgs args = sampled_outer_args(x, dy, o_idx, i_idx, weights, bias, out);
  check_range("sampled_outer", "o_idx", o_idx, args.O, "O=", args.O);
  check_range("sampled_outer", "i_idx", i_idx, args.I + bias, "I=", args.I,
              bias ? " and the bias column" : "");
  if (out.numel() == 0) return;
  if (args.T == 0 || args.s == 0) {
    out.zero_();
    return;
  }
  run(*SampledOuter::make(args), args);
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, CPU, m) { m.impl("sampled_outer", &sampled_outer_cpu); }

#endif  // DROPINF_CUDA_ON_HOST

#ifdef DROPINF_CUDA

// The order of a call, from its tensors.
cuda::StagedOrder staged_order(const char* op, at::TensorList order, const SampledOuterArgs& args,
                               const at::Tensor& out) {
  const at::Tensor &passes = order[0], &packed = order[1], &target = order[2];
  check_devices(op, out, {packed, target});
  TORCH_CHECK_VALUE(passes.device().is_cpu() && passes.scalar_type() == at::kLong &&
                        passes.dim() == 2 && passes.size(1) == 6 && passes.is_contiguous(),
                    op, ": passes must be int64 [num_passes, 6] on the CPU");
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kInt && packed.is_contiguous() &&
                        target.scalar_type() == at::kInt && target.is_contiguous() &&
                        packed.dim() == 1 && packed.sizes() == target.sizes(),
                    op, ": packed and target must be int32 [num_slots]");
  cuda::StagedOrder staged;
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
  return staged;
}

cuda::ColumnOrder column_order(const char* op, at::TensorList order, const SampledOuterArgs& args,
                               const at::Tensor& out) {
  const at::Tensor& passes = order[0];
  TORCH_CHECK_VALUE(size_of(args.dtype) == 2, op,
                    ": an order of columns is for elements of two bytes");
  TORCH_CHECK_VALUE(passes.device().is_cpu() && passes.scalar_type() == at::kLong &&
                        passes.dim() == 2 && passes.size(1) == 5 && passes.is_contiguous() &&
                        passes.size(0) <= cuda::kMaxColumnPasses,
                    op, ": passes must be int64 [num_passes, 5] on the CPU");
  const int64_t num_slots = passes.size(0) * kLaneSteps * kColumnLanes;  // far below 2^31
  TORCH_CHECK_VALUE(args.r <= num_slots / args.s, op, ": the order has ", num_slots,
                    " slots, too few for coordinates [", args.r, ", ", args.s,
                    "]; make it of these coordinates");
  const int64_t rows[] = {kLaneSteps / 2, kLanePieces, kLaneSteps};
  for (int n = 0; n < 3; ++n) {
    const at::Tensor& tensor = order[1 + n];
    check_devices(op, out, {tensor});
    TORCH_CHECK_VALUE(
        tensor.scalar_type() == at::kInt && tensor.is_contiguous() &&
            tensor.sizes() == at::IntArrayRef({passes.size(0), rows[n], kColumnLanes}),
        op, ": packed, columns and target must be int32 [num_passes, ", rows[n], ", 512]");
  }
  for (int64_t p = 0; p < passes.size(0); ++p) {
    const int64_t* const pass = passes.const_data_ptr<int64_t>() + 5 * p;
    const int64_t num_inputs = std::min(pass[1], args.I) - pass[0];
    TORCH_CHECK_VALUE(0 <= pass[0] && pass[0] < pass[1] && pass[1] <= args.I + args.bias &&
                          num_inputs <= cuda::kColumnInputs && 0 <= pass[2] && pass[2] < pass[3] &&
                          pass[3] <= args.O && pass[3] - pass[2] <= cuda::kColumnOutputs,
                      op, ": pass ", p, " of the order is not of this call");
  }
  return {passes.const_data_ptr<int64_t>(), passes.size(0), order[1].const_data_ptr<int32_t>(),
          order[2].const_data_ptr<int32_t>(), order[3].const_data_ptr<int32_t>()};
}

// Coordinates [r, s] are those of a call with r * s entries, of which torch adds the s of each: a
// launch each, always in the same order.
void sampled_outer_columns(const char* op, SampledOuterArgs args, at::TensorList order,
                           const at::Tensor& out, cudaStream_t stream) {
  const cuda::ColumnOrder columns = column_order(op, order, args, out);
  const int64_t s = args.s;
  at::Tensor summands;
  if (s > 1) {
    summands = scratch(out, args.B * args.r * s).view({args.B, args.r, s});
    args.r *= s;
    args.s = 1;
    args.out = summands.mutable_data_ptr<float>();
    args.out_stride_b = args.r;
    args.out_stride_k = 1;
  }
  const at::Tensor sums = scratch(out, cuda::sampled_outer_scratch(args, columns));
  check_launch(op, cuda::sampled_outer(args, columns, sums.mutable_data_ptr<float>(), stream));
  if (s == 1) return;
  out.copy_(summands.select(2, 0));
  for (int64_t j = 1; j < s; ++j) out.add_(summands.select(2, j));
}

void sampled_outer_cuda(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& o_idx,
                        const at::Tensor& i_idx, const std::optional<at::Tensor>& weights,
                        bool bias, at::TensorList order, const at::Tensor& out) {
  const char* const op = "sampled_outer";
  const c10::cuda::CUDAGuard guard(out.device());
  check_devices(op, out, {x, dy, o_idx, i_idx, weights.value_or(x)});
  const SampledOuterArgs args = sampled_outer_args(x, dy, o_idx, i_idx, weights, bias, out);
  if (out.numel() == 0) return;
  if (args.s == 0) {
    out.zero_();
    return;
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  if (order.size() == 4) {
    sampled_outer_columns(op, args, order, out, stream);
    return;
  }
  TORCH_CHECK_VALUE(order.empty() || order.size() == 3, op,
                    ": order must have the three tensors of a StagedOrder or the four of a "
                    "ColumnOrder");
  std::optional<cuda::StagedOrder> staged;
  if (!order.empty()) staged = staged_order(op, order, args, out);
  const at::Tensor sums = scratch(out, cuda::sampled_outer_scratch(args));
  check_launch(op, cuda::sampled_outer(args, staged ? &*staged : nullptr,
                                       sums.mutable_data_ptr<float>(), stream));
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, DROPINF_CUDA_KEY, m) {
  m.impl("sampled_outer", &sampled_outer_cuda);
}

#endif  // DROPINF_CUDA

}  // namespace

}  // namespace dropinf
