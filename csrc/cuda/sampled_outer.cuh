// Launches sampled_outer.

#pragma once

#include <cuda_runtime_api.h>

#include "sampled_outer.h"

namespace dropinf {
namespace cuda {

// The coordinates of a layer in the order of dropinf/ops/bank_schedule.py.
struct StagedOrder {
  const int64_t* passes;  // [num_passes, 6] on the host: k0, k1, o0, o1, first slot, slots
  int64_t num_passes;
  const int32_t* packed;  // [num_slots] (o - o0) << 16 | i
  const int32_t* target;  // [num_slots] place among the sums of the pass, or -1 for padding
};
extern const int64_t kMaxStagedSlots;  // of a pass

// `order` may be null. `scratch` has sampled_outer_scratch(args) floats. No size may be zero.
int64_t sampled_outer_scratch(const SampledOuterArgs& args);
cudaError_t sampled_outer(const SampledOuterArgs& args, const StagedOrder* order, float* scratch,
                          cudaStream_t stream);

}  // namespace cuda
}  // namespace dropinf
