// gather_grads on CUDA: a thread an entry, in one launch for many gradients.
//
// Floor at L=200, r=1024: an index of 8 bytes, a weight of 4, a sector of 32 and a float out, 10
// MB, 2 µs at 4.3 TB/s; a launch takes longer. Measured on an H200: 8.0 µs in a graph.

#include "cuda/common.cuh"
#include "cuda/gather_grads.cuh"
#include "cuda/layer_table.cuh"

namespace dropinf {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct Grad {
  const void* data;  // null counts as zeros
  const int64_t* idx;
  const float* weights;  // null for ones
  float* out;
  int64_t numel;
  int64_t first;  // entries of the launch before this gradient's
  int32_t s;
  DType dtype;
};

template <int kSize>
struct Grads : LayerTable<Grad, kSize> {
  int64_t num_entries, out_stride;
};

// Few gradients have a small table, as every launch hands all of it over: 3.6 KB instead of 32.
// Predicted: four copies of it on the host, of 28 KB less at 20 GB/s, are 6 us less of some 20; a
// launch takes 8 there, and a gradient 0.7.
constexpr int kFew = 64, kMany = kMostLayers<Grad>;

__device__ float element(const void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::kBFloat16:
      return widen(static_cast<const BFloat16*>(data)[offset]);
    case DType::kFloat16:
      return widen(static_cast<const Float16*>(data)[offset]);
    default:
      return widen(static_cast<const float*>(data)[offset]);
  }
}

// The weighted sum of the elements at offset(position), in their order. Out of range is NaN, unless
// it is left out.
template <typename F>
__device__ float entry_of(const Grad& grad, int64_t k, const F& offset) {
  if (!grad.data) return 0.0f;
  float sum = 0.0f;
  for (int64_t q = k * grad.s; q < (k + 1) * grad.s; ++q) {
    const float weight = grad.weights ? grad.weights[q] : 1.0f;
    if (weight == 0.0f) continue;
    const int64_t position = grad.idx[q];
    const bool good = static_cast<uint64_t>(position) < static_cast<uint64_t>(grad.numel);
    sum += good ? weight * element(grad.data, grad.dtype, offset(position)) : not_a_number();
  }
  return sum;
}

template <int kSize>
__global__ void __launch_bounds__(kThreads) gather_kernel(const Grads<kSize> all) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= all.num_entries) return;
  const Grad& grad = all.layers[all.last_from(n)];
  const int64_t k = n - grad.first;
  grad.out[k * all.out_stride] = entry_of(grad, k, [](int64_t position) { return position; });
}

struct StridedGrad {
  Grad grad;
  int64_t r, out_stride;
  int64_t sizes[kMaxDims], strides[kMaxDims];
  int num_dims;
};

__device__ int64_t offset_of(const StridedGrad& strided, int64_t position) {
  int64_t offset = 0;
  for (int d = strided.num_dims - 1; d >= 0; --d) {
    offset += position % strided.sizes[d] * strided.strides[d];
    position /= strided.sizes[d];
  }
  return offset;
}

__global__ void __launch_bounds__(kThreads) gather_strided_kernel(const StridedGrad strided) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= strided.r) return;
  strided.grad.out[k * strided.out_stride] =
      entry_of(strided.grad, k, [&](int64_t position) { return offset_of(strided, position); });
}

dim3 blocks(int64_t num_entries) { return grid_of(ceil_div<int64_t>(num_entries, kThreads)); }

Grad grad_of(const GradEntries& entries, int64_t first) {
  return {entries.data,
          entries.idx,
          entries.weights,
          entries.out,
          entries.numel,
          first,
          static_cast<int32_t>(entries.s),
          entries.dtype};
}

cudaError_t gather_strided(const GradEntries& entries, cudaStream_t stream) {
  if (entries.num_dims > kMaxDims) return cudaErrorInvalidValue;
  StridedGrad strided{grad_of(entries, 0), entries.r, entries.out_stride, {}, {}, 0};
  strided.num_dims = static_cast<int>(entries.num_dims);
  for (int d = 0; d < strided.num_dims; ++d) {
    strided.sizes[d] = entries.sizes[d];
    strided.strides[d] = entries.strides[d];
  }
  return launch(gather_strided_kernel, blocks(entries.r), kThreads, 0, stream, strided);
}

template <int kSize>
cudaError_t gather_contiguous(const GradEntries* layers, int64_t L, cudaStream_t stream) {
  Grads<kSize> all{};
  for (int64_t l = 0; l < L; ++l) {
    const GradEntries& entries = layers[l];
    if (entries.r > 0 && entries.num_dims == 0) {
      all.add(grad_of(entries, all.num_entries));
      all.num_entries += entries.r;
      all.out_stride = entries.out_stride;
    }
    if (all.full() || (l == L - 1 && all.count > 0)) {
      const cudaError_t error =
          launch(gather_kernel<kSize>, blocks(all.num_entries), kThreads, 0, stream, all);
      if (error != cudaSuccess) return error;
      all.count = 0;
      all.num_entries = 0;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t gather_grads(const GradEntries* layers, int64_t L, cudaStream_t stream) {
  for (int64_t l = 0; l < L; ++l) {
    if (layers[l].s > INT32_MAX) return cudaErrorInvalidValue;
    if (layers[l].r == 0 || layers[l].num_dims == 0) continue;
    const cudaError_t error = gather_strided(layers[l], stream);
    if (error != cudaSuccess) return error;
  }
  return L <= kFew ? gather_contiguous<kFew>(layers, L, stream)
                   : gather_contiguous<kMany>(layers, L, stream);
}

}  // namespace cuda
}  // namespace dropinf
