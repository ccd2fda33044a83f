// score_topk: its schema and checks, and how a call is run on each device.

#include "score_topk.h"

#include "checks.h"
#include "registration.h"
#include "threads.h"
#ifdef DROPINF_CUDA
#include "cuda/calls.h"
#include "cuda/score_topk.cuh"
#endif

namespace dropinf {
namespace {

TORCH_LIBRARY_FRAGMENT(DROPINF_LIBRARY, m) {
  define(m, "score_topk(Tensor scores, int first, Tensor(a!) values, Tensor(b!) indices) -> ()");
}

ScoreTopkArgs score_topk_args(const at::Tensor& scores, int64_t first, const at::Tensor& values,
                              const at::Tensor& indices) {
  TORCH_CHECK_VALUE(scores.scalar_type() == at::kFloat && scores.dim() == 2 &&
                        unit_stride(scores) && values.scalar_type() == at::kFloat &&
                        indices.scalar_type() == at::kLong && values.dim() == 2 &&
                        values.size(0) == scores.size(0) && values.sizes() == indices.sizes() &&
                        values.is_contiguous() && indices.is_contiguous(),
                    "score_topk: scores must be float32 [m, c] with stride 1 in c, values float32 "
                    "and indices int64 contiguous [m, k], got ",
                    scores.sizes(), ", ", values.sizes(), " and ", indices.sizes());
  ScoreTopkArgs args;
  args.scores = scores.const_data_ptr<float>();
  args.m = scores.size(0);
  args.c = scores.size(1);
  args.scores_stride = scores.stride(0);
  args.first = first;
  args.values = values.mutable_data_ptr<float>();
  args.indices = indices.mutable_data_ptr<int64_t>();
  args.k = values.size(1);
  return args;
}

#ifndef DROPINF_CUDA_ON_HOST

void score_topk_cpu(const at::Tensor& scores, int64_t first, const at::Tensor& values,
                    const at::Tensor& indices) {
  const ScoreTopkArgs args = score_topk_args(scores, first, values, indices);
  if (values.numel() == 0 || scores.numel() == 0) return;
  // 2-core Xeon with AVX2, 2026-11.
  const double ns = static_cast<double>(args.m) * (1000.0 + 0.15 * static_cast<double>(args.c));
  run_items(0, args.m, ns, [&](int64_t q) { score_topk_queries(args, q, q + 1); });
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, CPU, m) { m.impl("score_topk", &score_topk_cpu); }

#endif  // DROPINF_CUDA_ON_HOST

#ifdef DROPINF_CUDA

void score_topk_cuda(const at::Tensor& scores, int64_t first, const at::Tensor& values,
                     const at::Tensor& indices) {
  const char* const op = "score_topk";
  const c10::cuda::CUDAGuard guard(values.device());
  check_devices(op, values, {scores, indices});
  const ScoreTopkArgs args = score_topk_args(scores, first, values, indices);
  TORCH_CHECK_VALUE(args.k <= cuda::kMaxTopk, op, ": backend 'cuda' takes k up to ", cuda::kMaxTopk,
                    ", got ", args.k, "; backend='reference' takes any");
  if (values.numel() == 0 || scores.numel() == 0) return;
  int64_t num_parts = 1;
  check_launch(op, cuda::score_topk_parts(args, &num_parts));
  const at::Tensor kept = scratch(values, cuda::score_topk_scratch(args, num_parts));
  check_launch(op, cuda::score_topk(args, num_parts, kept.mutable_data_ptr<float>(),
                                    c10::cuda::getCurrentCUDAStream()));
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, DROPINF_CUDA_KEY, m) { m.impl("score_topk", &score_topk_cuda); }

#endif  // DROPINF_CUDA

}  // namespace
}  // namespace dropinf
