// Launches sampled_norm.

#pragma once

#include <cuda_runtime_api.h>

#include "sampled_norm.h"

namespace dropinf {
namespace cuda {

// Floats of scratch that a call takes.
int64_t sampled_norm_scratch(const SampledNormArgs& args);

cudaError_t sampled_norm(const SampledNormArgs& args, float* scratch, cudaStream_t stream);

}  // namespace cuda
}  // namespace dropinf
