// Gram matrices of many layers on the CPU.

#include "gram.h"

#include <algorithm>

#include "cpu/lanes.h"

namespace dropinf {
namespace {

// Rows of an item, and rows of the input that are summed before they are added to the rest: a tile
// of these is 12 KiB of cache.
constexpr int64_t kHeight = 64;
constexpr int64_t kDepth = 128;

}  // namespace

#define KERNELS "cpu/gram_kernels.h"
#include "cpu/each_capability.h"

GramCall::GramCall(const GramArgs& args) : args_(args) {
  int64_t start = 0;
  for (int64_t l = 0; l < args.L; ++l) {
    const int64_t offset = args.offsets[l], r = args.offsets[l + 1] - offset;
    for (int64_t begin = 0; begin < r; begin += kHeight) {
      const int64_t end = std::min(begin + kHeight, r);
      // 2-core AMD EPYC Zen 4, 2026-11.
      const double ns = 50 + 0.012 * static_cast<double>(args.n) * (end - begin) * end;
      items_.push_back({offset, r, begin, end, args.out + start, ns});
      total_ns += ns;
    }
    start += r * r;
  }
  const auto longer = [](const Item& a, const Item& b) { return a.ns > b.ns; };
  std::stable_sort(items_.begin(), items_.end(), longer);
}

void GramCall::item(int64_t k) const {
  const Item& item = items_[k];
  CAPABLE(gram_rows)(args_, item.offset, item.r, item.begin, item.end, item.out);
}

}  // namespace dropinf
