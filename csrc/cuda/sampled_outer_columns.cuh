// The columns kernel of sampled_outer, for many coordinates in elements of two bytes.
//
// A lane owns a column of x for a piece of 8 steps or of 4, reads it once, and in each step meets
// another output: half the reads of shared memory that the staged kernel has. Eight positions of a
// column are a cell of 16 bytes, which one read takes. A pass has up to 2048 columns of x and 4096
// outputs, and 48 coordinates for each of 512 threads; of a thread's 128 registers 48 are sums, 24
// places of dy (two in a register), 8 a column of x, 8 what it stages. Two buffers of 6145 cells,
// one of them of ones for a bias, are 192 KB: one block an SM, from sm_90 on.
//
// Staging transposes: a thread takes 4 columns at 4 positions, as 4 reads of 8 bytes, and writes
// half a cell for each column. That is done in six parts, in between the steps; the reads of a part
// are under way during its eight steps. Column 4 m + n has cell n * (size / 4) + m, so that 16
// lanes write 128 bytes in a row. Eight lanes read all banks at a time, and cells share banks if
// their numbers are equal modulo 8: csrc/column_order.cpp orders the coordinates by that.
//
// Sums leave in the order of the lanes; a second kernel adds the chunks and puts them in their
// places. Coordinates [r, s] are to both those of a call with r * s entries, and
// csrc/sampled_outer.cpp adds the s of each. The chunks depend on T alone, and a sum is over its
// positions in order whatever lane has it: no bit depends on B, the device or the order.
//
// Measured on an H200: 303 us at r=65536, 233 at 8192. Predicted for B=8, T=2048, I=O=4096, bf16,
// r=65536 there (4.3 TB/s, 132 SMs,
// 1.75 GHz): three passes of 11 chunks are 264 blocks, two for each SM, of 24 buffers each.
//   Instructions of a warp for a buffer: 48 steps of 18.5 (a read, its place, 8 widenings, 8 FFMA),
//   8 columns of 11, 6 parts of 26 for staging, 24 jumps: 1200, 3.1 for each of 384
//   coordinate-positions (tests/kernels/test_instruction_budgets.py); of 16 warps on 4 schedulers
//   4.8 k cycles, for 48 buffers 132 us.
//   Shared memory, cycles of a buffer: dy 48 * 4 * 16 * 1.07 for conflicts = 3.3 k, x
//   8 * 4 * 16 * 1.04 = 0.5 k, written cells 0.8 k, what is read of memory, on its way to
//   registers, 0.8 k: 5.4 k, 148 us.
//   Bytes: x once and dy three times from L2, 537 MB, 90 us at 6 TB/s; from memory 268 MB, 62 us.
//   Sums: 26 MB are written and read, in L2: 8 us.
// The first three were to overlap, in 155 to 170 us; some 140 us more that hardly depend on r are
// in no account here. The staged kernel takes 535 to 570.
// The dense product on tensor cores, with the coordinates taken in its epilogue, is
// 2 * 8 * 2048 * 4096^2 flop whatever r is, 696 us at 790 TFLOP/s: it would win above
// r = 270000, one coordinate in 60.

#pragma once

#include "column_order.h"
#include "cuda/common.cuh"
#include "cuda/sampled_outer.cuh"

