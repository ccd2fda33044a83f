// Solutions with the factors of layers that do not fit in shared memory, see cholesky_wide.cuh.

#pragma once

#include "cuda/cholesky_substitution.cuh"
#include "cuda/cholesky_wide_tiles.cuh"

namespace dropinf {
namespace cuda {
namespace wide {

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

inline cudaError_t solve(const Layers& all, cudaStream_t stream) {
  const int64_t floats = kTile + kRows * kStride;
  const int64_t bytes = floats * sizeof(float) + shared_bytes(kBlock, kRows);
  return launch(solve_kernel, grid_of(all.count * ceil_div<int64_t>(all.m, kRows)), kThreads, bytes,
                stream, all);
}

}  // namespace wide
}  // namespace cuda
}  // namespace dropinf
