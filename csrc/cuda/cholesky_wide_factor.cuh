// The factors of layers that do not fit in shared memory, see cholesky_wide.cuh.

#pragma once

#include "cuda/cholesky_substitution.cuh"
#include "cuda/cholesky_wide_tiles.cuh"

namespace dropinf {
namespace cuda {
namespace wide {

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

}  // namespace wide
}  // namespace cuda
}  // namespace dropinf
