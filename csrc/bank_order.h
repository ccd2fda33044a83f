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

// Cuts entries [0, r), each with s coordinates, into passes within the limits: each takes as many
// as fit, and of the cuts into so many passes it takes one whose fullest has few warps. Returns
// num_passes + 1 bounds; nothing if an entry alone exceeds the limits. Indices must not be
// negative.
std::vector<int64_t> cut_passes(const int32_t* o_idx, const int32_t* i_idx, int64_t r, int64_t s,
                                const PassLimits& limits);

// The warp of each of n coordinates of a pass, given the words of x and of dy that they read, such
// that of every bank a warp reads one word, for however many lanes; returns the number of warps.
int64_t pack_warps(const int32_t* x_word, const int32_t* dy_word, int64_t n, int32_t* warp);

}  // namespace dropinf
