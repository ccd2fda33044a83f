// Layers that one block's shared memory does not hold: kBlock columns a step, of all layers in the
// same two launches. What is left of a matrix lies in the factors' memory.
//
//     panel_kernel    rows below the step's block on the diagonal, times the inverse of its factor
//     update_kernel   every tile further right, less the products of those rows; the block that has
//                     the next tile on the diagonal factorises it, while others still multiply
//
// A first update without products factorises the first tile. Layers are sorted, so that those with
// a step left are the first ones. A layer's own last launch, a single tile, fills it with NaN if
// one of its pivots was bad; until then its sums go on with whatever that pivot left.
//
// Solutions: one launch, in which a block has kRows right-hand sides of a layer and goes down its
// factor and up again; a tile is read while the one before is multiplied.
//
// Predicted, not measured, for 50 layers on an H200 (132 SMs at 1.75 GHz, 67 TFLOP/s, 4.3 TB/s). A
// tile is 64³ multiply-adds: 2048 cycles of an SM at its peak, 3400 at the 60% expected here. A
// tile on the diagonal takes 8.5 µs (load 1000 cycles, products 2500, factor 11000), rows of a
// panel 3.6 µs (load 1500, 56 sums of 60 cycles and 8 corners of 150), a launch 2 µs.
//
//     r                                             512                1024
//     tiles a layer, over all updates               84                  680
//     updates: arithmetic, µs                       62                  500
//       of which the late ones wait for the factor  +20                 +20
//     panels, µs                                    25                   68
//     15 and 31 launches, first tile, µs            37                   69
//     together, µs                                  145                 660
//     DRAM (the tiles' reads and writes), µs        (in the L2)         260, behind the arithmetic
//     16 right-hand sides, µs                       55                  160
//
// of which the solution is 2 × 36 (136) tiles of 700 cycles and 2 × 8 (16) triangles of 2800.
// torch's batched factorization, cuSOLVER's potrfBatched, was measured elsewhere at 1261 µs for 64
// layers of 512. Its arithmetic is the same, so that a ratio below 1 would need 6 times less than
// the efficiency assumed here.

#pragma once

#include <algorithm>

#include "cholesky.h"
#include "cuda/cholesky_layer.cuh"
#include "cuda/cholesky_substitution.cuh"
#include "cuda/common.cuh"

namespace dropinf {
namespace cuda {
namespace wide {

constexpr int kBlock = 64;
constexpr int kStride = kBlock + 4;  // of rows in shared memory: an odd number of 16 bytes
constexpr int kTile = kBlock * kStride;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kAcross = 16, kDown = kThreads / kAcross;  // threads on a tile
constexpr int kWidth = kBlock / kAcross;                 // columns of a thread, kAcross apart
constexpr int kRows = 16;                                // right-hand sides of a block
constexpr int kMaxLayers = 128;                          // 3 KB of arguments in every launch
static_assert(kRows * kPanel == kThreads, "a right-hand side has a team");

struct Layers {
  Layer layers[kMaxLayers];  // the widest first
  int count;
  int step;  // -1: the first tile
  const float* matrices;
  float* factors;
  const float* shift;
  int32_t* info;
  const float* rows;
  float* solved;
  int64_t m, rows_stride, solved_stride;
};

__device__ inline const Layer& layer_of(const Layers& all) {
  return all.layers[blockIdx.x % all.count];
}

// Where a tile starts. Within a tile 32 bits suffice.
template <typename T>
__device__ inline T* tile_at(T* matrix, int n, int i, int j) {
  return matrix + int64_t{i} * n + j;
}

// Rows of a matrix [n, n] from (i, j) on to shared memory, a warp a row; zeros below the matrix.
template <int count>
__device__ inline void load_rows(const float* matrix, int n, int i, int j, float* to) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const float* const from = tile_at(matrix, n, i, j);
#pragma unroll 8
  for (int row = warp; row < count; row += kWarps) {
#pragma unroll
    for (int k = lane; k < kBlock; k += kWarp) {
      to[row * kStride + k] = row < n - i ? from[row * n + k] : 0.0f;
    }
  }
}

// The factor of a whole tile on the diagonal, and the inverses.
__device__ inline void load_triangle(const float* matrix, int n, int i, const Shared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const float* const from = tile_at(matrix, n, i, i);
#pragma unroll 8
  for (int row = warp; row < kBlock; row += kWarps) {
#pragma unroll
    for (int k = lane; k < kBlock; k += kWarp) {
      const float value = k <= row ? from[row * n + k] : 0.0f;
      if (k < row / kPanel * kPanel + kPanel) shared.triangle[row_start(row) + k] = value;
      if (k == row) shared.inverses[k] = 1.0f / value;
    }
  }
}

// What a thread has of a tile of kDown * height rows: every kDown-th row, every kAcross-th column.
template <int height>
using Sums = float[height][kWidth];

__device__ inline int first_row() { return threadIdx.x / kAcross; }
__device__ inline int first_column() { return threadIdx.x % kAcross; }

// sums += the products of rows of two tiles.
template <int height>
__device__ inline void multiply(const float* left, const float* right, Sums<height>& sums) {
  const float* const a = left + first_row() * kStride;
  const float* const b = right + first_column() * kStride;
#pragma unroll 2
  for (int k = 0; k < kBlock; k += 4) {
    float y[kWidth][4];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) load_4(b + j * kAcross * kStride + k, y[j]);
#pragma unroll
    for (int i = 0; i < height; ++i) {
      float x[4];
      load_4(a + i * kDown * kStride + k, x);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j] = fmaf(x[e], y[j][e], sums[i][j]);
      }
    }
  }
}

