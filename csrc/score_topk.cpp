// score_topk: its schema and checks, and how a call is run on CUDA.

#include "checks.h"
#include "registration.h"
#ifdef DROPINF_CUDA
#include "cuda/calls.h"
#include "cuda/score_topk.cuh"
#endif

namespace dropinf {
namespace {

TORCH_LIBRARY_FRAGMENT(DROPINF_LIBRARY, m) {
  define(m, "score_topk(Tensor scores, int first, Tensor(a!) values, Tensor(b!) indices) -> ()");
}

#ifdef DROPINF_CUDA

void score_topk_cuda(const at::Tensor& scores, int64_t first, const at::Tensor& values,
                     const at::Tensor& indices) {
  const char* const op = "score_topk";
  const c10::cuda::CUDAGuard guard(values.device());
  check_devices(op, values, {scores, indices});
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
  check_launch(op, cuda::score_topk(scores.const_data_ptr<float>(), scores.size(0), scores.size(1),
                                    scores.stride(0), first, values.mutable_data_ptr<float>(),
                                    indices.mutable_data_ptr<int64_t>(), k,
                                    c10::cuda::getCurrentCUDAStream()));
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, DROPINF_CUDA_KEY, m) { m.impl("score_topk", &score_topk_cuda); }

#endif  // DROPINF_CUDA

}  // namespace
}  // namespace dropinf
