// gather_grads on CUDA: a thread an entry. The L base pointers travel as kernel arguments, so that
// nothing is copied to the device first and a CUDA graph can replay the launch.
//
// Floor at L=200, r=1024: an index of 8 bytes, a sector of 32 and a float out, 9 MB, 2 µs at
// 4.3 TB/s; a launch takes longer (predicted, not measured).

#include "cuda/common.cuh"
#include "cuda/gather_grads.cuh"

namespace dropinf {
namespace cuda {
namespace {

constexpr int kThreads = 256;
// Of the 32,764 bytes of arguments that a kernel may have (CUDA 12.1 and later): 640 gradients, 480
// with signs.
constexpr size_t kGradsBytes = 30720;

struct Grad {
  const void* data;  // null counts as zeros
  const int64_t* idx;
  float* out;
  int64_t numel;
  int64_t first;  // entries of the launch before this gradient's
  float scale;
  DType dtype;
};

// A type of its own, because the gradients of a launch without signs are to be many.
struct SignedGrad : Grad {
  const int8_t* signs;
  int64_t s;
};

template <typename G>
struct Grads {
  static constexpr int kMax = kGradsBytes / sizeof(G);
  G grads[kMax];
  int64_t num_entries, out_stride;
  int count;
};

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

__device__ bool in_range(int64_t position, int64_t numel) {
  return static_cast<uint64_t>(position) < static_cast<uint64_t>(numel);
}

__device__ float entry_of(const Grad& grad, int64_t k) {
  if (!grad.data) return 0.0f;
  const int64_t position = grad.idx[k];
  return in_range(position, grad.numel) ? element(grad.data, grad.dtype, position) : not_a_number();
}

// The signed sum of the s elements at offset(position), in their order. Out of range is NaN, with a
// sign of 0 too, and so is what is no sign.
template <typename F>
__device__ float signed_sum(const Grad& grad, const int8_t* signs, int64_t s, int64_t k,
                            const F& offset) {
  float sum = 0.0f;
  for (int64_t j = k * s; j < (k + 1) * s; ++j) {
    const int64_t position = grad.idx[j];
    const float sign = static_cast<float>(signs[j]);
    if (!in_range(position, grad.numel) || !is_sign(sign)) {
      sum = not_a_number();
    } else if (sign != 0.0f) {
      sum += sign * element(grad.data, grad.dtype, offset(position));
    }
  }
  return sum;
}

__device__ float entry_of(const SignedGrad& grad, int64_t k) {
  if (!grad.data) return 0.0f;
  return signed_sum(grad, grad.signs, grad.s, k, [](int64_t position) { return position; });
}

template <typename G>
__global__ void __launch_bounds__(kThreads) gather_kernel(const Grads<G> all) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= all.num_entries) return;
  int low = 0, high = all.count - 1;  // the last gradient with first <= n
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (all.grads[middle].first <= n) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const G& grad = all.grads[low];
  const int64_t k = n - grad.first;
  grad.out[k * all.out_stride] = grad.scale * entry_of(grad, k);
}

struct StridedGrad {
  SignedGrad grad;  // signs may be null
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
  const SignedGrad& grad = strided.grad;
  float value;
  if (grad.signs) {
    value = signed_sum(grad, grad.signs, grad.s, k,
                       [&](int64_t position) { return offset_of(strided, position); });
  } else {
    const int64_t at = grad.idx[k];
    value = in_range(at, grad.numel) ? element(grad.data, grad.dtype, offset_of(strided, at))
                                     : not_a_number();
  }
  grad.out[k * strided.out_stride] = grad.scale * value;
}

dim3 blocks(int64_t num_entries) { return grid_of(ceil_div<int64_t>(num_entries, kThreads)); }

Grad grad_of(const GradEntries& entries, int64_t first) {
  return {entries.data, entries.idx,   entries.out,  entries.numel,
          first,        entries.scale, entries.dtype};
}

void fill(const GradEntries& entries, int64_t first, Grad& grad) { grad = grad_of(entries, first); }

void fill(const GradEntries& entries, int64_t first, SignedGrad& grad) {
  grad = {grad_of(entries, first), entries.signs, entries.s};
}

cudaError_t gather_strided(const GradEntries& entries, cudaStream_t stream) {
  if (entries.num_dims > kMaxDims) return cudaErrorInvalidValue;
  StridedGrad strided{
      {grad_of(entries, 0), entries.signs, entries.s}, entries.r, entries.out_stride, {}, {}, 0};
  strided.num_dims = static_cast<int>(entries.num_dims);
  for (int d = 0; d < strided.num_dims; ++d) {
    strided.sizes[d] = entries.sizes[d];
    strided.strides[d] = entries.strides[d];
  }
  return launch(gather_strided_kernel, blocks(entries.r), kThreads, 0, stream, strided);
}

// Contiguous gradients of the layers that `wanted` names.
template <typename G, typename F>
cudaError_t gather_contiguous(const GradEntries* layers, int64_t L, cudaStream_t stream,
                              const F& wanted) {
  Grads<G> all{};
  for (int64_t l = 0; l < L; ++l) {
    const GradEntries& entries = layers[l];
    if (entries.r > 0 && entries.num_dims == 0 && wanted(entries)) {
      fill(entries, all.num_entries, all.grads[all.count++]);
      all.num_entries += entries.r;
      all.out_stride = entries.out_stride;
    }
    if (all.count == Grads<G>::kMax || (l == L - 1 && all.count > 0)) {
      const cudaError_t error =
          launch(gather_kernel<G>, blocks(all.num_entries), kThreads, 0, stream, all);
      if (error != cudaSuccess) return error;
      all.count = 0;
      all.num_entries = 0;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t gather_grads(const GradEntries* layers, int64_t L, cudaStream_t stream) {
  bool any_signs = false, any_plain = false;
  for (int64_t l = 0; l < L; ++l) {
    const GradEntries& entries = layers[l];
    (entries.signs ? any_signs : any_plain) = true;
    if (entries.r == 0 || entries.num_dims == 0) continue;
    const cudaError_t error = gather_strided(entries, stream);
    if (error != cudaSuccess) return error;
  }
  if (any_plain) {
    const cudaError_t error = gather_contiguous<Grad>(
        layers, L, stream, [](const GradEntries& entries) { return !entries.signs; });
    if (error != cudaSuccess) return error;
  }
  if (!any_signs) return cudaSuccess;
  return gather_contiguous<SignedGrad>(layers, L, stream,
                                       [](const GradEntries& entries) { return entries.signs; });
}

}  // namespace cuda
}  // namespace dropinf
