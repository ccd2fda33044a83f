// The launchers of the CUDA kernels: raw pointers to the device's memory, sizes, strides and the
// stream, no torch. They do not wait for the device. Work of size zero launches nothing.
//
// An index out of range is never read from: its entry becomes NaN, because a kernel cannot raise
// without a wait.

#pragma once

#include <cuda_runtime_api.h>

#include "launchers.h"

namespace dropinf {
namespace cuda {

// The entries of L gradients, in one launch for every kMaxGrads contiguous ones and one for each
// that is strided, which has at most kMaxDims dimensions.
constexpr int kMaxDims = 8;
cudaError_t gather_grads(const GradEntries* layers, int64_t L, cudaStream_t stream);

// Entries are NaN too where i_idx is not sorted.
cudaError_t sampled_embedding(const SampledEmbeddingArgs& args, cudaStream_t stream);

// Invalid where a plane has 2^31 outputs or more.
cudaError_t sampled_conv(const SampledConvArgs& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace dropinf
