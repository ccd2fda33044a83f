// damped_cholesky and cholesky_solve on CUDA: a block a layer, whose lower triangle lies in shared
// memory from the first column to the last right-hand side; see cholesky_layer.cuh and
// cholesky_substitution.cuh.
//
// Measured on an H200 before rows were copied without waiting and warps worked ahead: 50 layers in
// a graph took 30.5 µs at r = 64, 62.9 at 128 and 134 at 256; torch's batch 53, 105 and 260. That
// is 900 cycles a column. By the code, half of them were reads of the matrix that waited for each
// other, 700 cycles for each row of a warp, and 250 a root and a quotient, which branch.
//
// Measured since: 9.1, 21.4 and 68.9 µs (torch 53, 124 and 299), with 16 right-hand sides 15, 36
// and 117; 200 layers of 8 to 512 0.52 ms, and 0.88 with their solutions.
//
// Predicted for that card at 1.9 GHz, of cycles of latency: 4 of arithmetic, 25 to
// 30 of shared memory, a shuffle, a barrier or an approximate root. A panel of 8 columns takes 600:
// 25 for its barrier, 95 until its block on the diagonal lacks no products any more, 55 to hand it
// to all lanes, 8 x 52 to factorise it and 15 to write. Of the warps ahead each takes 205 (160
// instructions) for 16, 32, 64 or 128 columns of 32, 16, 8 or 4 rows, and 250 to 330 (190) to add
// up; a warp of rows has 430 instructions a panel. An SM issues four a cycle: a panel takes the
// longest of the chain, of the warps ahead, and of its instructions.
//
//     r                                         64    128    256    320
//     threads                                  128    256    512    512
//     cycles, thousands: chain of panels       4.8    9.6     19     24
//                        warps ahead           2.8    9.5     32     77
//                        instructions / 4      2.3     10     53     91
//                        panel by panel        4.8     13     62    106
//                        copies in and out       2      3      7     10
//     µs, with 2.5 of the launch               6.1     11     39     64
//     and for 16 right-hand sides                2      4     10     17
//     layers at a time on 132 SMs              528    264    132    132
//
// Floor: 64 layers of 128 x 128 are 2.1 MB to read and 4.2 MB to write, 1.5 µs at 4.3 TB/s.
//
// What is left: the chain, where r is small, and instructions, where it is large: a layer has one
// SM. Those that do not fit in its shared memory (r > 320 on sm_90, r > 272 on sm_80) are cut into
// blocks, see cholesky_wide.cuh.

#include <algorithm>
#include <vector>

#include "cuda/cholesky.cuh"
#include "cuda/cholesky_layer.cuh"
#include "cuda/cholesky_substitution.cuh"
#include "cuda/cholesky_wide.cuh"
#include "cuda/common.cuh"
#include "cuda/layer_table.cuh"

namespace dropinf {
namespace cuda {
namespace {

// A layer takes a block of the first that it is not wider than: a thread a row, and the warps that
// work ahead. Narrow ones have small blocks, so that many are on an SM at a time.
struct Bucket {
  int width, threads;
};
constexpr Bucket kBuckets[] = {{32, 64}, {64, 128}, {128, 256}, {192, 384}, {256, 512}, {320, 512}};
constexpr int kMaxWidth = 320, kMaxThreads = 512;

// Right-hand sides in shared memory at a time: there is room for the least beside the widest layer;
// more than the most would keep other blocks from the SM.
constexpr int kLeastRows = 6, kMostRows = 64;
// More right-hand sides than this are solved for by several blocks a layer, after the factors.
constexpr int64_t kFusedRows = 128;

struct Cholesky : LayerTable<Layer, kMostLayers<Layer>> {
  const float* matrices;
  float* factors;
  const float* shift;
  int32_t* info;  // null: the matrices are factors
  const float* rows;
  float* solved;
  int64_t m, rows_stride, solved_stride;
  int num_slots;  // right-hand sides in shared memory at a time
};

constexpr int kRows = 4;  // of a warp at a time, so that it does not wait for each of them

// Starts to copy the lower triangle; what pads it is of the unit matrix.
__device__ void load_triangle(const Shared& shared, const float* matrix, int n, int N) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  for (int k = lane; k < n; k += kWarp) {
    for (int first = k - lane + warp; first < n; first += kRows * num_warps) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int i = first + u * num_warps;
        copy_4_async(shared.triangle + row_start(i) + k, matrix + i * n + k, k <= i && i < n);
      }
    }
  }
  for (int i = n + warp; i < N; i += num_warps) {
#pragma unroll 1
    for (int k = lane; k <= i; k += kWarp) {
      shared.triangle[row_start(i) + k] = i == k ? 1.0f : 0.0f;
    }
  }
}

