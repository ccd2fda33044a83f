// sampled_conv: its schema and checks, and how a call is run on each device.

#include "sampled_conv.h"

#include <algorithm>
#include <memory>

#include "checks.h"
#include "registration.h"
#include "threads.h"
#ifdef DROPINF_CUDA
#include "cuda/calls.h"
#include "cuda/sampled_conv.cuh"
#endif

namespace dropinf {
namespace {

TORCH_LIBRARY_FRAGMENT(DROPINF_LIBRARY, m) {
  define(m,
         "sampled_conv(Tensor x, Tensor dy, Tensor o_idx, Tensor i_idx, int[] kernel_size, "
         "int[] stride, int[] padding, int[] dilation, int groups, bool bias, Tensor? weights, "
         "Tensor(a!) out) -> ()");
}

// The values of one argument of sampled_conv, behind `fill` for the dimensions that are missing.
void spatial(const char* name, at::IntArrayRef values, int64_t num_dims, int64_t least,
             int64_t fill, int64_t* to) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(values.size()) == num_dims, "sampled_conv: ", name,
                    " must be ", num_dims, " ints, got ", values);
  std::fill_n(to, 3, fill);
  for (int64_t d = 0; d < num_dims; ++d) {
    TORCH_CHECK_VALUE(values[d] >= least && values[d] <= kInt32Max, "sampled_conv: ", name,
                      " must be ints from ", least, " to ", kInt32Max, ", got ", values);
    to[3 - num_dims + d] = values[d];
  }
}

// x and dy are the ones that the pointers are to: the caller may have copied them.
SampledConvArgs sampled_conv_args(const at::Tensor& x, const at::Tensor& dy,
                                  const at::Tensor& o_idx, const at::Tensor& i_idx,
                                  at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                  bool bias, const std::optional<at::Tensor>& weights,
                                  const at::Tensor& out) {
  const int64_t num_dims = x.dim() - 2;
  TORCH_CHECK_VALUE(num_dims >= 1 && num_dims <= 3 && dy.dim() == x.dim() &&
                        x.size(0) == dy.size(0) && x.scalar_type() == dy.scalar_type(),
                    "sampled_conv: x must be [B, C, *S] and dy [B, O, *S'] of one dtype, got ",
                    x.scalar_type(), " ", x.sizes(), " and ", dy.scalar_type(), " ", dy.sizes());
  check_coordinates("sampled_conv", o_idx, i_idx);
  SampledConvArgs args;
  args.B = x.size(0);
  args.C = x.size(1);
  args.O = dy.size(1);
  args.groups = groups;
  TORCH_CHECK_VALUE(groups >= 1 && args.C % groups == 0 && args.O % groups == 0,
                    "sampled_conv: groups must divide C=", args.C, " and O=", args.O, ", got ",
                    groups);
  spatial("kernel_size", kernel_size, num_dims, 1, 1, args.kernel_size);
  spatial("stride", stride, num_dims, 1, 1, args.stride);
  spatial("padding", padding, num_dims, 0, 0, args.padding);
  spatial("dilation", dilation, num_dims, 1, 1, args.dilation);
  int64_t taps = 1;
  for (const int64_t size : args.kernel_size) {
    TORCH_CHECK_VALUE(taps <= kInt32Max / size, "sampled_conv: kernel_size ", kernel_size,
                      " is too large");
    taps *= size;
  }
  TORCH_CHECK_VALUE(args.C / groups < kInt32Max / taps, "sampled_conv: C=", args.C,
                    " and kernel_size ", kernel_size, " are too large for int32 indices");
  args.I = args.C / groups * taps;
  args.r = o_idx.numel();
  check_out("sampled_conv", out, args.B, args.r);
  args.o_idx = o_idx.const_data_ptr<int32_t>();
  args.i_idx = i_idx.const_data_ptr<int32_t>();
  args.dtype = dtype_of(x);
  args.x = x.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.x_stride_b = x.stride(0);
  args.x_stride_c = x.stride(1);
  args.dy_stride_b = dy.stride(0);
  args.dy_stride_c = dy.stride(1);
  for (int64_t d = 0; d < 3; ++d) {
    const int64_t from = d - 3 + x.dim();
    const bool there = from >= 2;
    args.x_size[d] = there ? x.size(from) : 1;
    args.dy_size[d] = there ? dy.size(from) : 1;
    args.x_stride[d] = there ? x.stride(from) : 0;
    args.dy_stride[d] = there ? dy.stride(from) : 0;
  }
  args.bias = bias;
  args.weights = weights_of("sampled_conv", weights, o_idx.sizes());
  args.out = out.mutable_data_ptr<float>();
  args.out_stride_b = out.stride(0);
  args.out_stride_k = out.stride(1);
  return args;
}

#ifndef DROPINF_CUDA_ON_HOST

void sampled_conv_cpu(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& o_idx,
                      const at::Tensor& i_idx, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool bias,
                      const std::optional<at::Tensor>& weights, const at::Tensor& out) {
  // Strided rows, as of channels_last, cost several times contiguous ones: they are copied unless
  // less is read of them than there is.
  const auto with_rows = [&](const at::Tensor& tensor) {
    const bool empty = tensor.dim() < 3 || tensor.numel() == 0 || dy.numel() == 0;
    if (empty || tensor.stride(-1) == 1 || tensor.size(-1) == 1) return tensor;
    const int64_t outputs = dy.numel() / (dy.size(0) * dy.size(1));
    const bool in_place = o_idx.numel() * outputs <= tensor.numel() / tensor.size(0);
    return in_place ? tensor : tensor.contiguous();
  };
  const at::Tensor x_rows = with_rows(x), dy_rows = with_rows(dy);
  const SampledConvArgs args = sampled_conv_args(x_rows, dy_rows, o_idx, i_idx, kernel_size, stride,
                                                 padding, dilation, groups, bias, weights, out);
  check_range("sampled_conv", "o_idx", o_idx, args.O, "O=", args.O);
  check_range("sampled_conv", "i_idx", i_idx, args.I + bias,
              "C / groups * prod(kernel_size)=", args.I, bias ? " and the bias" : "");
  if (out.numel() == 0) return;
  if (dy.numel() == 0) {
    out.zero_();
    return;
  }
  const int64_t r = args.r;
  const std::unique_ptr<const SampledConv> call = SampledConv::make(args);
  at::parallel_for(0, args.B * r, grain(call->entry_ns), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / r, k = begin % r, count = std::min(r - k, end - begin);
      call->entries(b, k, k + count);
      begin += count;
    }
  });
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, CPU, m) { m.impl("sampled_conv", &sampled_conv_cpu); }

#endif  // DROPINF_CUDA_ON_HOST

#ifdef DROPINF_CUDA

void sampled_conv_cuda(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& o_idx,
                       const at::Tensor& i_idx, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool bias,
                       const std::optional<at::Tensor>& weights, const at::Tensor& out) {
  const char* const op = "sampled_conv";
  const c10::cuda::CUDAGuard guard(out.device());
  check_devices(op, out, {x, dy, o_idx, i_idx, weights.value_or(x)});
  const SampledConvArgs args = sampled_conv_args(x, dy, o_idx, i_idx, kernel_size, stride, padding,
                                                 dilation, groups, bias, weights, out);
  check_launch(op, cuda::sampled_conv(args, c10::cuda::getCurrentCUDAStream()));
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, DROPINF_CUDA_KEY, m) {
  m.impl("sampled_conv", &sampled_conv_cuda);
}

#endif  // DROPINF_CUDA

}  // namespace

}  // namespace dropinf
