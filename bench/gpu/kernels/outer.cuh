// sampled_outer, with the order of its staged kernel.

#pragma once

#include "bank_order.h"
#include "cuda/sampled_outer.cuh"
#include "inputs.cuh"

namespace dropinf {
namespace bench {

// What dropinf/ops/bank_schedule.py makes of coordinates (o, i), for elements of 2 bytes.
struct Order {
  std::vector<int64_t> passes;
  std::vector<int32_t> packed, target;

  Order(const std::vector<int32_t>& o, const std::vector<int32_t>& i, int64_t I, int64_t O,
        int64_t max_slots) {
    const int64_t most = 40 * 1024 / 2 - cuda::ceil_div<int64_t>(I, 8) * 8;
    const PassLimits limits{2, 8, most, max_slots / kNumBanks};
    const auto bounds = cut_passes(o.data(), i.data(), static_cast<int64_t>(o.size()), 1, limits);
    for (size_t p = 0; p + 1 < bounds.size(); ++p) append(o, i, O, bounds[p], bounds[p + 1]);
  }

 private:
  void append(const std::vector<int32_t>& o, const std::vector<int32_t>& i, int64_t O, int64_t k0,
              int64_t k1) {
    const int64_t o0 = o[k0] / 8 * 8, o1 = std::min<int64_t>(O, o[k1 - 1] / 8 * 8 + 8);
    std::vector<int32_t> x_word, dy_word;
    for (int64_t k = k0; k < k1; ++k) {
      x_word.push_back(i[k] / 2);
      dy_word.push_back(static_cast<int32_t>((o[k] - o0) / 2));
    }
    std::vector<int32_t> at(x_word.size());
    const int64_t num_warps = pack_warps(x_word.data(), dy_word.data(), k1 - k0, at.data());
    std::vector<std::vector<int32_t>> warps(static_cast<size_t>(num_warps));
    for (size_t e = 0; e < at.size(); ++e) warps[at[e]].push_back(static_cast<int32_t>(e));
    passes.insert(passes.end(),
                  {k0, k1, o0, o1, static_cast<int64_t>(packed.size()), kNumBanks * num_warps});
    for (const auto& warp : warps) {
      for (size_t lane = 0; lane < kNumBanks; ++lane) {
        const bool real = lane < warp.size();
        const int32_t e = real ? warp[lane] : warp[0];
        packed.push_back(static_cast<int32_t>((o[k0 + e] - o0) << 16 | i[k0 + e]));
        target.push_back(real ? e : -1);
      }
    }
  }
};

// Staged in passes of at most max_slots; direct if that is 0.
inline Case outer(const Pools& pools, int64_t B, int64_t T, int64_t I, int64_t O, int64_t r,
                  int64_t max_slots) {
  const Pool<BFloat16>& pool = pools.halves;
  const Coordinates at(r, O, I);
  const Order order(at.row, at.column, I, O, max_slots ? max_slots : cuda::kMaxStagedSlots);
  const Device<int32_t> o_idx(at.row), i_idx(at.column), packed(order.packed), target(order.target);
  const std::vector<float> factors = weights(r);
  const Device<float> device_weights(factors), out(B * r);
  SampledOuterArgs args{};
  args.dtype = DType::kBFloat16;
  args.B = B, args.T = T, args.I = I, args.O = O, args.r = r, args.s = 1;
  args.x_stride_b = T * I, args.x_stride_t = I;
  args.dy_stride_b = T * O, args.dy_stride_t = O;
  args.out = out.data(), args.out_stride_b = r, args.out_stride_k = 1;
  const Device<float> scratch(cuda::sampled_outer_scratch(args) + 1);

  Case it;
  const auto num_passes = static_cast<int64_t>(order.passes.size() / 6);
  it.name = label("sampled_outer %d x %d, r=%d", O, I, r) +
            (max_slots ? label(", staged, passes: %d", num_passes) : ", direct");
  it.num_bytes = 2 * B * T * (I + O);
  if (!max_slots) it.num_bytes = std::min(it.num_bytes, 2 * B * T * r * kSector);
  it.run = [=, &pool](int64_t turn) {
    SampledOuterArgs call = args;
    call.x = pool.data() + pool.at(turn, B * T * (I + O));
    call.dy = static_cast<const BFloat16*>(call.x) + B * T * I;
    call.o_idx = o_idx.data(), call.i_idx = i_idx.data(), call.weights = device_weights.data();
    const cuda::StagedOrder staged{order.passes.data(), num_passes, packed.data(), target.data()};
    return cuda::sampled_outer(call, max_slots ? &staged : nullptr, scratch.data(), nullptr);
  };
  it.wrong = [=, &pool] {
    return compare(out.on_host(), T, 0, [&](int64_t n) {
      const int64_t b = n / r, k = n % r;
      double sum = 0;
      for (int64_t t = b * T; t < (b + 1) * T; ++t) {
        sum += pool[t * I + at.column[k]] * pool[B * T * I + t * O + at.row[k]];
      }
      return factors[k] * sum;
    });
  };
  return it;
}

}  // namespace bench
}  // namespace dropinf
