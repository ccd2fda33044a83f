// The CUDA ops as torch.ops.dropinf_host, for CPU tensors: the same bindings and kernels, with the
// <cuda_runtime.h> beside this file.

#include "cuda/bindings.cpp"

TORCH_LIBRARY(dropinf_host, m) {
  dropinf::define_ops(m);
  m.def("set_max_shared_bytes",
        [](int64_t n) { host_execution::max_shared_bytes = static_cast<int>(n); });
}
TORCH_LIBRARY_IMPL(dropinf_host, CPU, m) { dropinf::implement_cuda_ops(m); }
