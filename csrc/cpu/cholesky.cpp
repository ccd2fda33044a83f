// Cholesky factors and solves of many layers on the CPU.

#include "cholesky.h"

#include <algorithm>

#include "cpu/cholesky_group.h"

namespace dropinf {

#define KERNELS "cpu/cholesky_kernels.h"
#include "cpu/each_capability.h"

namespace {

// Eight wider layers are too much for the second cache: 1 MiB on AMD EPYC Zen 4.
constexpr int64_t kTogether = 160;

// Rough times, of 2-core AMD EPYC Zen 4, 2026-11.
double together_ns(int64_t n, int64_t m, bool factorising) {
  const double size = static_cast<double>(n);
  return 100 + 3 * size * size + (factorising ? 0.02 * size * size * size : 0) +
         static_cast<double>(m) * size * (8 + 0.25 * size);
}

double alone_ns(int64_t n, int64_t m, bool factorising) {
  const double size = static_cast<double>(n);
  const double rows = static_cast<double>(round_up(m, kLanes));
  return 300 + 30 * size + 0.3 * size * size + (factorising ? 0.0035 * size * size * size : 0) +
         rows * size * (1 + 0.04 * size);
}

}  // namespace

void cholesky_group(const CholeskyGroup& group, bool together, const Share* share) {
  (together ? CAPABLE(run_group<true>) : CAPABLE(run_group<false>))(group, share);
}

CholeskyCall::CholeskyCall(const CholeskyArgs& args)
    : args_(args), starts_(args.L), order_(args.L) {
  const auto size = [&](int64_t l) { return args.offsets[l + 1] - args.offsets[l]; };
  int64_t start = 0;
  for (int64_t l = 0; l < args.L; ++l) {
    starts_[l] = start;
    start += size(l) * size(l);
    order_[l] = l;
  }
  const auto larger = [&](int64_t a, int64_t b) { return size(a) > size(b); };
  if (!std::is_sorted(order_.begin(), order_.end(), larger)) {
    std::stable_sort(order_.begin(), order_.end(), larger);
  }
  const bool factorising = args.factors;
  items_.reserve(args.L);
  for (int64_t first = 0; first < args.L;) {
    const int64_t n = size(order_[first]), count = std::min(kLanes, args.L - first);
    double alone = 0;
    for (int64_t k = first; k < first + count; ++k) {
      alone += alone_ns(size(order_[k]), args.m, factorising);
    }
    const double side_by_side = together_ns(n, args.m, factorising);
    if (n <= kTogether && side_by_side < alone) {
      items_.push_back({first, count, true, side_by_side});
    } else {
      items_.push_back({first, 1, false, alone_ns(n, args.m, factorising)});
    }
    total_ns += items_.back().ns;
    first += items_.back().count;
  }
}

void CholeskyCall::item(int64_t k, const Share* share) const {
  const Item& item = items_[k];
  CholeskyGroup group;
  group.count = item.count;
  group.m = args_.m;
  group.rows_stride = args_.rows_stride;
  group.solved_stride = args_.solved_stride;
  for (int64_t l = 0; l < item.count; ++l) {
    const int64_t layer = order_[item.first + l], offset = args_.offsets[layer];
    group.n[l] = args_.offsets[layer + 1] - offset;
    group.matrix[l] = args_.matrices + starts_[layer];
    group.factor[l] = args_.factors ? args_.factors + starts_[layer] : nullptr;
    group.shift[l] = args_.factors ? args_.shift[layer] : 0.0f;
    group.info[l] = args_.info + layer;
    group.rows[l] = args_.rows + offset;
    group.solved[l] = args_.solved + offset;
  }
  cholesky_group(group, item.together, share);
}

}  // namespace dropinf
