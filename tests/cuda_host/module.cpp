// The CUDA ops as torch.ops.dropinf_host, for CPU tensors: the same bindings and kernels, with the
// <cuda_runtime.h> beside this file.

#include "cuda/bindings.cpp"

TORCH_LIBRARY(dropinf_host, m) { dropinf::define_ops(m); }
TORCH_LIBRARY_IMPL(dropinf_host, CPU, m) { dropinf::implement_cuda_ops(m); }