__device__ void write_lower(const Shared& shared, int n, float* factor) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  for (int k = lane; k < n; k += kWarp) {
    for (int first = k - lane + warp; first < n; first += kRows * num_warps) {
      float values[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int i = first + u * num_warps;
        values[u] = shared.triangle[row_start(i < n ? i : n - 1) + k];
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int i = first + u * num_warps;
        if (k <= i && i < n) factor[i * n + k] = values[u];
      }
    }
  }
}

// Zeros above the diagonal.
__device__ void write_upper(int n, float* factor) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  for (int k = lane; k < n; k += kWarp) {
#pragma unroll 1
    for (int i = warp; i < k; i += num_warps) factor[i * n + k] = 0.0f;
  }
}

// Starts to copy right-hand sides [first, first + count), a warp each.
__device__ void load_rows(const Cholesky& all, const Layer& layer, const Shared& shared, int N,
                          int64_t first, int count) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  for (int q = warp; q < count; q += num_warps) {
    const float* const from = all.rows + (first + q) * all.rows_stride + layer.column;
    float* const to = shared.slots + q * (N + 4);
#pragma unroll 1
    for (int k = lane; k < N; k += kWarp) {
      copy_4_async(to + k, from + k, k < layer.width);
      if (k >= layer.width) to[k] = 0.0f;
    }
  }
}

// The right-hand sides that have been copied: a team to solve, a warp a row to write.
__device__ void solve_rows(const Cholesky& all, const Layer& layer, const Shared& shared, int N,
                           bool failed, int64_t first, int count) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int num_warps = blockDim.x / kWarp, n = layer.width;
  // The widest teams that can all be at work at once, for latency.
  int team = kWarp, teams = 1;
  for (; team > kPanel && count > num_warps * teams; teams *= 2) team /= 2;
  for (int first_q = warp * teams; first_q < count && !failed; first_q += num_warps * teams) {
    const int q = first_q + lane * teams / kWarp;
    float* const x = shared.slots + q * (N + 4);
    solve_lower(shared, N, n, team, q < count, x);
    solve_upper(shared, N, team, q < count, x);
  }
  __syncthreads();
  for (int q = warp; q < count; q += num_warps) {
    const float* const from = shared.slots + q * (N + 4);
    float* const to = all.solved + (first + q) * all.solved_stride + layer.column;
    for (int k = lane; k < n; k += kWarp) to[k] = failed ? not_a_number() : from[k];
  }
  __syncthreads();
}

__device__ int left_of(const Cholesky& all, int64_t q) {
  const int64_t left = all.m - q;
  return static_cast<int>(left < all.num_slots ? left : all.num_slots);
}

// Blocks (layer, part): the right-hand sides of a layer go round its parts.
__global__ void __launch_bounds__(kMaxThreads, 1) cholesky_kernel(const Cholesky all) {
  const Layer& layer = all.layers[blockIdx.x];
  const int n = layer.width, N = padded(n), thread = threadIdx.x;
  const Shared shared(shared_memory<float>(), N);
  int64_t q = int64_t{all.num_slots} * blockIdx.y;
  float* const factor = all.factors + layer.matrix;  // if it is wanted
  load_triangle(shared, all.matrices + layer.matrix, n, N);
  if (q < all.m) load_rows(all, layer, shared, N, q, left_of(all, q));
  const float shift = all.info ? all.shift[layer.index] : 0.0f;
  if (all.info) write_upper(n, factor);  // while the copies are under way
  end_copy_group();
  wait_for_copies<0>();
  __syncthreads();
  int bad = 0;
  if (all.info) {
    if (thread < n) shared.triangle[row_start(thread) + thread] += shift;
    bad = factorise(shared, N);
    if (bad) {
#pragma unroll 1
      for (int k = thread; k < n * n; k += blockDim.x) factor[k] = not_a_number();
    } else {
      write_lower(shared, n, factor);
    }
    if (thread == 0) all.info[layer.index] = bad;
  } else {
    if (thread < N) shared.inverses[thread] = 1.0f / shared.triangle[row_start(thread) + thread];
    __syncthreads();
  }
  const int64_t step = int64_t{all.num_slots} * gridDim.y;
  while (q < all.m) {
    solve_rows(all, layer, shared, N, bad, q, left_of(all, q));
    q += step;
    if (q >= all.m) break;
    load_rows(all, layer, shared, N, q, left_of(all, q));
    end_copy_group();
    wait_for_copies<0>();
    __syncthreads();
  }
}

