// score_topk as its kernels see it: raw pointers, sizes and strides in elements, no torch.

#pragma once

#include <cstdint>

namespace dropinf {

// The arguments of score_topk: scores of rows first, first + 1, ... merged into what is kept.
struct ScoreTopkArgs {
  const float* scores;  // [m, c], stride 1 in c
  int64_t m, c, scores_stride;
  int64_t first;
  float* values;     // [m, k] in descending order
  int64_t* indices;  // [m, k]; -1 where there is none yet
  int64_t k;
};

// Merges the scores of queries [q_begin, q_end).
void score_topk_queries(const ScoreTopkArgs& args, int64_t q_begin, int64_t q_end);

}  // namespace dropinf