// sums[c] = the products of a row and of row c of a panel, over four columns of every `step` in
// [0, count).
__device__ inline void panel_sums(const float* own, const float* panel, int panel_stride, int count,
                                  int step, float (&sums)[kPanel]) {
#pragma unroll
  for (int c = 0; c < kPanel; ++c) sums[c] = 0.0f;
#pragma unroll 2
  for (int k = 0; k < count; k += step) {
    float x[4];
    load_4(own + k, x);
#pragma unroll
    for (int c = 0; c < kPanel; ++c) {
      float y[4];
      load_4(panel + c * panel_stride + k, y);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[c] = fmaf(x[e], y[e], sums[c]);
    }
  }
}

// Blocks (rows, layer): a thread solves for a row.
__global__ void __launch_bounds__(kThreads, 4) panel_kernel(const Layers all) {
  const Layer& layer = layer_of(all);
  const int n = layer.width, first = all.step * kBlock;
  const int i = first + kBlock + static_cast<int>(blockIdx.x) / all.count * kThreads;
  if (i >= n) return;
  float* const factor = all.factors + layer.matrix;
  float* const tile = shared_memory<float>();
  const Shared shared(tile + kThreads * kStride, kBlock);
  load_triangle(factor, n, first, shared);
  load_rows<kThreads>(all.step == 0 ? all.matrices + layer.matrix : factor, n, i, first, tile);
  __syncthreads();
  float* const own = tile + threadIdx.x * kStride;
  for (int k = 0; k < kBlock; k += kPanel) {
    float sums[kPanel], t[kPanel];
    panel_sums(own, shared.triangle + row_start(k), k + 12, k, 4, sums);
    load_8(own + k, t);
#pragma unroll
    for (int c = 0; c < kPanel; ++c) t[c] -= sums[c];
    solve_corner(shared, k, t);
    store_8(t, own + k);
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float* const to = tile_at(factor, n, i, first);
#pragma unroll 4
  for (int row = warp; row < kThreads && row < n - i; row += kWarps) {
#pragma unroll
    for (int k = lane; k < kBlock; k += kWarp) to[row * n + k] = tile[row * kStride + k];
  }
  if (all.step > 0) return;
  for (int row = warp; row < kBlock; row += kWarps) {  // above the diagonal
    for (int k = lane; k < kThreads && k < n - i; k += kWarp) factor[row * n + i + k] = 0.0f;
  }
}

// The factor of the tile at (i, i), in registers.
__device__ inline void factor_tile(const Layers& all, const Layer& layer, int i,
                                   const Sums<kBlock / kDown>& values, const Shared& shared) {
  const int n = layer.width;
  float* const factor = all.factors + layer.matrix;
  const int earlier = all.step < 0 ? 0 : all.info[layer.index];
#pragma unroll
  for (int r = 0; r < kBlock / kDown; ++r) {
    const int row = first_row() + r * kDown;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const int column = first_column() + c * kAcross;
      float value = row == column ? 1.0f : 0.0f;
      if (row < n - i && column <= row) value = values[r][c];
      if (column < row / kPanel * kPanel + kPanel) shared.triangle[row_start(row) + column] = value;
    }
  }
  __syncthreads();
  const int bad = factorise(shared, kBlock);
  const int pivot = earlier || !bad ? earlier : i + bad;
  if (threadIdx.x == 0) all.info[layer.index] = pivot;
  if (pivot && i + kBlock >= n) {
    for (int64_t k = threadIdx.x; k < int64_t{n} * n; k += kThreads) factor[k] = not_a_number();
    return;
  }
  const int lane = threadIdx.x % kWarp;
  float* const to = tile_at(factor, n, i, i);
#pragma unroll 4
  for (int row = threadIdx.x / kWarp; row < kBlock && row < n - i; row += kWarps) {
#pragma unroll
    for (int k = lane; k < kBlock; k += kWarp) {
      if (k < n - i) to[row * n + k] = k <= row ? shared.triangle[row_start(row) + k] : 0.0f;
    }
  }
}

