// damped_cholesky and cholesky_solve on CUDA: a block a layer, whose lower triangle lies in shared
// memory from the first column to the last right-hand side; see cholesky_layer.cuh.
//
// Predicted, not measured, for an H100 at 1.75 GHz. A warp takes 12 cycles of shared memory for 4
// columns (8 reads of 16 bytes that are the same for all lanes, and one of 4 times 128 bytes) and 8
// of arithmetic, but a lone warp 60; each 8 x 8 block takes 1000, and in a solution twice 250.
//
//     r                                         32     64    128    256    320
//     cycles, thousands                          5     11     30     93    142
//     µs                                         3      6     17     53     81
//     and for 16 right-hand sides                1      3      7     19     54 (12 fit at a time)
//     layers at a time on 132 SMs             2772   1320    660    132    132
//
// Floor: 64 layers of 128 x 128 are 2.1 MB to read and 4.2 MB to write, 1.5 µs at 4.3 TB/s.
//
// What is left: late panels have few rows and long sums, so few warps at work; a layer has one SM.
// Those that do not fit in its shared memory (r > 320 on sm_90, r > 272 on sm_80) are cut into
// blocks, see cholesky_wide.cuh.

#include <algorithm>
#include <vector>

#include "cuda/cholesky.cuh"
#include "cuda/cholesky_layer.cuh"
#include "cuda/cholesky_wide.cuh"
#include "cuda/common.cuh"

namespace dropinf {
namespace cuda {
namespace {

constexpr int kMaxLayers = 1280;  // 31 KB of arguments, see gather_grads.cu

// A layer takes a block of the first that it is not wider than, in threads: narrow ones have small
// blocks, so that many are on an SM at a time.
constexpr int kBuckets[] = {32, 64, 128, 192, 256, 320};
constexpr int kMaxThreads = 320;

// Right-hand sides in shared memory at a time: there is room for the least beside the widest layer;
// more than the most would keep other blocks from the SM.
constexpr int kLeastRows = 8, kMostRows = 64;
// More right-hand sides than this are solved for by several blocks a layer, after the factors.
constexpr int64_t kFusedRows = 128;

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

// Right-hand sides [first, first + count): a warp a row to load and to write, a team to solve.
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
  constexpr int kTeams = kWarp / kPanel;
  for (int first_q = warp * kTeams; first_q < count && !failed; first_q += num_warps * kTeams) {
    const int q = first_q + lane / kPanel;
    float* const x = shared.slots + (q < count ? q : count - 1) * (N + 4);
    solve_lower(shared, N, n, q < count, x);
    solve_upper(shared, N, q < count, x);
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
  const int64_t slots = std::min<int64_t>(all->m, kMostRows);
  const int64_t free = limit - shared_bytes(N, 0), slot = shared_bytes(N, 1) - shared_bytes(N, 0);
  all->num_slots = static_cast<int>(std::min(slots, free / slot));
  int64_t parts = 1;
  if (!all->info) parts = std::min<int64_t>(ceil_div<int64_t>(all->m, all->num_slots), 65535);
  return launch(cholesky_kernel, dim3(count, static_cast<unsigned>(parts)), threads,
                shared_bytes(N, all->num_slots), stream, *all);
}

// The widest layer that fits in `limit` bytes of shared memory.
int64_t widest_of(int64_t limit) {
  int64_t width = kMaxThreads;
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
  int count = 0;
  for (int64_t k = 0; k < num_layers; ++k) {
    all.layers[count++] = layers[k];
    const bool last = k + 1 == num_layers || count == kMaxLayers ||
                      bucket_of(layers[k + 1].width) != bucket_of(layers[k].width);
    if (!last) continue;
    const cudaError_t error = launch_layers(&all, count, limit, stream);
    if (error != cudaSuccess) return error;
    count = 0;
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
