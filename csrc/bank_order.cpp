#include "bank_order.h"

#include <algorithm>
#include <array>
#include <utility>

namespace dropinf {
namespace {

// Warps that fill up with coordinates, each in the first one that can take it: one that has a lane
// left, and in whose banks its words are, or none yet.
class Warps {
 public:
  int32_t add(int32_t x_word, int32_t dy_word) {
    std::vector<int32_t>& x = words_[x_word % kNumBanks];
    std::vector<int32_t>& dy = words_[kNumBanks + dy_word % kNumBanks];
    int64_t w = first_open_;
    while (w < count() && !(lanes_[w] < kNumBanks && (x[w] == x_word || x[w] == kNone) &&
                            (dy[w] == dy_word || dy[w] == kNone))) {
      ++w;
    }
    if (w == count()) {
      lanes_.push_back(0);
      for (auto& of_bank : words_) of_bank.push_back(kNone);
    }
    x[w] = x_word;
    dy[w] = dy_word;
    ++lanes_[w];
    while (first_open_ < count() && lanes_[first_open_] == kNumBanks) ++first_open_;
    return static_cast<int32_t>(w);
  }

  int64_t count() const { return static_cast<int64_t>(lanes_.size()); }

 private:
  static constexpr int32_t kNone = -1;
  std::array<std::vector<int32_t>, 2 * kNumBanks> words_;  // of x and of dy, for each warp
  std::vector<int8_t> lanes_;
  int64_t first_open_ = 0;
};

// The coordinates, with the words that they read. Windows are aligned to a multiple of 4 bytes:
// where a window begins rotates the banks of dy, which changes no warp, so they are counted as if
// it began at output 0.
struct Coordinates {
  Coordinates(const int32_t* o_idx, const int32_t* i_idx, int64_t r, int64_t s,
              int64_t element_size)
      : o_idx(o_idx), r(r), s(s), x_word(r * s), dy_word(r * s) {
    for (int64_t e = 0; e < r * s; ++e) {
      x_word[e] = static_cast<int32_t>(i_idx[e] * element_size / kBankBytes);
      dy_word[e] = static_cast<int32_t>(o_idx[e] * element_size / kBankBytes);
    }
  }

  const int32_t* o_idx;
  int64_t r, s;
  std::vector<int32_t> x_word, dy_word;
};

// What a pass holds so far.
struct Pass {
  Warps warps;
  int64_t lowest = INT64_MAX, highest = 0;  // outputs

  void add(const Coordinates& from, int64_t e) {
    lowest = std::min<int64_t>(lowest, from.o_idx[e]);
    highest = std::max<int64_t>(highest, from.o_idx[e]);
    warps.add(from.x_word[e], from.dy_word[e]);
  }

  bool fits(const PassLimits& limits, int64_t max_warps) const {
    const int64_t window = (highest / limits.alignment - lowest / limits.alignment + 1);
    return warps.count() <= max_warps && window * limits.alignment <= limits.max_outputs;
  }
};

// Takes as many entries for each pass as fit.
std::vector<int64_t> cut_greedily(const Coordinates& from, const PassLimits& limits,
                                  int64_t max_warps) {
  std::vector<int64_t> bounds{0};
  Pass pass;
  for (int64_t k = 0; k < from.r; ++k) {
    for (int64_t e = k * from.s; e < (k + 1) * from.s; ++e) pass.add(from, e);
    if (pass.fits(limits, max_warps)) continue;
    if (k > bounds.back()) bounds.push_back(k);
    pass = Pass();
    for (int64_t e = k * from.s; e < (k + 1) * from.s; ++e) pass.add(from, e);
    if (!pass.fits(limits, max_warps)) return {};
  }
  bounds.push_back(from.r);
  return bounds;
}

}  // namespace

std::vector<int64_t> cut_passes(const int32_t* o_idx, const int32_t* i_idx, int64_t r, int64_t s,
                                const PassLimits& limits) {
  const Coordinates from(o_idx, i_idx, r, s, limits.element_size);
  std::vector<int64_t> best = cut_greedily(from, limits, limits.max_warps);
  if (best.size() <= 2) return best;
  int64_t too_few = 0, enough = limits.max_warps;
  while (too_few + 1 < enough) {
    const int64_t warps = (too_few + enough) / 2;
    std::vector<int64_t> bounds = cut_greedily(from, limits, warps);
    if (bounds.size() == best.size()) {
      best = std::move(bounds);
      enough = warps;
    } else {
      too_few = warps;
    }
  }
  return best;
}

int64_t pack_warps(const int32_t* x_word, const int32_t* dy_word, int64_t n, int32_t* warp) {
  Warps warps;
  for (int64_t e = 0; e < n; ++e) warp[e] = warps.add(x_word[e], dy_word[e]);
  return warps.count();
}

}  // namespace dropinf
