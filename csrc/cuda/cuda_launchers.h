// The launchers of the CUDA kernels: raw pointers to the device's memory, sizes, strides and the
// stream, no torch. They do not wait for the device. Work of size zero launches nothing.
//
// An index out of range is never read from: its entry becomes NaN, because a kernel cannot raise
// without a wait.

#pragma once

#include <cuda_runtime_api.h>

#include "launchers.h"

namespace dropinf {
namespace cuda {

// The coordinates of a layer in the order of dropinf/staging.py.
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

// The entries of L gradients, in one launch for every 640 contiguous ones (480 with signs) and one
// for each that is strided, which has at most kMaxDims dimensions.
constexpr int kMaxDims = 8;
cudaError_t gather_grads(const GradEntries* layers, int64_t L, cudaStream_t stream);

// Entries are NaN too where i_idx is not sorted.
cudaError_t sampled_embedding(const SampledEmbeddingArgs& args, cudaStream_t stream);

// Invalid where a plane has 2^31 outputs or more.
cudaError_t sampled_conv(const SampledConvArgs& args, cudaStream_t stream);

// Merges scores [m, c] of rows first, first + 1, ... into values and indices [m, k].
constexpr int kMaxTopk = 1024;  // k
cudaError_t score_topk(const float* scores, int64_t m, int64_t c, int64_t stride, int64_t first,
                       float* values, int64_t* indices, int64_t k, cudaStream_t stream);

// `scratch`: as many floats as gram_scratch says, or null where that is 0.
int64_t gram_scratch(const GramArgs& args);
cudaError_t gram(const GramArgs& args, float* scratch, cudaStream_t stream);

// The widest layer of damped_cholesky and cholesky_solve that fits in the current device's shared
// memory; `cholesky` leaves wider ones alone.
cudaError_t widest_cholesky(int64_t* width);
cudaError_t cholesky(const CholeskyArgs& args, int64_t widest, cudaStream_t stream);

}  // namespace cuda
}  // namespace dropinf
