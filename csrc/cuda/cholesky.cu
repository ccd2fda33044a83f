// damped_cholesky and cholesky_solve on CUDA: a block a layer, whose lower triangle lies in shared
// memory from the first column to the last right-hand side.
//
// The factorisation is left-looking, kPanel columns at a time, a thread a row: a thread subtracts
// the products of its row with those of the panel, every thread factorises the panel's own 8 x 8
// block for itself, which saves a barrier, and finishes its row; two barriers a panel. Of the
// right-hand sides each has a thread, which needs no barriers at all. Layers up to 32 wide have
// blocks of one warp.
//
// Rows i lie one behind the other, padded to 8 (i / 8) + 12 floats: an odd number of 16 bytes, the
// same for the 8 rows whose 16-byte reads are served together, which then fall into different
// banks. All threads of a warp read the same address of the panel's rows.
//
// For 4 columns a warp takes 12 cycles of shared memory (8 reads of 16 bytes that are the same for
// all lanes, one of 4 times 128 bytes) and 8 of arithmetic; a lone warp waits for about 30. With
// 1000 cycles for each 8 x 8 block, r = 64, 128, 256, 320 take 10, 22, 71 and 115 thousand cycles;
// at 1.75 GHz 6, 13, 41 and 66 µs, for as many layers at a time as the shared memory of all SMs
// holds: 1000, 400, 132, 132 on an H100. 16 right-hand sides add about 4, 9, 25 and 35 µs. Floor:
// 64 layers of 128 x 128 are 6.3 MB to read (half) and write, 1.5 µs at 4.3 TB/s (all predicted,
// not measured). What is left: late panels have few rows and long sums, so few warps at work; few
// right-hand sides leave warps idle.

#include <algorithm>
#include <vector>

#include "cuda/common.cuh"
#include "cuda/cuda_launchers.h"

