// Launches sampled_conv.

#pragma once

#include <cuda_runtime_api.h>

#include "sampled_conv.h"

namespace dropinf {
namespace cuda {

// Invalid where a plane has 2^31 outputs or more.
cudaError_t sampled_conv(const SampledConvArgs& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace dropinf
