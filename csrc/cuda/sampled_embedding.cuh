// Launches sampled_embedding.

#pragma once

#include <cuda_runtime_api.h>

#include "sampled_embedding.h"

namespace dropinf {
namespace cuda {

// Entries are NaN too where i_idx is not sorted.
cudaError_t sampled_embedding(const SampledEmbeddingArgs& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace dropinf