namespace dropinf {
namespace cuda {
namespace {

constexpr int kPanel = 8;
constexpr int kMaxLayers = 1280;  // 31 KB of arguments, see gather_grads.cu

// Layers up to `widest` take blocks of as many threads. Narrow ones have small blocks, so that many
// are on an SM at a time.
constexpr int kBuckets[] = {32, 64, 128, 192, 256, 320};
constexpr int kMaxThreads = 320;

// Right-hand sides in shared memory at a time: there is room for `least` beside the widest layer;
// more than `most` would keep other blocks from the SM.
constexpr int kLeastRows = 8, kMostRows = 64;
// More right-hand sides than this are solved for by several blocks a layer, after the factors.
constexpr int64_t kFusedRows = 128;

struct Layer {
  int64_t column, matrix;  // where it starts in the rows and in the matrices
  int32_t width;
  int32_t index;
};

struct Cholesky {
  Layer layers[kMaxLayers];
  const float* matrices;
  float* factors;
  const float* shift;
  int32_t* info;  // null: the matrices are factors
  const float* rows;
  float* solved;
  int64_t m, rows_stride, solved_stride;
  int num_slots;  // right-hand sides in shared memory at a time
};

static_assert(sizeof(Cholesky) <= 32764);

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

// sums[c] = the products of this thread's row and row c of a panel, over columns [0, count).
__device__ void panel_sums(const float* own, const float* panel, int panel_stride, int count,
                           float (&sums)[kPanel]) {
#pragma unroll
  for (int c = 0; c < kPanel; ++c) sums[c] = 0.0f;
#pragma unroll 1  // twice would not fit in 96 registers
  for (int k = 0; k < count; k += 4) {
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

__device__ void load_8(const float* from, float (&to)[kPanel]) {
  load_4(from, to);
  load_4(from + 4, to + 4);
}

__device__ void store_8(const float (&from)[kPanel], float* to) {
  store_4(from, to);
  store_4(from + 4, to + 4);
}

// The factor of a panel's block on the diagonal; returns its first bad pivot from 1, or 0.
__device__ int factor_corner(const float* corner, float (&l)[kPanel][kPanel],
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
__device__ int factorise(const Shared& shared, int N) {
  const int i = threadIdx.x, row_in_panel = i % kPanel;
  float* const own = shared.triangle + row_start(i);
  for (int first = 0; first < N; first += kPanel) {
    const bool at_work = i >= first && i < N, in_panel = at_work && i < first + kPanel;
    float t[kPanel], sums[kPanel];
    if (at_work) {
      panel_sums(own, shared.triangle + row_start(first), first + 12, first, sums);
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

// x = (L Lᵀ)⁻¹ x, of one right-hand side [N] in shared memory; zeros from n on.
__device__ void solve(const Shared& shared, int N, int n, float* x) {
  float t[kPanel], sums[kPanel], l[kPanel], inverses[kPanel];
  for (int first = 0; first < N; first += kPanel) {
    const float* const panel = shared.triangle + row_start(first);
    const int stride = first + 12;
    panel_sums(x, panel, stride, first, sums);
    load_8(x + first, t);
    load_8(shared.inverses + first, inverses);
#pragma unroll
    for (int c = 0; c < kPanel; ++c) {
      load_8(panel + c * stride + first, l);
      t[c] -= sums[c];
#pragma unroll
      for (int d = 0; d < c; ++d) t[c] = fmaf(-t[d], l[d], t[c]);
      t[c] *= inverses[c];
    }
    // What is not finite must not come back out of the padding.
#pragma unroll
    for (int c = 0; c < kPanel; ++c) t[c] = first + c < n ? t[c] : 0.0f;
    store_8(t, x + first);
  }
  for (int first = N - kPanel; first >= 0; first -= kPanel) {
#pragma unroll
    for (int c = 0; c < kPanel; ++c) sums[c] = 0.0f;
    for (int group = first + kPanel; group < N; group += kPanel) {
      const float* from = shared.triangle + row_start(group) + first;
      float y[kPanel];
      load_8(x + group, y);
#pragma unroll
      for (int e = 0; e < kPanel; ++e) {
        load_8(from + e * (group + 12), l);
#pragma unroll
        for (int c = 0; c < kPanel; ++c) sums[c] = fmaf(y[e], l[c], sums[c]);
      }
    }
    load_8(x + first, t);
    load_8(shared.inverses + first, inverses);
#pragma unroll
    for (int c = 0; c < kPanel; ++c) t[c] -= sums[c];
#pragma unroll
    for (int c = kPanel - 1; c >= 0; --c) {
      load_8(shared.triangle + row_start(first) + c * (first + 12) + first, l);
      t[c] *= inverses[c];
#pragma unroll
      for (int d = 0; d < c; ++d) t[d] = fmaf(-t[c], l[d], t[d]);
    }
    store_8(t, x + first);
  }
}

// A warp a row; what pads the triangle is of the unit matrix.
__device__ void load_triangle(const Shared& shared, const float* matrix, int n, int N,
                              float shift) {
  const int lane = threadIdx.x % kWarp, num_warps = blockDim.x / kWarp;
  for (int i = threadIdx.x / kWarp; i < N; i += num_warps) {
    const float* const from = matrix + int64_t{i} * n;
    float* const to = shared.triangle + row_start(i);
    for (int k = lane; k < i / kPanel * kPanel + kPanel; k += kWarp) {
      float value = i == k ? 1.0f : 0.0f;
      if (i < n && k <= i) value = i == k ? from[k] + shift : from[k];
      to[k] = value;
    }
  }
}

__device__ void write_factor(const Shared& shared, int n, bool failed, float* factor) {
  const int lane = threadIdx.x % kWarp, num_warps = blockDim.x / kWarp;
  for (int i = threadIdx.x / kWarp; i < n; i += num_warps) {
    const float* const from = shared.triangle + row_start(i);
    for (int k = lane; k < n; k += kWarp) {
      const float value = k <= i ? from[k] : 0.0f;
      factor[int64_t{i} * n + k] = failed ? not_a_number() : value;
    }
  }
}

// Right-hand sides [first, first + count): a warp a row to load and to write, a thread to solve.
__device__ void solve_rows(const Cholesky& all, const Layer& layer, const Shared& shared, int N,
                           bool failed, int64_t first, int count) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int num_warps = blockDim.x / kWarp, n = layer.width;
  for (int q = warp; q < count; q += num_warps) {
    const float* const from = all.rows + (first + q) * all.rows_stride + layer.column;
    float* const to = shared.slots + q * (N + 4);
    for (int k = lane; k < N; k += kWarp) to[k] = k < n ? from[k] : 0.0f;
  }
  __syncthreads();
  for (int q = threadIdx.x; q < count; q += blockDim.x) {
    if (!failed) solve(shared, N, n, shared.slots + q * (N + 4));
  }
  __syncthreads();
  for (int q = warp; q < count; q += num_warps) {
    const float* const from = shared.slots + q * (N + 4);
    float* const to = all.solved + (first + q) * all.solved_stride + layer.column;
    for (int k = lane; k < n; k += kWarp) to[k] = failed ? not_a_number() : from[k];
  }
  __syncthreads();
}

// Blocks (layer, part): the right-hand sides of a layer go round its parts.
__global__ void __launch_bounds__(kMaxThreads, 2) cholesky_kernel(const Cholesky all) {
  const Layer& layer = all.layers[blockIdx.x];
  const int n = layer.width, N = padded(n), thread = threadIdx.x;
  const Shared shared(shared_memory<float>(), N);
  const float shift = all.info ? all.shift[layer.index] : 0.0f;
  load_triangle(shared, all.matrices + layer.matrix, n, N, shift);
  __syncthreads();
  int bad = 0;
  if (all.info) {
    bad = factorise(shared, N);
    write_factor(shared, n, bad, all.factors + layer.matrix);
    if (thread == 0) all.info[layer.index] = bad;
  } else if (thread < N) {
    shared.inverses[thread] = 1.0f / shared.triangle[row_start(thread) + thread];
  }
  const int64_t step = int64_t{all.num_slots} * gridDim.y;
  for (int64_t q = int64_t{all.num_slots} * blockIdx.y; q < all.m; q += step) {
    const int64_t left = all.m - q;
    solve_rows(all, layer, shared, N, bad, q, left < all.num_slots ? left : all.num_slots);
  }
}

int bucket_of(int64_t width) {
  int bucket = 0;
  while (kBuckets[bucket] < width) ++bucket;
  return bucket;
}

// Launches all.layers, of which the first is the widest.
cudaError_t launch_layers(Cholesky* all, int count, int64_t limit, cudaStream_t stream) {
  const int threads = kBuckets[bucket_of(all->layers[0].width)], N = padded(all->layers[0].width);
  const int64_t slots = std::min<int64_t>({all->m, threads, kMostRows});
  const int64_t free = limit - shared_bytes(N, 0), slot = shared_bytes(N, 1) - shared_bytes(N, 0);
  all->num_slots = static_cast<int>(std::min(slots, free / slot));
  int64_t parts = 1;
  if (!all->info) parts = std::min<int64_t>(ceil_div<int64_t>(all->m, all->num_slots), 65535);
  return launch(cholesky_kernel, dim3(count, static_cast<unsigned>(parts)), threads,
                shared_bytes(N, all->num_slots), stream, *all);
}

cudaError_t shared_limit(int64_t* num_bytes) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *num_bytes = limit;
  return error;
}

}  // namespace

cudaError_t widest_cholesky(int64_t* width) {
  int64_t limit = 0;
  const cudaError_t error = shared_limit(&limit);
  *width = kMaxThreads;
  while (*width > 0 && shared_bytes(static_cast<int>(*width), kLeastRows) > limit) {
    *width -= kPanel;
  }
  return error;
}

cudaError_t cholesky(const CholeskyArgs& args, int64_t widest, cudaStream_t stream) {
  if (args.info && args.m > kFusedRows) {
    CholeskyArgs part = args;
    part.m = 0;
    const cudaError_t error = cholesky(part, widest, stream);
    if (error != cudaSuccess) return error;
    part = args;
    part.matrices = args.factors;
    part.factors = nullptr;
    part.info = nullptr;
    return cholesky(part, widest, stream);
  }
  int64_t limit = 0;
  const cudaError_t error = shared_limit(&limit);
  if (error != cudaSuccess) return error;
  std::vector<Layer> layers;
  int64_t matrix = 0;
  for (int64_t l = 0; l < args.L; ++l) {
    const int64_t column = args.offsets[l], width = args.offsets[l + 1] - column;
    const bool wanted = args.info || (width > 0 && args.m > 0);  // of width 0 only the info
    if (wanted && width <= widest) {
      layers.push_back({column, matrix, static_cast<int32_t>(width), static_cast<int32_t>(l)});
    }
    matrix += width * width;
  }
  std::stable_sort(layers.begin(), layers.end(),
                   [](const Layer& a, const Layer& b) { return a.width > b.width; });
  Cholesky all{};
  all.matrices = args.matrices;
  all.factors = args.factors;
  all.shift = args.shift;
  all.info = args.info;
  all.rows = args.rows;
  all.solved = args.solved;
  all.m = args.m;
  all.rows_stride = args.rows_stride;
  all.solved_stride = args.solved_stride;
  int count = 0;
  for (size_t k = 0; k < layers.size(); ++k) {
    all.layers[count++] = layers[k];
    const bool last = k + 1 == layers.size() || count == kMaxLayers ||
                      bucket_of(layers[k + 1].width) != bucket_of(layers[k].width);
    if (!last) continue;
    const cudaError_t error = launch_layers(&all, count, limit, stream);
    if (error != cudaSuccess) return error;
    count = 0;
  }
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace dropinf
