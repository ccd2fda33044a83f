// The ops on CUDA tensors: checks, scratch from torch's allocator, the launch on the current
// stream.

#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"
#include "cuda/cuda_launchers.h"
#include "ops.h"

namespace dropinf {
namespace {

void check(const char* op, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, op,
              ": the CUDA kernel did not launch: ", cudaGetErrorString(error));
}

void same_device(const char* op, const at::Tensor& out, at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK_VALUE(!tensor.defined() || tensor.device() == out.device(), op,
                      ": all tensors must be on ", out.device(), ", got one on ", tensor.device());
  }
}

void gather_grads(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList indices,
                  at::ArrayRef<double> scales, const at::Tensor& out) {
  const char* const op = "gather_grads";
  const c10::cuda::CUDAGuard guard(out.device());
  GatherCall call = gather_call(grads, indices, scales, out);
  same_device(op, out, call.positions);
  same_device(op, out, call.kept);
  for (size_t l = 0; l < call.layers.size(); ++l) {
    GradEntries& entries = call.layers[l];
    if (entries.num_dims <= cuda::kMaxDims) continue;
    call.kept[l] = call.kept[l].contiguous();
    entries.data = call.kept[l].const_data_ptr();
    entries.num_dims = 0;
  }
  check(op, cuda::gather_grads(call.layers.data(), call.layers.size(),
                               c10::cuda::getCurrentCUDAStream()));
}

void sampled_embedding(const at::Tensor& ids, const at::Tensor& dy, const at::Tensor& o_idx,
                       const at::Tensor& i_idx, double scale, const at::Tensor& out) {
  const char* const op = "sampled_embedding";
  const c10::cuda::CUDAGuard guard(out.device());
  same_device(op, out, {ids, dy, o_idx, i_idx});
  const SampledEmbeddingArgs args = sampled_embedding_args(ids, dy, o_idx, i_idx, scale, out);
  check(op, cuda::sampled_embedding(args, c10::cuda::getCurrentCUDAStream()));
}

void sampled_conv(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& o_idx,
                  const at::Tensor& i_idx, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool bias,
                  double scale, const at::Tensor& out) {
  const char* const op = "sampled_conv";
  const c10::cuda::CUDAGuard guard(out.device());
  same_device(op, out, {x, dy, o_idx, i_idx});
  const SampledConvArgs args = sampled_conv_args(x, dy, o_idx, i_idx, kernel_size, stride, padding,
                                                 dilation, groups, bias, scale, out);
  check(op, cuda::sampled_conv(args, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

void implement_cuda_ops(torch::Library& m) {
  m.impl("gather_grads", &gather_grads);
  m.impl("sampled_embedding", &sampled_embedding);
  m.impl("sampled_conv", &sampled_conv);
}

}  // namespace dropinf
