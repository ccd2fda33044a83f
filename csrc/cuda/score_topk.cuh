// Launches score_topk.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "score_topk.h"

namespace dropinf {
namespace cuda {

constexpr int64_t kMaxTopk = 1024;  // k

// How many blocks share a query's scores on the current device.
cudaError_t score_topk_parts(const ScoreTopkArgs& args, int64_t* num_parts);

// Floats of what they keep.
int64_t score_topk_scratch(const ScoreTopkArgs& args, int64_t num_parts);

// Merges scores [m, c] of rows first, first + 1, ... into values and indices [m, k]. `scratch` has
// score_topk_scratch(args, num_parts) floats, aligned to 8 bytes. No size may be zero.
cudaError_t score_topk(const ScoreTopkArgs& args, int64_t num_parts, float* scratch,
                       cudaStream_t stream);

}  // namespace cuda
}  // namespace dropinf
