// Launches damped_cholesky and cholesky_solve.

#pragma once

#include <cuda_runtime_api.h>

#include "cholesky.h"

namespace dropinf {
namespace cuda {

cudaError_t cholesky(const CholeskyArgs& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace dropinf
