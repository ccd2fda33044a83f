// One layer in the shared memory of a block, and its factor; solutions are in
// cholesky_substitution.cuh.
//
// The factorisation is left-looking, kPanel columns at a time, with one barrier a panel. A thread a
// row factorises the panel's own 8 x 8 block for itself, which needs no shuffles, and finishes its
// row in the same registers; each warp has a copy of the block. Its entries still lack the products
// over the 8 columns of the panel before; those over all columns further left were subtracted by
// other warps meanwhile, which work one panel ahead. Diagonals hold what the roots are taken of,
// until all are taken at once.
//
// Rows lie one behind the other. Row i is padded to 8 (i / 8) + 12 floats: an odd number of 16
// bytes, the same for the 8 rows whose 16-byte reads are served together, which then fall into
// different banks. Of the panel's rows the threads of a warp, or a lane in each of its teams, read
// the same address.

#pragma once

#include "cuda/common.cuh"

namespace dropinf {
namespace cuda {

constexpr int kPanel = 8;

struct Layer {
  int64_t column, matrix;  // where it starts in the rows and in the matrices
  int32_t width;
  int32_t index;
};

__host__ __device__ constexpr int padded(int width) {
  return (width + kPanel - 1) / kPanel * kPanel;
}

// Where row i starts, and the floats before row N, a multiple of 8, does.
__host__ __device__ constexpr int row_start(int i) {
  const int h = i / kPanel;
  return 32 * h * (h + 2) + i % kPanel * (kPanel * h + 12);
}

// What a block has in shared memory, for a layer padded to N.
struct Shared {
  float* triangle;
  float* inverses;  // [N] of the diagonal
  float* corners;  // [ceil(N / kWarp), kPanel, kPanel]: of a warp the panel's block on the diagonal
  int* bad;        // 4 ints, of which one is used
  float* slots;    // [num_slots, N + 4]: right-hand sides

  __device__ Shared(float* start, int N)
      : triangle(start),
        inverses(triangle + row_start(N)),
        corners(inverses + N),
        bad(reinterpret_cast<int*>(corners + ceil_div(N, kWarp) * kPanel * kPanel)),
        slots(reinterpret_cast<float*>(bad + 4)) {}
};

__host__ __device__ constexpr int64_t shared_bytes(int N, int num_slots) {
  const int corners = ceil_div(N, kWarp) * kPanel * kPanel;
  return sizeof(float) * (row_start(N) + N + corners + 4 + int64_t{num_slots} * (N + 4));
}

__device__ inline void load_8(const float* from, float (&to)[kPanel]) {
  load_4(from, to);
  load_4(from + 4, to + 4);
}

__device__ inline void store_8(const float (&from)[kPanel], float* to) {
  store_4(from, to);
  store_4(from + 4, to + 4);
}

// The factor of a panel's block on the diagonal, but for its diagonal, of which it has what the
// roots are taken of and their inverses; returns its first bad pivot from 1, or 0.
__device__ inline int factor_corner(const float* corner, float (&l)[kPanel][kPanel],
                                    float (&inverses)[kPanel]) {
  int bad = 0;
#pragma unroll
  for (int c = 0; c < kPanel; ++c) {
    load_4(corner + c * kPanel, l[c]);
    if (c >= 4) load_4(corner + c * kPanel + 4, l[c] + 4);
  }
#pragma unroll
  for (int c = 0; c < kPanel; ++c) {
    if (!(l[c][c] > 0.0f) && bad == 0) bad = c + 1;
    inverses[c] = inverse_root(l[c][c]);
#pragma unroll
    for (int i = c + 1; i < kPanel; ++i) l[i][c] *= inverses[c];
#pragma unroll
    for (int i = c + 1; i < kPanel; ++i) {
#pragma unroll
      for (int j = c + 1; j <= i; ++j) l[i][j] = fmaf(-l[i][c], l[j][c], l[i][j]);
    }
  }
  return bad;
}

// Adds up in pairs of lanes, whose indices differ in one bit: the lower lane gets the first half of
// the sums, the other one the second.
template <int kept, int count>
__device__ void halve_sums(float (&sums)[count], int bit) {
  const bool upper = threadIdx.x & bit;
#pragma unroll
  for (int v = 0; v < kept; ++v) {
    const float give = upper ? sums[v] : sums[v + kept];
    const float keep = upper ? sums[v + kept] : sums[v];
    sums[v] = keep + __shfl_xor_sync(kAllLanes, give, bit);
  }
}

// The first of the sums, off `to`.
template <int used, int count>
__device__ void subtract(const float (&sums)[count], float* to) {
#pragma unroll
  for (int v = 0; v < used; v += 4) {
    float t[4];
    load_4(to + v, t);
#pragma unroll
    for (int d = 0; d < 4; ++d) t[d] -= sums[v + d];
    store_4(t, to + v);
  }
}

// Rows [next, N) of a panel's columns less their products over columns [0, count): four rows a team
// of 4 to 32 lanes, which share the columns, each four at a time. The teams are the widest that can
// all be at work at once and have columns for every lane. Warps [0, num_warps) share the rows.
__device__ inline void update_panel(const Shared& shared, int N, int next, int count, int warp,
                                    int num_warps) {
  int team = 4, rows_of_warp = kWarp;
  for (; team < kWarp && 4 * team < count && N - next <= rows_of_warp / 2 * num_warps; team *= 2) {
    rows_of_warp /= 2;
  }
  const int lane = threadIdx.x & (team - 1);
  const float* const panel = shared.triangle + row_start(next);
  for (int first = next + rows_of_warp * warp; first < N; first += rows_of_warp * num_warps) {
    int i = first + threadIdx.x % kWarp * rows_of_warp / kWarp / 4 * 4;
    const bool there = i < N;
    if (!there) i = next;
    float* const rows = shared.triangle + row_start(i);
    const int stride = i / kPanel * kPanel + 12;
    float sums[4 * kPanel];
#pragma unroll
    for (int v = 0; v < 4 * kPanel; ++v) sums[v] = 0.0f;
#pragma unroll 1
    for (int k = 4 * lane; k < count; k += 4 * team) {
      float x[4][4];
#pragma unroll
      for (int e = 0; e < 4; ++e) load_4(rows + e * stride + k, x[e]);
#pragma unroll
      for (int c = 0; c < kPanel; ++c) {
        float y[4];
        load_4(panel + c * (next + 12) + k, y);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int d = 0; d < 4; ++d) {
            sums[e * kPanel + c] = fmaf(x[e][d], y[d], sums[e * kPanel + c]);
          }
        }
      }
    }
    halve_sums<16>(sums, 2);
    halve_sums<8>(sums, 1);
    float* to = rows + lane % 4 * stride + next;
    if (team == 4) {
      if (there) subtract<8>(sums, to);
    } else {
      halve_sums<4>(sums, 4);
      for (int bit = 8; bit < team; bit *= 2) {
#pragma unroll
        for (int d = 0; d < 4; ++d) sums[d] += __shfl_xor_sync(kAllLanes, sums[d], bit);
      }
      if (there && lane < 8) subtract<4>(sums, to + lane / 4 * 4);
    }
  }
}