// Blocks (tile, layer), the first of which have the tiles that are factorised.
__global__ void __launch_bounds__(kThreads, 4) update_kernel(const Layers all) {
  constexpr int kHeight = kBlock / kDown;
  const Layer& layer = layer_of(all);
  const int n = layer.width, first = all.step * kBlock;
  int row = 0, left = static_cast<int>(blockIdx.x) / all.count;
  while (left > row) left -= ++row;
  const int i = first + (1 + row) * kBlock, j = first + (1 + left) * kBlock;
  if (i >= n) return;
  float* const factor = all.factors + layer.matrix;
  const float* const from = tile_at(all.step > 0 ? factor : all.matrices + layer.matrix, n, i, j);
  const float shift = all.step > 0 ? 0.0f : all.shift[layer.index];
  // Whether this thread's place in the tile is on or below the diagonal, and where.
  const auto place = [&](int r, int c, int* at) {
    const int row = first_row() + r * kDown, column = first_column() + c * kAcross;
    *at = row * n + column;
    return row < n - i && column + j <= row + i;
  };

  float* const tile = shared_memory<float>();
  float* const other = i == j ? tile : tile + kTile;
  Sums<kHeight> sums{};
  if (all.step >= 0) {
    load_rows<kBlock>(factor, n, i, first, tile);
    if (i != j) load_rows<kBlock>(factor, n, j, first, other);
    __syncthreads();
    multiply<kHeight>(tile, other, sums);
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kHeight; ++r) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      int at;
      float value = place(r, c, &at) ? from[at] : 0.0f;
      if (i == j && first_row() + r * kDown == first_column() + c * kAcross) value += shift;
      sums[r][c] = value - sums[r][c];
    }
  }
  if (row == 0) {
    factor_tile(all, layer, i, sums, Shared(tile, kBlock));
    return;
  }
  float* const to = tile_at(factor, n, i, j);
#pragma unroll
  for (int r = 0; r < kHeight; ++r) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      int at;
      if (place(r, c, &at)) to[at] = sums[r][c];
    }
  }
  if (all.step > 0 || i == j) return;
  float* const above = tile_at(factor, n, j, i);
  for (int k = threadIdx.x; k < kBlock * kBlock; k += kThreads) {
    if (k % kBlock < n - i) above[k / kBlock * n + k % kBlock] = 0.0f;
  }
}

constexpr int kPart = kBlock * kBlock / kThreads;

struct Place {
  int row, column;
};

