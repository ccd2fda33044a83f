// score_topk on the CPU. Of a long store next to no score enters, so the scan is the work: the
// largest of a block of scores decides whether the block is looked at.
//
// Threads share queries, not the scores of one: the scan of one query takes 1 / 200 of the time of
// its products (50,000 rows of 1024, 2-core Xeon with AVX2, 2026-11).

#include "score_topk.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/capability.h"

namespace dropinf {
namespace {

constexpr int64_t kBlock = 64;  // a larger one is looked at in vain, a smaller one costs calls
constexpr int64_t kSlack = 32;

// What scores are ordered by: as the numbers are, -0 with 0, and every NaN the largest.
constexpr int32_t kNaNKey = 0x7fffffff;
constexpr int32_t kLeastKey = -0x7f800001;  // of -inf

inline int32_t key_of(float score) {
  score += 0.0f;  // which makes 0 of -0
  int32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  const int32_t key = bits ^ ((bits >> 31) & kNaNKey);
  // A mask, for GCC makes a branch of a choice, and then no vectors.
  const int32_t is_nan = (0x7f800000 - (bits & 0x7fffffff)) >> 31;
  return (key & ~is_nan) | (kNaNKey & is_nan);
}

struct Candidate {
  int32_t key;
  float score;
  int64_t row;
};

inline bool better(const Candidate& a, const Candidate& b) {
  return a.key != b.key ? a.key > b.key : a.row < b.row;
}

// The k best of one query. More are kept for a while: they are cut to k when they are some twice as
// many, so that a score that enters costs a few comparisons, whatever k.
class Best {
 public:
  Best(float* values, int64_t* indices, int64_t k) : values_(values), indices_(indices), k_(k) {
    for (int64_t j = 0; j < k && indices[j] >= 0; ++j) {
      kept_.push_back({key_of(values[j]), values[j], indices[j]});
    }
    if (size() == k) worst_ = kept_.back();
  }

  // Whether one of the scores of rows from `row` on can enter, the largest of them of this key.
  bool may_enter(int32_t key, int64_t row) const {
    return row < worst_.row ? key >= worst_.key : key > worst_.key;
  }

  void offer(const Candidate& candidate) {
    if (!better(candidate, worst_)) return;
    kept_.push_back(candidate);
    entered_ = true;
    if (size() >= 2 * k_ + kSlack) cut();
  }

  void write() {
    if (!entered_) return;
    if (size() > k_) cut();
    std::sort(kept_.begin(), kept_.end(), better);
    for (int64_t j = 0; j < size(); ++j) {
      values_[j] = kept_[j].score;
      indices_[j] = kept_[j].row;
    }
  }

 private:
  int64_t size() const { return static_cast<int64_t>(kept_.size()); }

  void cut() {
    std::nth_element(kept_.begin(), kept_.begin() + (k_ - 1), kept_.end(), better);
    kept_.resize(k_);
    worst_ = kept_.back();
  }

  float* values_;
  int64_t* indices_;
  int64_t k_;
  bool entered_ = false;
  std::vector<Candidate> kept_;
  Candidate worst_{kLeastKey, 0.0f, -1};  // of k; until there are, what no -inf is better than
};

}  // namespace

#define KERNELS "cpu/score_topk_kernels.h"
#include "cpu/each_capability.h"

void score_topk_queries(const ScoreTopkArgs& args, int64_t q_begin, int64_t q_end) {
  for (int64_t q = q_begin; q < q_end; ++q) {
    const float* scores = args.scores + q * args.scores_stride;
    Best best(args.values + q * args.k, args.indices + q * args.k, args.k);
    for (int64_t begin = 0; begin < args.c; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, args.c);
      const int32_t largest = CAPABLE(largest_key)(scores + begin, end - begin);
      if (!best.may_enter(largest, args.first + begin)) continue;
      for (int64_t i = begin; i < end; ++i) {
        best.offer({key_of(scores[i]), scores[i], args.first + i});
      }
    }
    best.write();
  }
}

}  // namespace dropinf
