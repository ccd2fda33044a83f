// Launches damped_cholesky and cholesky_solve.

#pragma once

#include <cuda_runtime_api.h>

#include "cholesky.h"

namespace dropinf {
namespace cuda {

// The widest layer of damped_cholesky and cholesky_solve that fits in the current device's shared
// memory; `cholesky` leaves wider ones alone.
cudaError_t widest_cholesky(int64_t* width);
cudaError_t cholesky(const CholeskyArgs& args, int64_t widest, cudaStream_t stream);

}  // namespace cuda
}  // namespace dropinf
