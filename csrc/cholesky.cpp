// damped_cholesky and cholesky_solve: their schemas and checks, and how a call is run on each
// device.

#include "cholesky.h"

#include <algorithm>
#include <functional>

#include "checks.h"
#include "registration.h"
#include "threads.h"
#ifdef DROPINF_CUDA
#include "cuda/calls.h"
#include "cuda/cholesky.cuh"
#endif

namespace dropinf {
namespace {

TORCH_LIBRARY_FRAGMENT(DROPINF_LIBRARY, m) {
  define(m,
         "damped_cholesky(Tensor matrices, Tensor offsets, Tensor shift, Tensor? rows, "
         "Tensor(a!) out, Tensor(b!) info, Tensor(c!)? solved) -> ()");
  define(m, "cholesky_solve(Tensor factors, Tensor offsets, Tensor rows, Tensor(a!) out) -> ()");
}

CholeskyArgs damped_cholesky_args(const at::Tensor& matrices, const at::Tensor& offsets,
                                  const at::Tensor& shift, const std::optional<at::Tensor>& rows,
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

CholeskyArgs cholesky_solve_args(const at::Tensor& factors, const at::Tensor& offsets,
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

#ifndef DROPINF_CUDA_ON_HOST

// A layer must have this much to do for its rows to be shared out.
constexpr double kSharedNs = 100e3;

// An item that would keep one thread busy while the others are done is shared by all of them.
void run(const CholeskyArgs& args) {
  const int64_t threads = num_threads();
  const CholeskyCall call(args);
  const int64_t num_items = call.num_items();
  int64_t shared = 0;
  double rest_ns = call.total_ns;
  while (threads > 1 && shared < num_items && call.item_ns(shared) > kSharedNs &&
         call.item_ns(shared) * threads > 0.5 * rest_ns) {
    rest_ns -= call.item_ns(shared++);
  }
  if (shared > 0) {
    Team team;
    const Share share = [&](int64_t count, const std::function<void(int64_t, int64_t)>& f) {
      team.share(count, f);
    };
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      if (begin > 0) return team.help();
      const struct End {
        ~End() { team.end(); }
        Team& team;
      } end{team};
      for (int64_t k = 0; k < shared; ++k) call.item(k, &share);
    });
  }
  run_items(shared, num_items, rest_ns, [&](int64_t k) { call.item(k, nullptr); });
}

void damped_cholesky_cpu(const at::Tensor& matrices, const at::Tensor& offsets,
                         const at::Tensor& shift, const std::optional<at::Tensor>& rows,
                         const at::Tensor& out, const at::Tensor& info,
                         const std::optional<at::Tensor>& solved) {
  const CholeskyArgs args = damped_cholesky_args(matrices, offsets, shift, rows, out, info, solved);
  std::fill_n(args.info, args.L, 0);
  run(args);
}

void cholesky_solve_cpu(const at::Tensor& factors, const at::Tensor& offsets,
                        const at::Tensor& rows, const at::Tensor& out) {
  const CholeskyArgs args = cholesky_solve_args(factors, offsets, rows, out);
  if (out.numel() > 0) run(args);
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, CPU, m) {
  m.impl("damped_cholesky", &damped_cholesky_cpu);
  m.impl("cholesky_solve", &cholesky_solve_cpu);
}

#endif  // DROPINF_CUDA_ON_HOST

#ifdef DROPINF_CUDA

void damped_cholesky_cuda(const at::Tensor& matrices, const at::Tensor& offsets,
                          const at::Tensor& shift, const std::optional<at::Tensor>& rows,
                          const at::Tensor& out, const at::Tensor& info,
                          const std::optional<at::Tensor>& solved) {
  const char* const op = "damped_cholesky";
  const c10::cuda::CUDAGuard guard(out.device());
  const CholeskyArgs args = damped_cholesky_args(matrices, offsets, shift, rows, out, info, solved);
  check_devices(op, out, {matrices, shift, info});
  if (rows) check_devices(op, out, {*rows, *solved});
  check_launch(op, cuda::cholesky(args, c10::cuda::getCurrentCUDAStream()));
}

void cholesky_solve_cuda(const at::Tensor& factors, const at::Tensor& offsets,
                         const at::Tensor& rows, const at::Tensor& out) {
  const char* const op = "cholesky_solve";
  const c10::cuda::CUDAGuard guard(out.device());
  const CholeskyArgs args = cholesky_solve_args(factors, offsets, rows, out);
  check_devices(op, out, {factors, rows});
  if (out.numel() == 0) return;
  check_launch(op, cuda::cholesky(args, c10::cuda::getCurrentCUDAStream()));
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, DROPINF_CUDA_KEY, m) {
  m.impl("damped_cholesky", &damped_cholesky_cuda);
  m.impl("cholesky_solve", &cholesky_solve_cuda);
}

#endif  // DROPINF_CUDA

}  // namespace
}  // namespace dropinf
