// What the tests set of torch.ops.dropinf_host, the CUDA ops for CPU tensors: see registration.h.

#include <cuda_runtime.h>
#include <torch/library.h>

#include "cuda/score_topk.cuh"

TORCH_LIBRARY_FRAGMENT(dropinf_host, m) {
  m.def("set_max_shared_bytes",
        [](int64_t n) { host_execution::max_shared_bytes = static_cast<int>(n); });
  m.def("set_num_sms", [](int64_t n) { host_execution::num_sms = static_cast<int>(n); });
  m.def("score_topk_parts", [](int64_t m, int64_t c, int64_t k) {
    dropinf::ScoreTopkArgs args{};
    args.m = m, args.c = c, args.k = k;
    int64_t num_parts = 0;
    TORCH_CHECK(dropinf::cuda::score_topk_parts(args, &num_parts) == cudaSuccess);
    return num_parts;
  });
}
