// sampled_norm on CUDA. A row has at most 2 I sums, so all are formed, by reading x and dy in
// order, and the sampled ones are picked from them.
//
// A block takes a chunk of positions of one example, eight at a time: first a warp a position reads
// x for its mean and deviation, in two passes; then a thread a vector of columns reads x again,
// which is in L1 or L2 by now, and dy, and adds to the sums of its columns in shared memory. The
// chunks' sums are added in order by a second kernel, which picks and weighs. The chunks depend on
// T alone, so B changes no bit.
//
// Floor at B=8, T=1024, I=2048, bf16 on an H200 (4.2 TB/s): x and dy once, 67 MB, 16 us. The sums
// of 32 chunks are 4 MB, written and read in L2; x from L1 or L2 three times over is 100 MB, 0.8 MB
// an SM, 4 us behind the rest; about 12 instructions an element are 9 us of all SMs. With a second
// launch: 20 to 25 us predicted, 30.5 measured.

#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/sampled_norm.cuh"

namespace dropinf {
namespace cuda {
namespace {

constexpr int64_t kMaxChunks = 32;  // B = 8 then fills 132 SMs twice
constexpr int64_t kMinChunk = 32;   // positions
constexpr int kWarps = 8;           // and positions at a time
constexpr int kThreads = kWarps * kWarp;
constexpr int64_t kMaxColumns = 8192;  // of a block, whose sums are 64 KB
constexpr int kPickThreads = 256;

struct NormCall {
  SampledNormArgs args;
  int64_t chunk, num_chunks;
  int columns, num_tiles;  // of a block; blocks that share the columns of a chunk
  float* sums;             // [num_chunks, B, 2 I]
};

// x[i] normalised is (x[i] - mean) * scale + shift. The mean is rounded, as much as x is where x is
// far from 0; the shift mends what that took away.
struct Statistics {
  float mean, scale, shift;
};

__device__ float sum_of_warp(float value) {
#pragma unroll
  for (int n = kWarp / 2; n > 0; n /= 2) value += __shfl_xor_sync(kAllLanes, value, n);
  return value;
}

template <int kVector>
__device__ float sum_of(const float* values) {
  float sum = values[0];
#pragma unroll
  for (int j = 1; j < kVector; ++j) sum += values[j];
  return sum;
}

// Calls take(j, x[i], whether it is there) for all of a lane's elements, i = j modulo kVector;
// those behind the end are 0. By the same lanes in the same order, however x is aligned.
template <bool kAligned, int kVector, typename E, typename Take>
__device__ void each_of_lane(const E* x, int I, int lane, const Take& take) {
  constexpr int kLoads = kAligned ? 8 : 1;  // vectors in flight
  for (int first = lane * kVector; first < I; first += kLoads * kWarp * kVector) {
    float value[kLoads][kVector];
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int i = first + n * kWarp * kVector;
      if constexpr (kAligned) {
        load_vector<kVector>(x + i, value[n], i < I);
      } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) value[n][j] = i + j < I ? widen(x[i + j]) : 0.0f;
      }
    }
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const int i = first + n * kWarp * kVector + (kAligned ? 0 : j);
        take(j, value[n][j], i < I);
      }
    }
  }
}

// Of a position's x, by a warp.
template <typename E, bool kAligned>
__device__ Statistics statistics_of(const E* x, int I, bool rms, float eps, int lane) {
  constexpr int kVector = 16 / sizeof(E);
  const float size = static_cast<float>(I);
  float sums[kVector] = {}, squares[kVector] = {}, mean = 0.0f, rest = 0.0f;
  if (!rms) {
    each_of_lane<kAligned, kVector>(x, I, lane,
                                    [&](int j, float value, bool) { sums[j] += value; });
    mean = __fdiv_rn(sum_of_warp(sum_of<kVector>(sums)), size);
#pragma unroll
    for (int j = 0; j < kVector; ++j) sums[j] = 0.0f;
  }
  each_of_lane<kAligned, kVector>(x, I, lane, [&](int j, float value, bool there) {
    const float centred = there ? value - mean : 0.0f;
    sums[j] += centred;
    squares[j] += centred * centred;
  });
  if (!rms) rest = __fdiv_rn(sum_of_warp(sum_of<kVector>(sums)), size);
  const float square = __fdiv_rn(sum_of_warp(sum_of<kVector>(squares)), size);
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(square - rest * rest + eps));
  return {mean, scale, -rest * scale};
}

