// sampled_outer as kernels see it: raw pointers, sizes and strides in elements, no torch.

#pragma once

#include <cstdint>
#include <memory>

#include "elements.h"

namespace dropinf {

// The arguments of sampled_outer:
//   out[b, k] = sum_j weights[k, j] * sum_t dy[b, t, o_idx[k, j]] * x[b, t, i_idx[k, j]]
// With s = 1 the weight multiplies the finished sum. A weight of 0 leaves its coordinate out, also
// where that is not finite.
struct SampledOuterArgs {
  DType dtype;     // of x and dy
  const void* x;   // [B, T, I], stride 1 in I
  const void* dy;  // [B, T, O], stride 1 in O
  int64_t B, T, I, O;
  int64_t x_stride_b, x_stride_t;
  int64_t dy_stride_b, dy_stride_t;
  const int32_t* o_idx;  // [r, s]
  const int32_t* i_idx;  // [r, s]
  const float* weights;  // [r, s], or null for ones
  int64_t r, s;
  bool bias;   // i_idx may be I: a column of ones
  float* out;  // [B, r]
  int64_t out_stride_b, out_stride_k;
};

// One call of sampled_outer, prepared once and then shared by the threads. The positions are cut
// into chunks that depend on T alone. A chunk is summed on its own, and the chunks are added in
// order, whoever computes them: the bits of a row depend neither on the threads nor on B.
class SampledOuter {
 public:
  static std::unique_ptr<const SampledOuter> make(const SampledOuterArgs& args);
  virtual ~SampledOuter() = default;

  int64_t num_chunks;  // of one example
  int64_t sums_size;   // floats that hold the sums of one chunk
  double chunk_ns;     // rough time of one chunk

  // out[b_begin:b_end].
  virtual void rows(int64_t b_begin, int64_t b_end) const = 0;
  // The sums of chunks [c_begin, c_end), counted over the batch: chunk c % num_chunks of example
  // c / num_chunks.
  virtual void chunks(int64_t c_begin, int64_t c_end, float* sums) const = 0;
  // out[b, k_begin:k_end] from the sums of example b's chunks; overwrites sums.
  virtual void finish(int64_t b, int64_t k_begin, int64_t k_end, float* sums) const = 0;
};

}  // namespace dropinf