// Entry e of a thread's part of a tile. Across: 8 columns of 4 rows, so that a warp writes to all
// banks when it stores columns as rows.
template <bool across>
__device__ inline Place place_of(uint32_t thread, int e) {
  const int lane = thread % kWarp, warp = thread / kWarp;
  if (across) return {e / 8 * 16 + warp * 4 + lane / 8, e % 8 * 8 + lane % 8};
  return {warp + e / 2 * kWarps, lane + e % 2 * kWarp};
}

// The thread's index, of which nothing is kept in registers from one tile to the next.
__device__ inline uint32_t forgotten_thread() {
  uint32_t thread = threadIdx.x;
  make_opaque(thread);
  return thread;
}

// Zeros below the matrix, and above the diagonal what is there.
template <bool across>
__device__ inline void fetch(const float* factor, int n, int i, int j, float (&part)[kPart]) {
  const float* const from = tile_at(factor, n, i, j);
  const uint32_t thread = forgotten_thread();
#pragma unroll
  for (int e = 0; e < kPart; ++e) {
    const Place at = place_of<across>(thread, e);
    part[e] = at.row < n - i && at.column < n - j ? from[at.row * n + at.column] : 0.0f;
  }
}

// One pass over the factor, from its first block of columns to its last or back: right-hand sides
// less the products with what is solved already, then the triangle.
template <bool back>
__device__ inline void substitute(const Layers& all, const Layer& layer, int64_t first_q,
                                  float* memory) {
  constexpr int kHeight = kRows / kDown;
  float* const tile = memory;
  float* const solved_tile = tile + kTile;
  const Shared shared(solved_tile + kRows * kStride, kBlock);
  const int n = layer.width, last = (n - 1) / kBlock;
  const float* const factor = all.matrices + layer.matrix;
  float* const solved = all.solved + first_q * all.solved_stride + layer.column;
  const float* const rows = back ? solved : all.rows + first_q * all.rows_stride + layer.column;
  const int64_t rows_stride = back ? all.solved_stride : all.rows_stride;
  const int num_rows = all.m - first_q < kRows ? static_cast<int>(all.m - first_q) : kRows;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto block = [&](int turn) { return (back ? last - turn : turn) * kBlock; };
  float part[kPart];

  fetch<false>(factor, n, block(0), block(0), part);
  for (int turn = 0; turn <= last; ++turn) {
    const int k = block(turn), in_layer = n - k < kBlock ? n - k : kBlock;
    Sums<kHeight> sums{};
    // The last tile of a turn is that on the diagonal.
    for (int done = 0; done <= turn; ++done) {
      const int j = block(done);
      const bool diagonal = done == turn;
      const uint32_t thread = forgotten_thread();
      __syncthreads();
      if (!diagonal) {
#pragma unroll
        for (int q = warp; q < kRows; q += kWarps) {
#pragma unroll
          for (int c = lane; c < kBlock; c += kWarp) {
            const bool there = q < num_rows && c < n - j;
            solved_tile[q * kStride + c] = there ? solved[q * all.solved_stride + j + c] : 0.0f;
          }
        }
#pragma unroll
        for (int e = 0; e < kPart; ++e) {
          const Place at = place_of<back>(thread, e);
          tile[back ? at.column * kStride + at.row : at.row * kStride + at.column] = part[e];
        }
      } else {
#pragma unroll
        for (int r = 0; r < kHeight; ++r) {
          const int q = first_row() + r * kDown;
#pragma unroll
          for (int c = 0; c < kWidth; ++c) {
            const int column = first_column() + c * kAcross;
            const bool there = q < num_rows && column < in_layer;
            const float value = there ? rows[q * rows_stride + k + column] : 0.0f;
            shared.slots[q * kStride + column] = value - sums[r][c];
          }
        }
#pragma unroll
        for (int e = 0; e < kPart; ++e) {
          const Place at = place_of<false>(thread, e);
          const bool pads = at.row >= in_layer && at.row == at.column;
          const float value = pads ? 1.0f : part[e];
          if (at.column < at.row / kPanel * kPanel + kPanel) {
            shared.triangle[row_start(at.row) + at.column] = value;
          }
          if (at.row == at.column) shared.inverses[at.row] = 1.0f / value;
        }
      }
      const int next_turn = diagonal ? turn + 1 : turn, next_done = diagonal ? 0 : done + 1;
      const int next_k = block(next_turn), next_j = block(next_done);
      if (next_turn == next_done) {
        fetch<false>(factor, n, next_k, next_k, part);
      } else if (next_turn <= last) {
        fetch<back>(factor, n, back ? next_j : next_k, back ? next_k : next_j, part);
      }
      __syncthreads();
      if (!diagonal) multiply<kHeight>(solved_tile, tile, sums);
    }
    float* const slot = shared.slots + threadIdx.x / kPanel * kStride;
    if (back) {
      solve_upper(shared, kBlock, kPanel, true, slot);
    } else {
      solve_lower(shared, kBlock, in_layer, kPanel, true, slot);
    }
    __syncthreads();
    for (int q = warp; q < num_rows; q += kWarps) {
      for (int c = lane; c < in_layer; c += kWarp) {
        solved[q * all.solved_stride + k + c] = shared.slots[q * kStride + c];
      }
    }
  }
}

