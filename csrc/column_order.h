// Which coordinates of sampled_outer each lane of the columns kernel sums, and in which of its
// steps. Chosen once for a layer, on the CPU; dropinf/ops/column_schedule.py says what is made of
// it.

#pragma once

#include <cstdint>
#include <vector>

namespace dropinf {

// A lane has pieces of steps, of one column of x each: first the long ones, then the short ones.
constexpr int64_t kColumnLanes = 512;  // 16 warps of 32
constexpr int64_t kLongPieces = 4, kLongSteps = 8;
constexpr int64_t kShortPieces = 4, kShortSteps = 4;
constexpr int64_t kLanePieces = kLongPieces + kShortPieces;
constexpr int64_t kLaneSteps = kLongPieces * kLongSteps + kShortPieces * kShortSteps;

struct PassOrder {
  std::vector<int32_t> coordinate;  // [kLaneSteps, kColumnLanes]: e; ~e where e is only read again
  std::vector<int32_t> x_cell;      // [kLanePieces, kColumnLanes]
  int64_t pieces = 0;               // bit p: some lane has a piece p
};

// An order of n > 0 coordinates of a pass, that read these cells of x and of dy; empty where they
// are too many. Eight lanes read shared memory at a time, and cells whose numbers differ by a
// multiple of eight share banks: so the columns of eight such lanes differ modulo 8 where they can,
// and in every step the cells of dy that they read do.
PassOrder order_columns(const int32_t* x_cell, const int32_t* dy_cell, int64_t n);

}  // namespace dropinf
