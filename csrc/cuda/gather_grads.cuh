// Launches gather_grads.

#pragma once

#include <cuda_runtime_api.h>

#include "gather_grads.h"

namespace dropinf {
namespace cuda {

// The entries of L gradients, in one launch for every 582 contiguous ones and one for each that is
// strided, which has at most kMaxDims dimensions.
constexpr int kMaxDims = 8;
cudaError_t gather_grads(const GradEntries* layers, int64_t L, cudaStream_t stream);

}  // namespace cuda
}  // namespace dropinf
