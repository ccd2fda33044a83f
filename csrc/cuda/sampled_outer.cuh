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

// The coordinates of a layer in the order of dropinf/ops/column_schedule.py. In a buffer, output
// o0 + n has cell n % 4 * 1024 + n / 4, input i0 + n cell 4096 + n % 4 * 512 + n / 4, the bias
// 6144.
constexpr int kColumnOutputs = 4096, kColumnInputs = 2048;  // of a pass
constexpr int kMaxColumnPasses = 64;
struct ColumnOrder {
  const int64_t* passes;  // [num_passes, 5] on the host: i0, i1, o0, o1, bits of the pieces in use
  int64_t num_passes;
  const int32_t* packed;   // [num_passes, kLaneSteps / 2, kColumnLanes] bytes of cells of two steps
  const int32_t* columns;  // [num_passes, kLanePieces, kColumnLanes] bytes of a cell of x
  const int32_t* target;   // [num_passes, kLaneSteps, kColumnLanes] entry, or -1 for padding
};
// Elements of two bytes, s = 1. Direct where the device has less than 192 KB for a block.
int64_t sampled_outer_scratch(const SampledOuterArgs& args, const ColumnOrder& order);
cudaError_t sampled_outer(const SampledOuterArgs& args, const ColumnOrder& order, float* scratch,
                          cudaStream_t stream);

// `order` may be null. `scratch` has sampled_outer_scratch(args) floats. No size may be zero.
int64_t sampled_outer_scratch(const SampledOuterArgs& args);
cudaError_t sampled_outer(const SampledOuterArgs& args, const StagedOrder* order, float* scratch,
                          cudaStream_t stream);

}  // namespace cuda
}  // namespace dropinf