namespace dropinf {
namespace cuda {

constexpr int kColumnThreads = kColumnLanes;
constexpr int kColumnSteps = kLaneSteps;
constexpr int kCellPositions = 8;  // of a column in a cell, and of a buffer
constexpr int kCellBytes = 16;
constexpr int kStagingParts = 6;
constexpr int kPartColumns = 4 * kColumnThreads / 2;
constexpr int kDyParts = kColumnOutputs / kPartColumns;  // the other parts are of x
constexpr int kOnesCell = kColumnOutputs + kColumnInputs;
constexpr int kBufferBytes = (kOnesCell + 1) * kCellBytes;
constexpr int kRunSteps = 2;  // steps that are one piece's, and are left out if it has none
constexpr int64_t kColumnChunk = 192;  // positions
constexpr int kColumnSumThreads = 256;
static_assert(kDyParts * kPartColumns == kColumnOutputs, "parts of dy");
static_assert((kStagingParts - kDyParts) * kPartColumns == kColumnInputs, "parts of x");
static_assert(kShortSteps == 2 * kRunSteps && kLongSteps == 4 * kRunSteps, "pieces of runs");

struct ColumnPass {
  int32_t i0, i1, o0, o1;
};

struct ColumnsCall {
  const unsigned char *x, *dy;
  int64_t x_example_bytes, x_row_bytes, dy_example_bytes, dy_row_bytes, T, I, num_chunks;
  const int32_t *packed, *columns;
  float* sums;      // [B, num_chunks, num_passes, kColumnSteps, kColumnThreads]
  uint32_t pieces;  // bit: some lane of some pass has this piece
  int num_passes;
  ColumnPass passes[kMaxColumnPasses];
};

__host__ __device__ constexpr int piece_of(int step) {
  constexpr int kLong = kLongPieces * kLongSteps;
  return step < kLong ? step / int{kLongSteps}
                      : int{kLongPieces} + (step - kLong) / int{kShortSteps};
}

template <typename E>
constexpr uint16_t kOneBits = 0x3f80;
template <>
constexpr uint16_t kOneBits<Float16> = 0x3c00;

__device__ inline void widen_halves(uint32_t word, float* to, BFloat16) {
  to[0] = __uint_as_float(word << 16);
  to[1] = __uint_as_float(word & 0xffff0000u);
}

__device__ inline void widen_halves(uint32_t word, float* to, Float16) {
  to[0] = widen(Float16{static_cast<uint16_t>(word)});
  to[1] = widen(Float16{static_cast<uint16_t>(word >> 16)});
}

template <typename E>
__device__ void read_cell(const unsigned char* cell, float* to) {
  float words[4];
  load_4(reinterpret_cast<const float*>(cell), words);
#pragma unroll
  for (int m = 0; m < 4; ++m) widen_halves(__float_as_uint(words[m]), to + 2 * m, E{});
}

// Four neighbouring columns at four positions: what a thread stages at a time.
template <typename E, bool kAligned>
struct Tile {
  uint64_t rows[4];

  // `left`: how many columns there are, from this one on.
  __device__ void load(int row, const unsigned char* from, int left) {
    if (kAligned) {
      rows[row] = *reinterpret_cast<const uint64_t*>(from);
      return;
    }
    rows[row] = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (n >= left) break;
      rows[row] |= static_cast<uint64_t>(reinterpret_cast<const E*>(from)[n].bits) << 16 * n;
    }
  }

  // Half a cell for each column; those of neighbours lie `apart` bytes from each other.
  __device__ void store(unsigned char* half, int apart) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t words[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        words[m] = __byte_perm(static_cast<uint32_t>(rows[2 * m] >> 32 * (n / 2)),
                               static_cast<uint32_t>(rows[2 * m + 1] >> 32 * (n / 2)),
                               n % 2 ? 0x7632 : 0x5410);
      }
      *reinterpret_cast<uint64_t*>(half + n * apart) = words[0] | uint64_t{words[1]} << 32;
    }
  }
};

