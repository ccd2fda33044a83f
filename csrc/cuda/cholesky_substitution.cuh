// Solutions for right-hand sides, by a factor in the shared memory of a block.
//
// A right-hand side x [N] is there too, zeros from n on, and has a team of 8 to 32 lanes of a warp,
// so that it needs no barriers of the block. All lanes solve a panel's block on the diagonal, and
// then share the other rows or columns, of which each has sums of its own: the bits are the same
// for any team. A team without a right-hand side only waits for the others.

#pragma once

#include "cuda/cholesky_layer.cuh"

namespace dropinf {
namespace cuda {

// t L⁻ᵀ of the panel's block on the diagonal.
__device__ inline void solve_corner(const Shared& shared, int first, float (&t)[kPanel]) {
  float l[kPanel], inverses[kPanel];
  load_8(shared.inverses + first, inverses);
#pragma unroll
  for (int c = 0; c < kPanel; ++c) {
    load_8(shared.triangle + row_start(first) + c * (first + 12) + first, l);
#pragma unroll
    for (int d = 0; d < c; ++d) t[c] = fmaf(-t[d], l[d], t[c]);
    t[c] *= inverses[c];
  }
}

// x = L⁻¹ x.
__device__ inline void solve_lower(const Shared& shared, int N, int n, int team, bool there,
                                   float* x) {
  const int lane = threadIdx.x & (team - 1);
  float t[kPanel];
  for (int first = 0; first < N; first += kPanel) {
    if (there) {
      load_8(x + first, t);
      solve_corner(shared, first, t);
      // What is not finite must not come back out of the padding.
#pragma unroll
      for (int c = 0; c < kPanel; ++c) t[c] = first + c < n ? t[c] : 0.0f;
    }
    __syncwarp();
    if (there) {
      if (lane == 0) store_8(t, x + first);
      constexpr int kRows = 4;  // at a time
      for (int i = first + kPanel + lane; i < N; i += kRows * team) {
        float sums[kRows];
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
          const int row = i + u * team < N ? i + u * team : i;
          float l[kPanel];
          load_8(shared.triangle + row_start(row) + first, l);
          sums[u] = x[row];
#pragma unroll
          for (int d = 0; d < kPanel; ++d) sums[u] = fmaf(-l[d], t[d], sums[u]);
        }
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
          if (i + u * team < N) x[i + u * team] = sums[u];
        }
      }
    }
    __syncwarp();
  }
}

// x = L⁻ᵀ x.
__device__ inline void solve_upper(const Shared& shared, int N, int team, bool there, float* x) {
  const int lane = threadIdx.x & (team - 1);
  float t[kPanel], l[kPanel], inverses[kPanel];
  for (int first = N - kPanel; first >= 0; first -= kPanel) {
    const float* const panel = shared.triangle + row_start(first);
    const int stride = first + 12;
    if (there) {
      load_8(x + first, t);
      load_8(shared.inverses + first, inverses);
#pragma unroll
      for (int c = kPanel - 1; c >= 0; --c) {
        load_8(panel + c * stride + first, l);
        t[c] *= inverses[c];
#pragma unroll
        for (int d = 0; d < c; ++d) t[d] = fmaf(-t[c], l[d], t[d]);
      }
    }
    __syncwarp();
    if (there) {
      if (lane == 0) store_8(t, x + first);
#pragma unroll 1
      for (int k = 4 * lane; k < first; k += 4 * team) {
        float sums[4];
        load_4(x + k, sums);
#pragma unroll
        for (int c = 0; c < kPanel; ++c) {
          float y[4];
          load_4(panel + c * stride + k, y);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[e] = fmaf(-t[c], y[e], sums[e]);
        }
        store_4(sums, x + k);
      }
    }
    __syncwarp();
  }
}

}  // namespace cuda
}  // namespace dropinf
