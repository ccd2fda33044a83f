// Layers that one block's shared memory does not hold: kBlock columns a step, of all layers in the
// same two launches. What is left of a matrix lies in the factors' memory.
//
//     panel_kernel    rows below the step's block on the diagonal, solved with its factor
//     update_kernel   every tile further right, less the products of those rows; the block that has
//                     the next tile on the diagonal factorises it, while others still multiply
//
// A first update without products factorises the first tile. Layers are sorted, so that those with
// a step left are the first ones. A layer's own last launch, a single tile, fills it with NaN if
// one of its pivots was bad; until then its sums go on with whatever that pivot left.
//
// Solutions: one launch, in which a block has kRows right-hand sides of a layer and goes down its
// factor and up again; a tile is read while the one before is multiplied. The products' sums start
// from zero and are then subtracted: sums that start from what they are subtracted from have three
// times the residual.
//
// Measured for 50 layers on an H200: 255 µs at r = 512 and 1243 at 1024 (torch 876 and 3215), with
// 16 right-hand sides 422 and 1924. Predicted for it (132 SMs at 1.75 GHz, 67 TFLOP/s, 4.3 TB/s). A
// tile is 64³ multiply-adds: 2048 cycles of an SM at its peak, 3400 at the 60% expected here (256
// of the loop's 287 instructions multiply; the rest is for loads that nothing hides). A tile on the
// diagonal takes 8.5 µs (load 1000 cycles, products 2500, factor 11000), rows of a panel 3.6 µs
// (load 1500, 56 sums of 60 cycles and 8 corners of 150), 4.5 where there are many, a launch 2 µs.
//
//     r                                             512                1024
//     tiles a layer, over all updates               84                  680
//     updates: arithmetic, µs                       62                  500
//       late ones, which wait for the factor, µs   +20                  +20
//     panels, µs                                    25                   68
//     15 and 31 launches, first tile, µs            37                   69
//     together, µs                                 145                  660
//     DRAM (the tiles' reads and writes), µs       (in the L2)          260, behind the arithmetic
//     16 right-hand sides, µs                       75                  230
//
// of which the last are 2 x 36 (136) tiles of 1150 cycles, 664 of them products, and 2 x 8 (16)
// triangles of 2800, on 50 SMs. torch's batched factorization, cuSOLVER's potrfBatched, was
// measured elsewhere at 1261 µs for 64 layers of 512, 985 for 50: 6.8 times as long.

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

template <typename T>
__device__ inline T* tile_at(T* matrix, int n, int i, int j) {
  return matrix + int64_t{i} * n + j;
}

// Rows of a matrix [n, n] from (i, j) on to shared memory, a warp a row; zeros below the matrix.
template <int count>
__device__ inline void load_rows(const float* matrix, int n, int i, int j, float* to) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const float* from = tile_at(matrix, n, i + warp, j + lane);
  to += warp * kStride + lane;
#pragma unroll 16
  for (int row = 0; row < count; row += kWarps) {
    const bool there = warp + row < n - i;
    const float left = there ? from[0] : 0.0f, right = there ? from[kWarp] : 0.0f;
    to[row * kStride] = left;
    to[row * kStride + kWarp] = right;
    from += int64_t{kWarps} * n;
  }
}

// What divides by the diagonal, once the triangle is there.
__device__ inline void invert_diagonal(const Shared& shared) {
  const int i = threadIdx.x;
  if (i < kBlock) shared.inverses[i] = 1.0f / shared.triangle[row_start(i) + i];
  __syncthreads();
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

// A tile, or the triangle of one on the diagonal, on its way through registers: a thread has
// entries of every kWarps-th row, zeros below the matrix.
constexpr int kPartRows = kBlock / kWarps;
using Part = float[kPartRows][2];

__device__ inline void fetch(const float* matrix, int n, int i, int j, Part& part) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const float* from = tile_at(matrix, n, i + warp, j + lane);
#pragma unroll
  for (int e = 0; e < kPartRows; ++e) {
    const int row = warp + e * kWarps;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const bool there = row < n - i && (i != j || lane + c * kWarp <= row);
      part[e][c] = there ? from[c * kWarp] : 0.0f;
    }
    from += int64_t{kWarps} * n;
  }
}

__device__ inline void store(const Part& part, float* tile) {
  float* const to = tile + threadIdx.x / kWarp * kStride + threadIdx.x % kWarp;
#pragma unroll
  for (int e = 0; e < kPartRows; ++e) {
#pragma unroll
    for (int c = 0; c < 2; ++c) to[e * kWarps * kStride + c * kWarp] = part[e][c];
  }
}

