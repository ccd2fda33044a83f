// sampled_embedding: its schema and checks, and how a call is run on each device.

#include "sampled_embedding.h"

#include <algorithm>

#include "checks.h"
#include "registration.h"
#include "threads.h"
#ifdef DROPINF_CUDA
#include "cuda/calls.h"
#include "cuda/sampled_embedding.cuh"
#endif

namespace dropinf {
namespace {

TORCH_LIBRARY_FRAGMENT(DROPINF_LIBRARY, m) {
  define(m,
         "sampled_embedding(Tensor ids, Tensor dy, Tensor o_idx, Tensor i_idx, Tensor? weights, "
         "Tensor(a!) out) -> ()");
}

SampledEmbeddingArgs sampled_embedding_args(const at::Tensor& ids, const at::Tensor& dy,
                                            const at::Tensor& o_idx, const at::Tensor& i_idx,
                                            const std::optional<at::Tensor>& weights,
                                            const at::Tensor& out) {
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.scalar_type() == at::kLong && ids.is_contiguous() &&
                        dy.dim() == 3 && dy.size(0) == ids.size(0) && dy.size(1) == ids.size(1) &&
                        unit_stride(dy),
                    "sampled_embedding: ids must be contiguous int64 [B, T] and dy [B, T, O] with "
                    "stride 1 in O, got ",
                    ids.scalar_type(), " ", ids.sizes(), " and ", dy.sizes());
  check_coordinates("sampled_embedding", o_idx, i_idx);
  SampledEmbeddingArgs args;
  args.r = o_idx.numel();
  check_out("sampled_embedding", out, ids.size(0), args.r);
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
  args.weights = weights_of("sampled_embedding", weights, o_idx.sizes());
  args.out = out.mutable_data_ptr<float>();
  args.out_stride_b = out.stride(0);
  args.out_stride_k = out.stride(1);
  return args;
}

#ifndef DROPINF_CUDA_ON_HOST

// Rough times of one token's search and of one entry: they only decide when a thread pays.
constexpr double kSearchNs = 20;
constexpr double kZeroNs = 0.5;

void sampled_embedding_cpu(const at::Tensor& ids, const at::Tensor& dy, const at::Tensor& o_idx,
                           const at::Tensor& i_idx, const std::optional<at::Tensor>& weights,
                           const at::Tensor& out) {
  const SampledEmbeddingArgs args = sampled_embedding_args(ids, dy, o_idx, i_idx, weights, out);
  check_range("sampled_embedding", "o_idx", o_idx, args.O, "O=", args.O);
  TORCH_CHECK_VALUE(std::is_sorted(args.i_idx, args.i_idx + args.r),
                    "sampled_embedding: i_idx must be sorted");
  TORCH_CHECK_INDEX(args.r == 0 || args.i_idx[0] >= 0,
                    "sampled_embedding: i_idx is out of range, it has negative tokens");
  if (out.numel() == 0) return;
  at::parallel_for(0, args.B, grain(kSearchNs * args.T + kZeroNs * args.r),
                   [&](int64_t begin, int64_t end) { sampled_embedding_rows(args, begin, end); });
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, CPU, m) { m.impl("sampled_embedding", &sampled_embedding_cpu); }

#endif  // DROPINF_CUDA_ON_HOST

#ifdef DROPINF_CUDA

void sampled_embedding_cuda(const at::Tensor& ids, const at::Tensor& dy, const at::Tensor& o_idx,
                            const at::Tensor& i_idx, const std::optional<at::Tensor>& weights,
                            const at::Tensor& out) {
  const char* const op = "sampled_embedding";
  const c10::cuda::CUDAGuard guard(out.device());
  check_devices(op, out, {ids, dy, o_idx, i_idx, weights.value_or(dy)});
  const SampledEmbeddingArgs args = sampled_embedding_args(ids, dy, o_idx, i_idx, weights, out);
  check_launch(op, cuda::sampled_embedding(args, c10::cuda::getCurrentCUDAStream()));
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, DROPINF_CUDA_KEY, m) {
  m.impl("sampled_embedding", &sampled_embedding_cuda);
}

#endif  // DROPINF_CUDA

}  // namespace

}  // namespace dropinf
