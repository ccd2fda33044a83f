// Launches gram.

#pragma once

#include <cuda_runtime_api.h>

#include "gram.h"

namespace dropinf {
namespace cuda {

// `scratch`: as many floats as gram_scratch says, or null where that is 0.
int64_t gram_scratch(const GramArgs& args);
cudaError_t gram(const GramArgs& args, float* scratch, cudaStream_t stream);

}  // namespace cuda
}  // namespace dropinf