int bucket_of(int64_t width) {
  int bucket = 0;
  while (kBuckets[bucket].width < width) ++bucket;
  return bucket;
}

// Launches the layers of the table, of which the first is the widest.
cudaError_t launch_layers(Cholesky* all, int64_t limit, cudaStream_t stream) {
  const int widest = all->layers[0].width, N = padded(widest);
  const int64_t slots = std::min<int64_t>(all->m, kMostRows);
  const int64_t free = limit - shared_bytes(N, 0), slot = shared_bytes(N, 1) - shared_bytes(N, 0);
  all->num_slots = static_cast<int>(std::min(slots, free / slot));
  int64_t parts = 1;
  if (!all->info) parts = std::min<int64_t>(ceil_div<int64_t>(all->m, all->num_slots), 65535);
  return launch(cholesky_kernel, dim3(all->count, static_cast<unsigned>(parts)),
                kBuckets[bucket_of(widest)].threads, shared_bytes(N, all->num_slots), stream, *all);
}

// The widest layer that fits in `limit` bytes of shared memory.
int64_t widest_of(int64_t limit) {
  int64_t width = kMaxWidth;
  while (width > 0 && shared_bytes(static_cast<int>(width), kLeastRows) > limit) width -= kPanel;
  return width;
}

// Layers that fit in shared memory, the widest first.
cudaError_t cholesky_narrow(const CholeskyArgs& args, const Layer* layers, int64_t num_layers,
                            int64_t limit, cudaStream_t stream) {
  if (args.info && args.m > kFusedRows) {
    CholeskyArgs part = args;
    part.m = 0;
    const cudaError_t error = cholesky_narrow(part, layers, num_layers, limit, stream);
    if (error != cudaSuccess) return error;
    part = args;
    part.matrices = args.factors;
    part.factors = nullptr;
    part.info = nullptr;
    while (num_layers > 0 && layers[num_layers - 1].width == 0) --num_layers;
    return cholesky_narrow(part, layers, num_layers, limit, stream);
  }
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
  for (int64_t k = 0; k < num_layers; ++k) {
    all.add(layers[k]);
    const bool last = k + 1 == num_layers || all.full() ||
                      bucket_of(layers[k + 1].width) != bucket_of(layers[k].width);
    if (!last) continue;
    const cudaError_t error = launch_layers(&all, limit, stream);
    if (error != cudaSuccess) return error;
    all.count = 0;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t cholesky(const CholeskyArgs& args, cudaStream_t stream) {
  int64_t limit = 0;
  cudaError_t error = shared_limit(&limit);
  if (error != cudaSuccess) return error;
  const int64_t widest = widest_of(limit);
  std::vector<Layer> layers;
  int64_t matrix = 0;
  for (int64_t l = 0; l < args.L; ++l) {
    const int64_t column = args.offsets[l], width = args.offsets[l + 1] - column;
    const bool wanted = args.info || (width > 0 && args.m > 0);  // of width 0 only the info
    if (wanted) {
      layers.push_back({column, matrix, static_cast<int32_t>(width), static_cast<int32_t>(l)});
    }
    matrix += width * width;
  }
  std::stable_sort(layers.begin(), layers.end(),
                   [](const Layer& a, const Layer& b) { return a.width > b.width; });
  const auto num_layers = static_cast<int64_t>(layers.size());
  int64_t num_wide = 0;
  while (num_wide < num_layers && layers[num_wide].width > widest) ++num_wide;
  error = cholesky_wide(args, layers.data(), num_wide, stream);
  if (error != cudaSuccess) return error;
  return cholesky_narrow(args, layers.data() + num_wide, num_layers - num_wide, limit, stream);
}

}  // namespace cuda
}  // namespace dropinf
