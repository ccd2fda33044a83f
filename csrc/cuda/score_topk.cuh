// Launches score_topk.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dropinf {
namespace cuda {

// Merges scores [m, c] of rows first, first + 1, ... into values and indices [m, k].
constexpr int kMaxTopk = 1024;  // k
cudaError_t score_topk(const float* scores, int64_t m, int64_t c, int64_t stride, int64_t first,
                       float* values, int64_t* indices, int64_t k, cudaStream_t stream);

}  // namespace cuda
}  // namespace dropinf