// What pads the triangle, from row n on, is of the unit matrix.
__device__ inline void store_triangle(const Part& part, int n, const Shared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int e = 0; e < kPartRows; ++e) {
    const int panel = e * kWarps / kPanel, row_in_panel = e * kWarps % kPanel + warp;
    const int row = panel * kPanel + row_in_panel;
    float* const to =
        shared.triangle + row_start(panel * kPanel) + row_in_panel * (kPanel * panel + 12);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = lane + c * kWarp;
      const float value = row >= n && row == column ? 1.0f : part[e][c];
      if (column < (panel + 1) * kPanel) to[column] = value;
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

// The same of the transposed tile: 8 columns of 4 rows, so that a warp writes to all banks.
__device__ inline void fetch_across(const float* matrix, int n, int i, int j, Part& part) {
  const int row = threadIdx.x / 8;
  const float* from = tile_at(matrix, n, i + row, j + threadIdx.x % 8);
#pragma unroll
  for (int e = 0; e < kBlock; e += 16) {
    const bool there = row + e < n - i;
#pragma unroll
    for (int c = 0; c < 8; ++c) part[e / 4 + c / 2][c % 2] = there ? from[c * 8] : 0.0f;
    from += int64_t{16} * n;
  }
}

__device__ inline void store_across(const Part& part, float* tile) {
  float* const to = tile + threadIdx.x % 8 * kStride + threadIdx.x / 8;
#pragma unroll
  for (int e = 0; e < kBlock; e += 16) {
#pragma unroll
    for (int c = 0; c < 8; ++c) to[c * 8 * kStride + e] = part[e / 4 + c / 2][c % 2];
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
  Part triangle;
  fetch(factor, n, first, first, triangle);
  load_rows<kThreads>(all.step == 0 ? all.matrices + layer.matrix : factor, n, i, first, tile);
  store_triangle(triangle, kBlock, shared);
  __syncthreads();
  invert_diagonal(shared);
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
  const auto there = [&](int r, int c) {
    const int row = first_row() + r * kDown, column = first_column() + c * kAcross;
    return row < n - i && (i != j || column <= row);
  };
  const float* const source = all.step > 0 ? factor : all.matrices + layer.matrix;
  const float* from = tile_at(source, n, i + first_row(), j + first_column());
  const float shift = all.step > 0 || i != j ? 0.0f : all.shift[layer.index];
#pragma unroll
  for (int r = 0; r < kHeight; ++r) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      float value = there(r, c) ? from[c * kAcross] : 0.0f;
      if (first_row() + r * kDown == first_column() + c * kAcross) value += shift;
      sums[r][c] = value - sums[r][c];
    }
    from += int64_t{kDown} * n;
  }
  if (row == 0) {
    factor_tile(all, layer, i, sums, Shared(tile, kBlock));
    return;
  }
  float* to = tile_at(factor, n, i + first_row(), j + first_column());
#pragma unroll
  for (int r = 0; r < kHeight; ++r) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      if (there(r, c)) to[c * kAcross] = sums[r][c];
    }
    to += int64_t{kDown} * n;
  }
  if (all.step > 0 || i == j) return;
  float* const above = tile_at(factor, n, j, i);
  for (int k = threadIdx.x; k < kBlock * kBlock; k += kThreads) {
    if (k % kBlock < n - i) above[k / kBlock * n + k % kBlock] = 0.0f;
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
  Part part;

  fetch(factor, n, block(0), block(0), part);
  for (int turn = 0; turn <= last; ++turn) {
    const int k = block(turn), in_layer = n - k < kBlock ? n - k : kBlock;
    Sums<kHeight> sums{};
    // The last tile of a turn is that on the diagonal.
    for (int done = 0; done <= turn; ++done) {
      const int j = block(done);
      const bool diagonal = done == turn;
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
        if (back) {
          store_across(part, tile);
        } else {
          store(part, tile);
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
        store_triangle(part, in_layer, shared);
      }
      const int next_turn = diagonal ? turn + 1 : turn, next_done = diagonal ? 0 : done + 1;
      const int next_k = block(next_turn), next_j = block(next_done);
      if (next_turn == next_done || (!back && next_turn <= last)) {
        fetch(factor, n, next_k, next_j, part);
      } else if (next_turn <= last) {
        fetch_across(factor, n, next_j, next_k, part);
      }
      __syncthreads();
      if (!diagonal) multiply<kHeight>(solved_tile, tile, sums);
    }
    invert_diagonal(shared);
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
__global__ void __launch_bounds__(kThreads, 2) solve_kernel(const Layers all) {
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