// blockIdx.x counts (b, chunk, pass), the passes fastest: they read the same dy. kAligned: four
// columns at a time can be read as 8 bytes. Registers are short: what is cheap to make is made
// again.
template <typename E, bool kAligned>
__global__ void __launch_bounds__(kColumnThreads, 1) columns_kernel(const ColumnsCall call) {
  constexpr int kSize = sizeof(E);
  const int p = blockIdx.x % call.num_passes;
  const int64_t item = blockIdx.x / call.num_passes;
  const int64_t c = item % call.num_chunks, b = item / call.num_chunks;
  const ColumnPass& pass = call.passes[p];
  const int64_t begin = c * kColumnChunk, rest = call.T - begin;
  const int count = static_cast<int>(rest < kColumnChunk ? rest : kColumnChunk);
  unsigned char* const shared = shared_memory<unsigned char>();
  if (threadIdx.x < 2 * kCellPositions) {  // what a bias multiplies
    unsigned char* const buffer = shared + threadIdx.x / kCellPositions * kBufferBytes;
    reinterpret_cast<uint16_t*>(buffer + kOnesCell * kCellBytes)[threadIdx.x % kCellPositions] =
        kOneBits<E>;
  }

  // This thread's first columns of dy and of x, at its first position of the next buffer.
  const int column = threadIdx.x / 2 * 4, half = threadIdx.x % 2;
  const unsigned char* dy = call.dy + b * call.dy_example_bytes +
                            (begin + 4 * half) * call.dy_row_bytes +
                            int64_t{kSize} * (pass.o0 + column);
  const unsigned char* x = call.x + b * call.x_example_bytes +
                           (begin + 4 * half) * call.x_row_bytes +
                           int64_t{kSize} * (pass.i0 + column);
  unsigned char* const to = shared + threadIdx.x / 2 * kCellBytes + half * (kCellBytes / 2);
  const auto left = [&](int part) {  // how many columns there are, from this thread's on
    const int i1 = pass.i1 < call.I ? pass.i1 : static_cast<int>(call.I);
    const int width = part < kDyParts ? pass.o1 - pass.o0 : i1 - pass.i0;
    const int turn = part < kDyParts ? part : part - kDyParts;
    return width - turn * kPartColumns - static_cast<int>(threadIdx.x) / 2 * 4;
  };
  uint32_t there = 0;  // bit: there are columns of this part
  for (int part = 0; part < kStagingParts; ++part) there |= (left(part) > 0 ? 1u : 0u) << part;

  Tile<E, kAligned> tile{};
  // `whole`: of all positions of a buffer, or of none; else of some, and the others are zeros.
  const auto load = [&](int part, int positions, bool whole) {
    const bool is_dy = part < kDyParts;
    const int64_t row_bytes = is_dy ? call.dy_row_bytes : call.x_row_bytes;
    const unsigned char* row =
        (is_dy ? dy : x) + (is_dy ? part : part - kDyParts) * kPartColumns * kSize;
    make_opaque(there);  // or every part's bit is kept
    const bool mine = (there >> part & 1) && positions > 0;
#pragma unroll
    for (int u = 0; u < 4; ++u, row += row_bytes) {
      if (mine && (whole || static_cast<int>(threadIdx.x) % 2 * 4 + u < positions)) {
        tile.load(u, row, kAligned ? 4 : left(part));
      } else if (!whole) {
        tile.rows[u] = 0;
      }
    }
  };
  const auto store = [&](int part, unsigned char* buffer) {  // of no columns: what nobody reads
    constexpr int kPartBytes = kPartColumns / 4 * kCellBytes;
    if (part < kDyParts) {
      tile.store(buffer + part * kPartBytes, kColumnOutputs / 4 * kCellBytes);
    } else {
      tile.store(buffer + kColumnOutputs * kCellBytes + (part - kDyParts) * kPartBytes,
                 kColumnInputs / 4 * kCellBytes);
    }
  };
  const auto stage = [&](unsigned char* buffer, int positions) {
#pragma unroll 1
    for (int part = 0; part < kStagingParts; ++part) {
      load(part, positions, false);
      store(part, buffer);
    }
  };

  stage(to, count);
  const int32_t* const columns =
      call.columns + static_cast<int64_t>(p) * kLanePieces * kColumnThreads + threadIdx.x;
  uint32_t packed[kColumnSteps / 2];
  float sums[kColumnSteps];
#pragma unroll
  for (int k = 0; k < kColumnSteps / 2; ++k) {
    packed[k] = static_cast<uint32_t>(
        call.packed[(static_cast<int64_t>(p) * (kColumnSteps / 2) + k) * kColumnThreads +
                    threadIdx.x]);
    sums[2 * k] = sums[2 * k + 1] = 0.0f;
  }
  __syncthreads();

#pragma unroll 1
  for (int n = 0; n * kCellPositions < count; ++n) {
    const unsigned char* const cells = shared + n % 2 * kBufferBytes;
    unsigned char* const next = to + (1 - n % 2) * kBufferBytes;
    const int positions = count - (n + 1) * kCellPositions;  // from the next buffer on
    dy += kCellPositions * call.dy_row_bytes;
    x += kCellPositions * call.x_row_bytes;
#pragma unroll
    for (int part = 0; part < kStagingParts; ++part) {
      if (kAligned) load(part, positions >= kCellPositions, true);
      constexpr int kRuns = kColumnSteps / kRunSteps / kStagingParts;
      float x_values[kCellPositions];
#pragma unroll
      for (int run = part * kRuns; run < (part + 1) * kRuns; ++run) {
        if (!(call.pieces >> piece_of(run * kRunSteps) & 1)) continue;
#pragma unroll
        for (int k = run * kRunSteps; k < (run + 1) * kRunSteps; ++k) {
          if (k == 0 || piece_of(k) != piece_of(k - 1)) {
            read_cell<E>(cells + columns[piece_of(k) * kColumnThreads], x_values);
          }
          make_opaque(packed[k / 2]);  // or offsets of every k are kept, and registers spill
          const uint32_t at = k % 2 ? packed[k / 2] >> 16 : packed[k / 2] & 0xffff;
          float dy_values[kCellPositions];
          read_cell<E>(cells + at, dy_values);
#pragma unroll
          for (int u = 0; u < kCellPositions; ++u) sums[k] += x_values[u] * dy_values[u];
        }
      }
      if (kAligned) store(part, next);
    }
    if (positions > 0 && !(kAligned && positions >= kCellPositions)) stage(next, positions);
    __syncthreads();
  }

  float* const sums_to =
      call.sums + static_cast<int64_t>(blockIdx.x) * kColumnSteps * kColumnThreads + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kColumnSteps; ++k) sums_to[k * kColumnThreads] = sums[k];
}

}  // namespace cuda
}  // namespace dropinf
