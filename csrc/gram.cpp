// gram: its schema and checks, and how a call is run on each device.

#include "gram.h"

#include "checks.h"
#include "registration.h"
#include "threads.h"
#ifdef DROPINF_CUDA
#include "cuda/calls.h"
#include "cuda/gram.cuh"
#endif

namespace dropinf {
namespace {

TORCH_LIBRARY_FRAGMENT(DROPINF_LIBRARY, m) {
  define(m,
         "gram(Tensor rows, Tensor offsets, float scale, bool accumulate, Tensor(a!) out) -> ()");
}

GramArgs gram_args(const at::Tensor& rows, const at::Tensor& offsets, double scale, bool accumulate,
                   const at::Tensor& out) {
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

#ifndef DROPINF_CUDA_ON_HOST

void gram_cpu(const at::Tensor& rows, const at::Tensor& offsets, double scale, bool accumulate,
              const at::Tensor& out) {
  const GramArgs args = gram_args(rows, offsets, scale, accumulate, out);
  if (out.numel() == 0) return;
  const GramCall call(args);
  run_items(0, call.num_items(), call.total_ns, [&](int64_t k) { call.item(k); });
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, CPU, m) { m.impl("gram", &gram_cpu); }

#endif  // DROPINF_CUDA_ON_HOST

#ifdef DROPINF_CUDA

void gram_cuda(const at::Tensor& rows, const at::Tensor& offsets, double scale, bool accumulate,
               const at::Tensor& out) {
  const char* const op = "gram";
  const c10::cuda::CUDAGuard guard(out.device());
  const GramArgs args = gram_args(rows, offsets, scale, accumulate, out);
  check_devices(op, out, {rows});
  if (out.numel() == 0 || (accumulate && args.n == 0)) return;
  const at::Tensor sums = scratch(out, cuda::gram_scratch(args));
  check_launch(op,
               cuda::gram(args, sums.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, DROPINF_CUDA_KEY, m) { m.impl("gram", &gram_cuda); }

#endif  // DROPINF_CUDA

}  // namespace
}  // namespace dropinf
