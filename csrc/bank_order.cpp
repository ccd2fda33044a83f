#include "bank_order.h"

#include <algorithm>
#include <array>
#include <utility>

namespace dropinf {
namespace {

constexpr int64_t kWordBits = 64;

// The coordinates, with the banks that they read. Windows are aligned to a multiple of 4 bytes:
// where a window begins rotates the banks of dy, which changes no load, so they are counted as if
// it began at output 0.
struct Coordinates {
  Coordinates(const int32_t* o_idx, const int32_t* i_idx, int64_t r, int64_t s,
              int64_t element_size)
      : o_idx(o_idx), r(r), s(s), x_bank(r * s), dy_bank(r * s) {
    for (int64_t e = 0; e < r * s; ++e) {
      x_bank[e] = static_cast<uint8_t>(i_idx[e] * element_size / kBankBytes % kNumBanks);
      dy_bank[e] = static_cast<uint8_t>(o_idx[e] * element_size / kBankBytes % kNumBanks);
    }
  }

  const int32_t* o_idx;
  int64_t r, s;
  std::vector<uint8_t> x_bank, dy_bank;
};

// What a pass holds so far. Its largest load of a bank is its number of warps.
struct Pass {
  std::array<int64_t, kNumBanks> x_load{}, dy_load{};
  int64_t warps = 0;
  int64_t lowest = INT64_MAX, highest = 0;  // outputs

  void add(const Coordinates& from, int64_t e) {
    lowest = std::min<int64_t>(lowest, from.o_idx[e]);
    highest = std::max<int64_t>(highest, from.o_idx[e]);
    warps = std::max(warps, ++x_load[from.x_bank[e]]);
    warps = std::max(warps, ++dy_load[from.dy_bank[e]]);
  }

  bool fits(const PassLimits& limits, int64_t max_warps) const {
    const int64_t window = (highest / limits.alignment - lowest / limits.alignment + 1);
    return warps <= max_warps && window * limits.alignment <= limits.max_outputs;
  }
};

// Takes as many entries for each pass as fit, which makes the fewest passes: whatever fits a range
// of entries fits any part of it.
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

int64_t colour_edges(const uint8_t* left, const uint8_t* right, int64_t num_edges,
                     int32_t* colour) {
  // Vertices 0 .. 31 are on the left, 32 .. 63 on the right.
  std::array<int64_t, 2 * kNumBanks> degree{};
  for (int64_t e = 0; e < num_edges; ++e) {
    ++degree[left[e]];
    ++degree[kNumBanks + right[e]];
  }
  const int64_t num_colours = *std::max_element(degree.begin(), degree.end());
  const int64_t num_words = (num_colours + kWordBits - 1) / kWordBits;
  // The edge of each colour at each vertex, or -1; and as bits, which colours a vertex has left.
  std::vector<int32_t> edge_at(2 * kNumBanks * num_colours, -1);
  std::vector<uint64_t> free_bits(2 * kNumBanks * num_words, 0);
  for (int64_t v = 0; v < 2 * kNumBanks; ++v) {
    for (int64_t c = 0; c < num_colours; ++c) {
      free_bits[v * num_words + c / kWordBits] |= uint64_t{1} << (c % kWordBits);
    }
  }
  const auto at = [&](int64_t v, int64_t c) -> int32_t& { return edge_at[v * num_colours + c]; };
  const auto toggle = [&](int64_t v, int64_t c) {
    free_bits[v * num_words + c / kWordBits] ^= uint64_t{1} << (c % kWordBits);
  };
  // The lowest colour that both have left, or -1.
  const auto lowest = [&](int64_t u, int64_t v) -> int64_t {
    for (int64_t w = 0; w < num_words; ++w) {
      const uint64_t both = free_bits[u * num_words + w] & free_bits[v * num_words + w];
      if (both == 0) continue;
      int64_t bit = 0;
      while (!(both >> bit & 1)) ++bit;
      return w * kWordBits + bit;
    }
    return -1;
  };
  for (int64_t e = 0; e < num_edges; ++e) {
    const int64_t u = left[e], v = kNumBanks + right[e];
    int64_t c = lowest(u, v);
    if (c < 0) {
      // Exchange the colours c, left at u, and d, left at v, along the path of those that begins
      // at v. It does not end at u: it would come there by an edge of colour c.
      c = lowest(u, u);
      const int64_t d = lowest(v, v);
      int64_t w = v, next = c;
      while (true) {
        const int32_t leaving = at(w, next);
        std::swap(at(w, c), at(w, d));
        if (w == v || leaving < 0) {  // an end of the path has one of the two
          toggle(w, c);
          toggle(w, d);
        }
        if (leaving < 0) break;
        next = c + d - next;
        colour[leaving] = static_cast<int32_t>(next);
        w = left[leaving] + kNumBanks + right[leaving] - w;  // its other vertex
      }
    }
    at(u, c) = at(v, c) = static_cast<int32_t>(e);
    toggle(u, c);
    toggle(v, c);
    colour[e] = static_cast<int32_t>(c);
  }
  return num_colours;
}

}  // namespace dropinf
