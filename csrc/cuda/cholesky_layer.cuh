// One layer in the shared memory of a block: its factor, and the solutions of right-hand sides.
//
// The factorisation is left-looking, kPanel columns at a time, a thread a row: a thread subtracts
// the products of its row with those of the panel, every thread factorises the panel's own 8 x 8
// block for itself, which saves a barrier, and finishes its row; two barriers a panel. Of the
// right-hand sides each has a team of 8 lanes, which share its sums and need no barriers of the
// block.
//
// Rows lie one behind the other. Row i is padded to 8 (i / 8) + 12 floats: an odd number of 16
// bytes, the same for the 8 rows whose 16-byte reads are served together, which then fall into
// different banks. Of the panel's rows all threads of a warp read the same address.

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
  float* corner;    // [kPanel, kPanel]: the panel's block on the diagonal
  int* bad;         // 4 ints, of which one is used
  float* slots;     // [num_slots, N + 4]: right-hand sides

  __device__ Shared(float* start, int N)
      : triangle(start),
        inverses(triangle + row_start(N)),
        corner(inverses + N),
        bad(reinterpret_cast<int*>(corner + kPanel * kPanel)),
        slots(corner + kPanel * kPanel + 4) {}
};

__host__ __device__ constexpr int64_t shared_bytes(int N, int num_slots) {
  return sizeof(float) * (row_start(N) + N + kPanel * kPanel + 4 + int64_t{num_slots} * (N + 4));
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

__device__ inline void load_8(const float* from, float (&to)[kPanel]) {
  load_4(from, to);
  load_4(from + 4, to + 4);
}

__device__ inline void store_8(const float (&from)[kPanel], float* to) {
  store_4(from, to);
  store_4(from + 4, to + 4);
}

// The factor of a panel's block on the diagonal; returns its first bad pivot from 1, or 0.
__device__ inline int factor_corner(const float* corner, float (&l)[kPanel][kPanel],
                                    float (&inverses)[kPanel]) {
  int bad = 0;
#pragma unroll
  for (int c = 0; c < kPanel; ++c) load_8(corner + c * kPanel, l[c]);
#pragma unroll
  for (int c = 0; c < kPanel; ++c) {
    if (!(l[c][c] > 0.0f) && bad == 0) bad = c + 1;
    l[c][c] = sqrtf(l[c][c]);
    inverses[c] = 1.0f / l[c][c];
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

// The lower factor in place of the padded triangle. Returns the first bad pivot from 1, or 0, the
// same in every thread.
__device__ inline int factorise(const Shared& shared, int N) {
  const int i = threadIdx.x, row_in_panel = i % kPanel;
  float* const own = shared.triangle + row_start(i);
  for (int first = 0; first < N; first += kPanel) {
    const bool at_work = i >= first && i < N, in_panel = at_work && i < first + kPanel;
    float t[kPanel], sums[kPanel];
    if (at_work) {
      panel_sums(own, shared.triangle + row_start(first), first + 12, first, 4, sums);
      load_8(own + first, t);
#pragma unroll
      for (int c = 0; c < kPanel; ++c) t[c] -= sums[c];
      if (in_panel) store_8(t, shared.corner + row_in_panel * kPanel);
    }
    __syncthreads();
    if (at_work) {
      float l[kPanel][kPanel], inverses[kPanel];
      const int bad = factor_corner(shared.corner, l, inverses);
#pragma unroll
      for (int c = 0; c < kPanel; ++c) {
        t[c] *= inverses[c];
#pragma unroll
        for (int d = c + 1; d < kPanel; ++d) t[d] = fmaf(-t[c], l[d][c], t[d]);
      }
      if (in_panel) {
#pragma unroll
        for (int c = 0; c < kPanel; ++c) {
          if (c != row_in_panel) continue;
          t[c] = l[c][c];
          shared.inverses[i] = inverses[c];
        }
        if (row_in_panel == 0) *shared.bad = bad;
      }
      store_8(t, own + first);
    }
    __syncthreads();
    if (*shared.bad) return first + *shared.bad;
  }
  return 0;
}

// Sums over a team of kPanel lanes; lane e of it gets that of values[e].
__device__ inline float team_sum(float (&values)[kPanel]) {
#pragma unroll
  for (int half = kPanel / 2; half > 0; half /= 2) {
    const bool upper = threadIdx.x & half;
#pragma unroll
    for (int c = 0; c < half; ++c) {
      const float give = upper ? values[c] : values[c + half];
      const float keep = upper ? values[c + half] : values[c];
      values[c] = keep + __shfl_xor_sync(kAllLanes, give, half);
    }
  }
  return values[0];
}

// The team's entries x[e] less the sums, in all its lanes.
__device__ inline void subtract_sums(float (&sums)[kPanel], float* x, bool there,
                                     float (&t)[kPanel]) {
  const float sum = team_sum(sums);
  if (there) x[threadIdx.x % kPanel] -= sum;
  __syncwarp();
  load_8(x, t);
  __syncwarp();
}

__device__ inline void write_entries(const float (&t)[kPanel], bool there, float* x) {
  if (there && threadIdx.x % kPanel == 0) store_8(t, x);
  __syncwarp();
}

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

// A right-hand side x [N] is in shared memory, zeros from n on, and has a team of kPanel lanes,
// which share the sums. A team that has none repeats another one's, and does not write.

// x = L⁻¹ x.
__device__ inline void solve_lower(const Shared& shared, int N, int n, bool there, float* x) {
  const int lane = threadIdx.x % kPanel;
  float t[kPanel], sums[kPanel];
  for (int first = 0; first < N; first += kPanel) {
    const float* const panel = shared.triangle + row_start(first);
    panel_sums(x + 4 * lane, panel + 4 * lane, first + 12, first - 4 * lane, 4 * kPanel, sums);
    subtract_sums(sums, x + first, there, t);
    solve_corner(shared, first, t);
    // What is not finite must not come back out of the padding.
#pragma unroll
    for (int c = 0; c < kPanel; ++c) t[c] = first + c < n ? t[c] : 0.0f;
    write_entries(t, there, x + first);
  }
}

// x = L⁻ᵀ x.
__device__ inline void solve_upper(const Shared& shared, int N, bool there, float* x) {
  const int lane = threadIdx.x % kPanel;
  float t[kPanel], sums[kPanel], l[kPanel], inverses[kPanel];
  for (int first = N - kPanel; first >= 0; first -= kPanel) {
#pragma unroll
    for (int c = 0; c < kPanel; ++c) sums[c] = 0.0f;
#pragma unroll 4
    for (int i = first + kPanel + lane; i < N; i += kPanel) {
      load_8(shared.triangle + row_start(i) + first, l);
#pragma unroll
      for (int c = 0; c < kPanel; ++c) sums[c] = fmaf(x[i], l[c], sums[c]);
    }
    subtract_sums(sums, x + first, there, t);
    load_8(shared.inverses + first, inverses);
#pragma unroll
    for (int c = kPanel - 1; c >= 0; --c) {
      load_8(shared.triangle + row_start(first + c) + first, l);
      t[c] *= inverses[c];
#pragma unroll
      for (int d = 0; d < c; ++d) t[d] = fmaf(-t[c], l[d], t[d]);
    }
    write_entries(t, there, x + first);
  }
}

}  // namespace cuda
}  // namespace dropinf