// Blocks (right-hand sides, layer); the matrices are factors.
__global__ void __launch_bounds__(kThreads, 3) solve_kernel(const Layers all) {
  const Layer& layer = layer_of(all);
  const int64_t first_q = int64_t{blockIdx.x / all.count} * kRows;
  substitute<false>(all, layer, first_q, shared_memory<float>());
  __syncthreads();
  substitute<true>(all, layer, first_q, shared_memory<float>());
}

inline cudaError_t factor(Layers all, cudaStream_t stream) {
  const int64_t panel_bytes = shared_bytes(kBlock, 0) + kThreads * kStride * sizeof(float);
  const int64_t num_tiles = ceil_div<int64_t>(all.layers[0].width, kBlock);
  for (all.step = -1; all.step + 1 < num_tiles; ++all.step) {
    const int64_t below = num_tiles - all.step - 1;  // tiles
    while (ceil_div<int64_t>(all.layers[all.count - 1].width, kBlock) <= all.step + 1) --all.count;
    if (all.step >= 0) {
      const dim3 grid = grid_of(all.count * ceil_div<int64_t>(below * kBlock, kThreads));
      const cudaError_t error = launch(panel_kernel, grid, kThreads, panel_bytes, stream, all);
      if (error != cudaSuccess) return error;
    }
    const int64_t tiles = all.step < 0 ? 1 : below * (below + 1) / 2;
    const cudaError_t error = launch(update_kernel, grid_of(all.count * tiles), kThreads,
                                     2 * kTile * sizeof(float), stream, all);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

inline cudaError_t solve(const Layers& all, cudaStream_t stream) {
  const int64_t floats = kTile + kRows * kStride;
  const int64_t bytes = floats * sizeof(float) + shared_bytes(kBlock, kRows);
  return launch(solve_kernel, grid_of(all.count * ceil_div<int64_t>(all.m, kRows)), kThreads, bytes,
                stream, all);
}

}  // namespace wide

// Factorises and solves as `args` says, for these layers, of which the first is the widest.
inline cudaError_t cholesky_wide(const CholeskyArgs& args, const Layer* layers, int64_t num_layers,
                                 cudaStream_t stream) {
  wide::Layers all{};
  all.shift = args.shift;
  all.info = args.info;
  all.rows = args.rows;
  all.solved = args.solved;
  all.m = args.m;
  all.rows_stride = args.rows_stride;
  all.solved_stride = args.solved_stride;
  for (int64_t k = 0; k < num_layers; k += all.count) {
    all.count = static_cast<int>(std::min<int64_t>(num_layers - k, wide::kMaxLayers));
    std::copy_n(layers + k, all.count, all.layers);
    all.matrices = args.matrices;
    if (args.info) {
      all.factors = args.factors;
      const cudaError_t error = wide::factor(all, stream);
      if (error != cudaSuccess) return error;
      all.matrices = args.factors;
    }
    if (args.m == 0) continue;
    const cudaError_t error = wide::solve(all, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace dropinf
