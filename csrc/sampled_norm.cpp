// sampled_norm: its schema and checks, and how a call is run on CUDA. Captures on a CPU normalise
// with torch and take sampled_outer.

#include "sampled_norm.h"

#include "checks.h"
#include "registration.h"
#ifdef DROPINF_CUDA
#include "cuda/calls.h"
#include "cuda/sampled_norm.cuh"
#endif

namespace dropinf {
namespace {

TORCH_LIBRARY_FRAGMENT(DROPINF_LIBRARY, m) {
  define(m,
         "sampled_norm(Tensor x, Tensor dy, Tensor index, Tensor? weights, bool rms, float eps, "
         "Tensor(a!) out) -> ()");
}

#ifdef DROPINF_CUDA

void sampled_norm_cuda(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& index,
                       const std::optional<at::Tensor>& weights, bool rms, double eps,
                       const at::Tensor& out) {
  const char* const op = "sampled_norm";
  const c10::cuda::CUDAGuard guard(out.device());
  check_devices(op, out, {x, dy, index, weights.value_or(x)});
  TORCH_CHECK_VALUE(x.dim() == 3 && dy.sizes() == x.sizes() &&
                        x.scalar_type() == dy.scalar_type() && unit_stride(x) && unit_stride(dy) &&
                        x.size(2) <= kInt32Max / 2,
                    op, ": x and dy must be [B, T, I] of one dtype with stride 1 in I, got ",
                    x.scalar_type(), " ", x.sizes(), " and ", dy.scalar_type(), " ", dy.sizes());
  TORCH_CHECK_VALUE(index.scalar_type() == at::kInt && index.is_contiguous() &&
                        (index.dim() == 1 || index.dim() == 2),
                    op, ": index must be contiguous int32 [r] or [r, s], got ", index.scalar_type(),
                    " ", index.sizes());
  SampledNormArgs args;
  args.dtype = dtype_of(x);
  args.x = x.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.B = x.size(0);
  args.T = x.size(1);
  args.I = x.size(2);
  args.x_stride_b = x.stride(0);
  args.x_stride_t = x.stride(1);
  args.dy_stride_b = dy.stride(0);
  args.dy_stride_t = dy.stride(1);
  args.index = index.const_data_ptr<int32_t>();
  args.weights = weights_of(op, weights, index.sizes());
  args.r = index.size(0);
  args.s = index.dim() == 2 ? index.size(1) : 1;
  args.rms = rms;
  args.eps = static_cast<float>(eps);
  check_out(op, out, args.B, args.r);
  args.out = out.mutable_data_ptr<float>();
  args.out_stride_b = out.stride(0);
  args.out_stride_k = out.stride(1);
  const at::Tensor sums = scratch(out, cuda::sampled_norm_scratch(args));
  check_launch(op, cuda::sampled_norm(args, sums.mutable_data_ptr<float>(),
                                      c10::cuda::getCurrentCUDAStream()));
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, DROPINF_CUDA_KEY, m) {
  m.impl("sampled_norm", &sampled_norm_cuda);
}

#endif  // DROPINF_CUDA

}  // namespace

}  // namespace dropinf
