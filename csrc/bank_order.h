// Which coordinates of sampled_outer a warp reads together, so that no bank of shared memory is
// asked twice. Chosen once for a layer, on the CPU; dropinf/ops/bank_schedule.py says what is made
// of it.

#pragma once

#include <cstdint>
#include <vector>

namespace dropinf {

// Shared memory of an NVIDIA GPU: 32 banks of 4 bytes, and a warp of as many lanes.
constexpr int64_t kNumBanks = 32;
constexpr int64_t kBankBytes = 4;

// A pass stages x and a window of dy, and sums a range of the entries.
struct PassLimits {
  int64_t element_size;  // bytes of an element of x and dy
  int64_t alignment;     // elements: windows begin and end at multiples of it
  int64_t max_outputs;   // elements of a window
  int64_t max_warps;
};

// Cuts entries [0, r), each with s coordinates, into the fewest passes within the limits, and of
// those cuts takes one whose fullest pass has the fewest warps. Returns num_passes + 1 bounds;
// nothing if an entry alone exceeds the limits. Indices must not be negative.
std::vector<int64_t> cut_passes(const int32_t* o_idx, const int32_t* i_idx, int64_t r, int64_t s,
                                const PassLimits& limits);

// Colours the edges (left[e], right[e]) between two sets of kNumBanks vertices so that no vertex
// has two edges of a colour, and returns the number of colours, which is the largest degree: never
// fewer would do, and by Kőnig's theorem (Math. Ann. 77, 1916) that many always do.
int64_t colour_edges(const uint8_t* left, const uint8_t* right, int64_t num_edges, int32_t* colour);

}  // namespace dropinf