// Where a block keeps the sums of its vectors of columns: `of(v)[j * kWarp]` is sum j of vector v,
// of kVector products and then of as many dy. No other thread touches it, and a warp's are in 32
// banks.
template <int kVector>
struct Sums {
  float* data;
  __device__ float* of(int v) const { return data + v / kWarp * (2 * kVector * kWarp) + v % kWarp; }
};

// Adds `count` positions to the sums of a vector of columns.
template <int kVector, typename E>
__device__ void add(const SampledNormArgs& args, const E* x, const E* dy, const Statistics* of,
                    int count, float* sums) {
  float product[kVector], total[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    product[j] = sums[j * kWarp];
    total[j] = sums[(kVector + j) * kWarp];
  }
  const auto position = [&](int p) {
    float x_value[kVector], dy_value[kVector];
    load_vector<kVector>(x + p * args.x_stride_t, x_value);
    load_vector<kVector>(dy + p * args.dy_stride_t, dy_value);
    const Statistics at = of[p];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      product[j] += dy_value[j] * ((x_value[j] - at.mean) * at.scale + at.shift);
      total[j] += dy_value[j];
    }
  };
  if (count == kWarps) {  // with all loads in flight
#pragma unroll
    for (int p = 0; p < kWarps; ++p) position(p);
  } else {
#pragma unroll 1
    for (int p = 0; p < count; ++p) position(p);
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    sums[j * kWarp] = product[j];
    sums[(kVector + j) * kWarp] = total[j];
  }
}

// blockIdx.x counts (b, chunk, tile), the tiles fastest.
template <typename E, int kVector>
__global__ void __launch_bounds__(kThreads, 2) norm_kernel(const NormCall call) {
  const SampledNormArgs& args = call.args;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile = blockIdx.x % call.num_tiles, item = blockIdx.x / call.num_tiles;
  const int64_t c = item % call.num_chunks, b = item / call.num_chunks;
  const int I = static_cast<int>(args.I), first = static_cast<int>(tile) * call.columns;
  const int width = I - first < call.columns ? I - first : call.columns;
  const int num_vectors = width / kVector;
  auto* const statistics = shared_memory<Statistics>();  // [2, kWarps]
  const Sums<kVector> sums{reinterpret_cast<float*>(statistics + 2 * kWarps)};
  for (int v = threadIdx.x; v < num_vectors; v += kThreads) {
#pragma unroll
    for (int j = 0; j < 2 * kVector; ++j) sums.of(v)[j * kWarp] = 0.0f;
  }
  const E* const x = static_cast<const E*>(args.x) + b * args.x_stride_b;
  const E* const dy = static_cast<const E*>(args.dy) + b * args.dy_stride_b;
  const int64_t begin = c * call.chunk;
  const int64_t end = begin + call.chunk < args.T ? begin + call.chunk : args.T;
  // Two sets of statistics in turn: one barrier then keeps them from who still reads.
  int turn = 0;
  for (int64_t t0 = begin; t0 < end; t0 += kWarps, turn ^= 1) {
    Statistics* const of = statistics + turn * kWarps;
    if (t0 + warp < end) {
      const E* const row = x + (t0 + warp) * args.x_stride_t;
      const Statistics found = statistics_of<E, kVector != 1>(row, I, args.rms, args.eps, lane);
      if (lane == 0) of[warp] = found;
    }
    __syncthreads();
    const int count = static_cast<int>(end - t0 < kWarps ? end - t0 : kWarps);
    const E* const x_at = x + t0 * args.x_stride_t + first;
    const E* const dy_at = dy + t0 * args.dy_stride_t + first;
    for (int v = threadIdx.x; v < num_vectors; v += kThreads) {
      add<kVector>(args, x_at + v * kVector, dy_at + v * kVector, of, count, sums.of(v));
    }
  }
  float* const to = call.sums + (c * args.B + b) * 2 * args.I + first;
#pragma unroll 1
  for (int v = threadIdx.x; v < num_vectors; v += kThreads) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float values[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[j] = sums.of(v)[(half * kVector + j) * kWarp];
      store_vector<kVector>(values, to + half * args.I + v * kVector);
    }
  }
}

