// sampled_embedding on the CPU: each position looks its token up among the sampled ones. At a
// vocabulary of 50,000 and 1,000 coordinates one position in 50 meets any, so the search is the
// work.

#include "sampled_embedding.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "elements.h"

namespace dropinf {
namespace {

template <typename E>
void rows(const SampledEmbeddingArgs& args, int64_t b_begin, int64_t b_end) {
  // Coordinates of one token each, of the example: all others are 0, whatever they weigh.
  std::vector<std::pair<int64_t, int64_t>> met;
  std::vector<char> is_met(args.weights ? args.r : 0);  // by the first coordinate
  for (int64_t b = b_begin; b < b_end; ++b) {
    const E* dy = static_cast<const E*>(args.dy) + b * args.dy_stride_b;
    const int64_t* ids = args.ids + b * args.T;
    float* out = args.out + b * args.out_stride_b;
    for (int64_t k = 0; k < args.r; ++k) out[k * args.out_stride_k] = 0.0f;
    for (int64_t t = 0; t < args.T; ++t, dy += args.dy_stride_t) {
      const auto [first, last] = std::equal_range(args.i_idx, args.i_idx + args.r, ids[t]);
      if (first == last) continue;
      const int64_t begin = first - args.i_idx, end = last - args.i_idx;
      for (int64_t k = begin; k < end; ++k) {
        out[k * args.out_stride_k] += to_float(dy[args.o_idx[k]]);
      }
      if (!args.weights || is_met[begin]) continue;
      is_met[begin] = true;
      met.push_back({begin, end});
    }
    for (const auto& [begin, end] : met) {
      float* const from = out + begin * args.out_stride_k;
      weigh(args.weights + begin, end - begin, from, args.out_stride_k);
      is_met[begin] = false;
    }
    met.clear();
  }
}

}  // namespace

void sampled_embedding_rows(const SampledEmbeddingArgs& args, int64_t b_begin, int64_t b_end) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return rows<BFloat16>(args, b_begin, b_end);
    case DType::kFloat16:
      return rows<Float16>(args, b_begin, b_end);
    default:
      return rows<float>(args, b_begin, b_end);
  }
}

}  // namespace dropinf
