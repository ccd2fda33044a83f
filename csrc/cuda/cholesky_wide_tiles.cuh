// Tiles of layers that do not fit in shared memory: on their way there, and their products. See
// cholesky_wide.cuh.

#pragma once

#include "cuda/cholesky_layer.cuh"
#include "cuda/common.cuh"
#include "cuda/layer_table.cuh"

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

struct Layers : LayerTable<Layer, kMaxLayers> {  // the widest first
  int step;                                      // -1: the first tile
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

}  // namespace wide
}  // namespace cuda
}  // namespace dropinf