// t[c] less the products of `row` and row c of a panel, over 8 columns.
__device__ inline void subtract_products(const float* panel, int stride, const float (&row)[kPanel],
                                         float (&t)[kPanel]) {
#pragma unroll
  for (int c = 0; c < kPanel; ++c) {
    float y[kPanel];
    load_8(panel + c * stride, y);
#pragma unroll
    for (int d = 0; d < kPanel; ++d) t[c] = fmaf(-row[d], y[d], t[c]);
  }
}

// A warp's copy of the panel's block on the diagonal, less the products over the panel before: two
// entries a lane.
__device__ inline void corner_entries(const float* before, int stride, const float* block,
                                      int block_stride, float* corner) {
  const int r = threadIdx.x % kWarp / 4, c = threadIdx.x % 4 * 2;
  float row[kPanel], y[2][kPanel], entries[2];
  load_8(before + r * stride, row);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    load_8(before + (c + e) * stride, y[e]);
    entries[e] = block[r * block_stride + c + e];
#pragma unroll
    for (int d = 0; d < kPanel; ++d) entries[e] = fmaf(-row[d], y[e][d], entries[e]);
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) corner[r * kPanel + c + e] = entries[e];
}

// The lower factor in place of the padded triangle, and the inverses of its diagonal. Returns the
// first bad pivot from 1, or 0, the same in every thread.
__device__ inline int factorise(const Shared& shared, int N) {
  const int i = threadIdx.x, lane = i % kWarp, warp = i / kWarp, row_warps = ceil_div(N, kWarp);
  float* const own = shared.triangle + row_start(i);
  float* const corner = shared.corners + warp * kPanel * kPanel;
  float t[kPanel] = {};  // the row's entries in a panel
  if (i < kPanel) shared.inverses[i] = 0.0f;
  if (i == 0) *shared.bad = 0;
  __syncthreads();
  for (int first = 0; first < N; first += kPanel) {
    if (warp >= row_warps) {
      const int next = first + kPanel;
      if (first > 0 && next < N) {
        update_panel(shared, N, next, first, warp - row_warps, blockDim.x / kWarp - row_warps);
      }
    } else if (i - lane + kWarp > first) {
      const float* const block = shared.triangle + row_start(first) + first;
      // The panel's rows in the columns of the one before it, or zeros.
      const float* const before = first > 0 ? block - kPanel : shared.inverses;
      const int stride = first > 0 ? first + 12 : 0;
      corner_entries(before, stride, block, first + 12, corner);
      __syncwarp();
      if (i >= first && i < N) {
        float l[kPanel][kPanel], inverses[kPanel], products[kPanel];
        load_8(own + first, products);
        subtract_products(before, stride, t, products);
        const int bad = factor_corner(corner, l, inverses);
#pragma unroll
        for (int c = 0; c < kPanel; ++c) t[c] = products[c];
#pragma unroll
        for (int c = 0; c < kPanel; ++c) {
          if (i != first + c) t[c] *= inverses[c];
#pragma unroll
          for (int d = c + 1; d < kPanel; ++d) t[d] = fmaf(-t[c], l[d][c], t[d]);
        }
        // Others may still read what the panel's own rows have there.
        if (i >= first + kPanel) store_8(t, own + first);
        if (i == first && bad && *shared.bad == 0) *shared.bad = first + bad;
      }
    }
    __syncthreads();
  }
  if (i < N) {
    store_8(t, own + i / kPanel * kPanel);
    own[i] = sqrtf(own[i]);
    shared.inverses[i] = 1.0f / own[i];
  }
  __syncthreads();
  return *shared.bad;
}

}  // namespace cuda
}  // namespace dropinf