// A thread an entry.
__global__ void __launch_bounds__(kPickThreads) pick_kernel(const NormCall call) {
  const SampledNormArgs& args = call.args;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kPickThreads + threadIdx.x;
  if (n >= args.B * args.r) return;
  const int64_t b = n / args.r, k = n % args.r, num_sums = 2 * args.I;
  const float* const weights = args.s == 1 ? nullptr : args.weights;  // of summands
  float total = 0.0f;
  for (int64_t q = k * args.s; q < (k + 1) * args.s; ++q) {
    const float weight = weights ? weights[q] : 1.0f;
    if (weight == 0.0f) continue;
    const int64_t i = args.index[q];
    float sum = i >= 0 && i < num_sums ? 0.0f : not_a_number();
    if (i >= 0 && i < num_sums) {
      const float* const from = call.sums + b * num_sums + i;
#pragma unroll 8
      for (int64_t c = 0; c < call.num_chunks; ++c) sum += from[c * args.B * num_sums];
    }
    total += weight * sum;
  }
  args.out[b * args.out_stride_b + k * args.out_stride_k] =
      weighted(args.s == 1 ? args.weights : nullptr, k, total);
}

int64_t chunk_of(const SampledNormArgs& args) {
  return round_up(std::max(kMinChunk, ceil_div(args.T, kMaxChunks)), kWarps);
}

int64_t num_chunks_of(const SampledNormArgs& args) {
  return std::max<int64_t>(1, ceil_div(args.T, chunk_of(args)));
}

using Kernel = void (*)(NormCall);

template <typename E>
Kernel kernel_for(bool vectors) {
  return vectors ? norm_kernel<E, 16 / sizeof(E)> : norm_kernel<E, 1>;
}

}  // namespace

int64_t sampled_norm_scratch(const SampledNormArgs& args) {
  return num_chunks_of(args) * args.B * 2 * args.I;
}

cudaError_t sampled_norm(const SampledNormArgs& args, float* scratch, cudaStream_t stream) {
  if (args.B == 0 || args.r == 0) return cudaSuccess;
  NormCall call{args, chunk_of(args), num_chunks_of(args), 0, 0, scratch};
  if (args.I > 0) {
    const int64_t vector = 16 / size_of(args.dtype);
    bool aligned = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
                   reinterpret_cast<uintptr_t>(args.dy) % 16 == 0 && args.I % vector == 0;
    for (const int64_t stride :
         {args.x_stride_b, args.x_stride_t, args.dy_stride_b, args.dy_stride_t}) {
      aligned &= stride % vector == 0;
    }
    call.num_tiles = static_cast<int>(ceil_div(args.I, kMaxColumns));
    // Whole warps of vectors.
    call.columns =
        static_cast<int>(round_up(ceil_div<int64_t>(args.I, call.num_tiles), kWarp * vector));
    const Kernel kernel = args.dtype == DType::kBFloat16  ? kernel_for<BFloat16>(aligned)
                          : args.dtype == DType::kFloat16 ? kernel_for<Float16>(aligned)
                                                          : kernel_for<float>(aligned);
    const int64_t shared_bytes = 2 * call.columns * static_cast<int64_t>(sizeof(float)) +
                                 2 * kWarps * static_cast<int64_t>(sizeof(Statistics));
    const dim3 grid = grid_of(args.B * call.num_chunks * call.num_tiles);
    const cudaError_t error = launch(kernel, grid, kThreads, shared_bytes, stream, call);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid = grid_of(ceil_div<int64_t>(args.B * args.r, kPickThreads));
  return launch(pick_kernel, grid, kPickThreads, 0, stream, call);
}

}  // namespace cuda
}  // namespace dropinf
