// What damped_cholesky and cholesky_solve share: the groups of layers that are worked on at a time.

#pragma once

#include <cstdint>
#include <limits>

#include "cholesky.h"
#include "cpu/lanes.h"

namespace dropinf {

// Columns of a matrix that are worked on at a time; the sums are cut there.
constexpr int64_t kPanel = 64;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Layers that are worked on together: up to kLanes, or one.
struct CholeskyGroup {
  int64_t count;
  int64_t n[kLanes];
  const float* matrix[kLanes];  // [n, n] to factorise, or a factor
  float* factor[kLanes];        // [n, n] to write, or null: `matrix` is a factor
  float shift[kLanes];
  int32_t* info[kLanes];
  const float* rows[kLanes];  // [m, n] right-hand sides
  float* solved[kLanes];      // [m, n]
  int64_t m, rows_stride, solved_stride;
};

// Does all of one group: `together` puts the layers side by side in the lanes, else there is one
// layer, and eight of its rows are. `share`, or null, lets threads share the rows. The same bits
// whatever is chosen.
void cholesky_group(const CholeskyGroup& group, bool together, const Share* share);

}  // namespace dropinf
