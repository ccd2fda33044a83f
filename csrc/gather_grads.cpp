// gather_grads: its schema and checks, and how a call is run on each device.

#include "gather_grads.h"

#include <ATen/core/List.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "checks.h"
#include "registration.h"
#include "threads.h"
#ifdef DROPINF_CUDA
#include "cuda/calls.h"
#include "cuda/gather_grads.cuh"
#endif

namespace dropinf {
namespace {

TORCH_LIBRARY_FRAGMENT(DROPINF_LIBRARY, m) {
  define(m,
         "gather_grads(Tensor?[] grads, Tensor[] indices, Tensor? weights, Tensor(a!) out) -> ()");
}

// A tensor in a list, as one whose memory holds its numbers. Negated and conjugate views, and zeros
// without memory, torch resolves for other arguments, but not in lists of optional tensors.
at::Tensor resolved(const at::Tensor& tensor) {
  return tensor._is_zerotensor() ? at::zeros(tensor.sizes(), tensor.options())
                                 : tensor.resolve_neg();
}

// The gradients of gather_grads, with the tensors that the entries point into.
struct GatherCall {
  std::vector<at::Tensor> kept, positions;
  std::vector<GradEntries> layers;
  // [L + 1] of each layer's terms among those of all sums, where an empty sum counts as a zero.
  std::vector<int64_t> offsets;
};

GatherCall gather_call(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList indices,
                       const std::optional<at::Tensor>& weights, const at::Tensor& out) {
  const int64_t L = indices.size();
  TORCH_CHECK_VALUE(static_cast<int64_t>(grads.size()) == L,
                    "gather_grads: grads and indices must be equally long, got ", grads.size(),
                    " and ", L);
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat && out.dim() == 1,
                    "gather_grads: out must be float32 [R], got ", out.scalar_type(), " ",
                    out.sizes());
  GatherCall call;
  auto& [kept, positions, layers, offsets] = call;
  kept.resize(L), positions.resize(L), layers.resize(L), offsets.resize(L + 1);
  int64_t R = 0, N = 0;
  for (int64_t l = 0; l < L; ++l) {
    TORCH_CHECK_VALUE(
        indices[l].scalar_type() == at::kLong && (indices[l].dim() == 1 || indices[l].dim() == 2),
        "gather_grads: indices[", l, "] must be int64 [r] or [r, s], got ", indices[l].sizes());
    const at::Tensor& index = positions[l] = indices[l].contiguous();
    GradEntries& entries = layers[l];
    entries = GradEntries{};
    entries.idx = index.const_data_ptr<int64_t>();
    entries.r = index.sizes()[0];
    entries.s = index.dim() == 2 ? index.sizes()[1] : 1;
    R += entries.r;
    N += entries.r * entries.s;
    offsets[l + 1] = offsets[l] + entries.r * std::max<int64_t>(entries.s, 1);
    std::optional<at::Tensor> grad = grads.get(l);
    if (!grad || !grad->defined()) continue;
    TORCH_CHECK_VALUE(grad->layout() == at::kStrided, "gather_grads: grads[", l, "] is ",
                      grad->layout(), ", not dense");
    TORCH_CHECK_VALUE(!grad->requires_grad() || !at::GradMode::is_enabled(), "gather_grads: grads[",
                      l, "] requires grad");
    const at::Tensor& g = kept[l] = resolved(*grad);
    entries.dtype = dtype_of(g);
    entries.numel = g.numel();
    TORCH_CHECK_INDEX(entries.numel > 0 || index.numel() == 0, "gather_grads: indices[", l,
                      "] has an index out of range for a gradient of 0 elements");
    if (index.numel() == 0) continue;  // zeros, if there are entries
    entries.data = g.const_data_ptr();
    if (!g.is_contiguous()) {
      entries.num_dims = g.dim();
      entries.sizes = g.sizes().data();
      entries.strides = g.strides().data();
    }
  }
  TORCH_CHECK_VALUE(out.numel() == R, "gather_grads: out must have the ", R,
                    " entries of all indices, got ", out.numel());
  float* data = out.mutable_data_ptr<float>();
  const int64_t out_stride = out.stride(0);
  const float* packed = weights_of("gather_grads", weights, {N});
  for (GradEntries& entries : layers) {
    if (packed) {
      entries.weights = packed;
      packed += entries.r * entries.s;
    }
    entries.out = data;
    entries.out_stride = out_stride;
    data += entries.r * out_stride;
  }
  return call;
}

#ifndef DROPINF_CUDA_ON_HOST

// The entries of a layer that begin before its term n; an entry has s terms.
int64_t entries_before(int64_t n, int64_t s) { return s <= 1 ? n : (n + s - 1) / s; }

void gather_grads_cpu(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList indices,
                      const std::optional<at::Tensor>& weights, const at::Tensor& out) {
  const GatherCall call = gather_call(grads, indices, weights, out);
  const std::vector<int64_t>& offsets = call.offsets;
  const int64_t L = call.layers.size();
  std::atomic<int64_t> bad{-1};  // a layer with an index out of range
  // Threads share the terms; an entry goes with its first one.
  at::parallel_for(0, offsets[L], grain(5.0), [&](int64_t begin, int64_t end) {
    int64_t l = std::upper_bound(offsets.begin(), offsets.end(), begin) - offsets.begin() - 1;
    for (; l < L && offsets[l] < end; ++l) {
      const GradEntries& entries = call.layers[l];
      const int64_t k_begin = entries_before(std::max(begin, offsets[l]) - offsets[l], entries.s);
      const int64_t k_end = entries_before(std::min(end, offsets[l + 1]) - offsets[l], entries.s);
      if (!gather_entries(entries, k_begin, k_end)) bad = l;
    }
  });
  TORCH_CHECK_INDEX(bad < 0, "gather_grads: indices[", bad.load(),
                    "] has an index out of range for a gradient of ",
                    call.layers[std::max<int64_t>(bad, 0)].numel, " elements");
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, CPU, m) { m.impl("gather_grads", &gather_grads_cpu); }

#endif  // DROPINF_CUDA_ON_HOST

#ifdef DROPINF_CUDA

void gather_grads_cuda(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList indices,
                       const std::optional<at::Tensor>& weights, const at::Tensor& out) {
  const char* const op = "gather_grads";
  const c10::cuda::CUDAGuard guard(out.device());
  GatherCall call = gather_call(grads, indices, weights, out);
  check_devices(op, out, call.positions);
  check_devices(op, out, call.kept);
  if (weights) check_devices(op, out, {*weights});
  for (size_t l = 0; l < call.layers.size(); ++l) {
    GradEntries& entries = call.layers[l];
    if (entries.num_dims <= cuda::kMaxDims) continue;
    call.kept[l] = call.kept[l].contiguous();
    entries.data = call.kept[l].const_data_ptr();
    entries.num_dims = 0;
  }
  check_launch(op, cuda::gather_grads(call.layers.data(), call.layers.size(),
                                      c10::cuda::getCurrentCUDAStream()));
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, DROPINF_CUDA_KEY, m) {
  m.impl("gather_grads", &gather_grads_cuda);
}

#endif  // DROPINF_CUDA

}  // namespace
}  // namespace dropinf
