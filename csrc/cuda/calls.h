// What the ops share on CUDA: checks, and scratch from torch's allocator. For the files that
// include torch; a call runs on the current stream of the device of `out`.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

namespace dropinf {

inline void check_launch(const char* op, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, op,
              ": the CUDA kernel did not launch: ", cudaGetErrorString(error));
}

inline void check_devices(const char* op, const at::Tensor& out, at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK_VALUE(!tensor.defined() || tensor.device() == out.device(), op,
                      ": all tensors must be on ", out.device(), ", got one on ", tensor.device());
  }
}

// Its pointer is null where it has no floats.
inline at::Tensor scratch(const at::Tensor& out, int64_t num_floats) {
  return at::empty({num_floats}, out.options().dtype(at::kFloat));
}

}  // namespace dropinf
