// sampled_outer on CUDA, in three ways; which one is for the caller to say, by the order that it
// gives (order_if_faster in dropinf/ops/outer_ways.py).
//
// Direct: a lane an entry reads x and dy where they lie. Takes any call. Best where few of the
// 32-byte sectors hold a wanted element: r up to about (I + O) * element_size / 32.
//
// Staged: a block copies positions x[b, t, :] and dy[b, t, o0:o1] to shared memory, whole, while it
// works on the ones before; each thread keeps up to kCoordinates coordinates and their float32 sums
// in registers. The coordinates come in an order in which the lanes of a warp read different banks
// (dropinf/ops/bank_schedule.py), and return to their places at the end. A block holds four
// positions or more; an order for a device with more shared memory is not taken: the call is
// direct.
//
// Columns: for many coordinates; see sampled_outer_columns.cuh.
//
// The first two cut the positions into chunks, whose sums a second kernel adds in order. The chunks
// depend on T and the layer alone, so B changes no bit, nor does the device but for that room.
//
// For B=8, T=2048, I=O=4096, bf16 on an H200 (4.2 TB/s, 132 SMs, 1.75 GHz) one read of x and dy is
// 268 MB, 63 us; torch's sums of both take 77. Staged at r=8192, 16 % padding: 156 M
// coordinate-positions; 2 shared reads each are 74 k cycles of an SM, 42 us, and 6.6 instructions
// each 61 k cycles, 35 us, both behind the copies; the sums of 32 chunks are written and read in
// 16 MB, 4 us. Direct at r=64: 64 of 512 sectors twice a position, 67 MB, 16 us.
//
// Measured: staged 75 us at r=1024, 88 to 95 at 8192, 156 at 16384, 535 to 570 at 65536 (8 passes);
// direct 37 at r=64, as memory gives 64 bytes where it is asked for 32. Tried there and slower: two
// positions in a word of shared memory, interleaved on their way through registers (4.9
// instructions, half the shared reads): 86, 94, 145 and 436 us, as loads that pass through
// registers wait where asynchronous copies do not.

#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/sampled_outer.cuh"
#include "cuda/sampled_outer_column_sums.cuh"
#include "cuda/sampled_outer_staged.cuh"

namespace dropinf {
namespace cuda {
namespace {

// Both kernels.
constexpr int64_t kMaxChunks = 32;  // B = 8 then fills 132 SMs twice
constexpr int64_t kMinChunk = 32;   // positions
constexpr int64_t kChunkMultiple = 8;

// Direct.
constexpr int kDirectWarps = 8;  // they share the positions of a chunk
constexpr int kDirectThreads = kDirectWarps * kWarp;

// Sums.
constexpr int kSumThreads = 256;

struct DirectCall : OuterCall {
  const int32_t *o_idx, *i_idx;
  int64_t r, num_parts;
};

__device__ bool in_range(int32_t index, int64_t size) { return index >= 0 && index < size; }

// blockIdx.x counts (b, chunk, part of kWarp entries), the parts fastest. Warp w takes the
// positions w, w + kDirectWarps, ... of the chunk, lane k an entry.
template <typename E>
__global__ void __launch_bounds__(kDirectThreads) direct_kernel(const DirectCall call) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t part = blockIdx.x % call.num_parts, item = blockIdx.x / call.num_parts;
  const int64_t c = item % call.num_chunks, b = item / call.num_chunks;
  const int64_t k = part * kWarp + lane;
  const E* const x = static_cast<const E*>(call.x.data) + b * call.x.stride_b;
  const E* const dy = static_cast<const E*>(call.dy.data) + b * call.dy.stride_b;
  const int64_t begin = c * call.chunk;
  const int64_t end = begin + call.chunk < call.T ? begin + call.chunk : call.T;
  float total = 0.0f;
  if (k < call.r) {
    for (int64_t j = 0; j < call.s; ++j) {
      const float weight = call.weights ? call.weights[k * call.s + j] : 1.0f;
      if (weight == 0.0f) continue;
      const int32_t o = call.o_idx[k * call.s + j], i = call.i_idx[k * call.s + j];
      const bool ones = call.bias && i == call.I;
      const bool good = in_range(o, call.O) && (ones || in_range(i, call.I));
      float sum = good ? 0.0f : not_a_number();
      if (good && ones) {
#pragma unroll 4
        for (int64_t t = begin + warp; t < end; t += kDirectWarps) {
          sum += widen(dy[t * call.dy.stride_t + o]);
        }
      } else if (good) {
#pragma unroll 4
        for (int64_t t = begin + warp; t < end; t += kDirectWarps) {
          sum += widen(x[t * call.x.stride_t + i]) * widen(dy[t * call.dy.stride_t + o]);
        }
      }
      total += weight * sum;
    }
  }
  float* const of_warps = shared_memory<float>();  // [kDirectWarps, kWarp]
  of_warps[threadIdx.x] = total;
  __syncthreads();
  if (warp == 0 && k < call.r) {
    for (int w = 1; w < kDirectWarps; ++w) total += of_warps[w * kWarp + lane];
    call.sums[c * call.stride_chunk + b * call.stride_b + k * call.stride_k] =
        weighted(call.entry_weights, k, total);
  }
}

struct SumCall {
  const float* sums;  // [num_chunks, B, r]
  int64_t num_chunks, B, r;
  const float* weights;  // [r], or null for ones
  float* out;
  int64_t out_stride_b, out_stride_k;
};

__global__ void __launch_bounds__(kSumThreads) sum_kernel(const SumCall call) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (n >= call.B * call.r) return;
  float total = 0.0f;
  for (int64_t c = 0; c < call.num_chunks; ++c) total += call.sums[c * call.B * call.r + n];
  const int64_t b = n / call.r, k = n % call.r;
  call.out[b * call.out_stride_b + k * call.out_stride_k] = weighted(call.weights, k, total);
}

// Positions of a chunk. The sums of a chunk, written and read once, are at most 1/16 of its inputs,
// so that they cost little whatever r is.
int64_t chunk_of(const SampledOuterArgs& args) {
  const int64_t input_bytes = (args.I + args.O) * size_of(args.dtype);
  const int64_t few_sums =
      ceil_div<int64_t>(16 * 2 * 4 * args.r, std::max<int64_t>(input_bytes, 1));
  const int64_t chunk = std::max({kMinChunk, ceil_div(args.T, kMaxChunks), few_sums});
  return round_up(std::clamp<int64_t>(args.T, 1, chunk), kChunkMultiple);
}

int64_t num_chunks_of(const SampledOuterArgs& args) {
  return std::max<int64_t>(1, ceil_div(args.T, chunk_of(args)));
}

// With s = 1 the weights multiply the finished sums.
const float* entry_weights(const SampledOuterArgs& args) {
  return args.s == 1 ? args.weights : nullptr;
}

OuterCall call_of(const SampledOuterArgs& args, float* scratch) {
  OuterCall call;
  call.x = {args.x, args.x_stride_b, args.x_stride_t};
  call.dy = {args.dy, args.dy_stride_b, args.dy_stride_t};
  call.T = args.T;
  call.I = args.I;
  call.O = args.O;
  call.weights = args.s == 1 ? nullptr : args.weights;
  call.s = args.s;
  call.bias = args.bias;
  call.chunk = chunk_of(args);
  call.num_chunks = num_chunks_of(args);
  const bool only = call.num_chunks == 1;  // nothing to add up
  call.entry_weights = only ? entry_weights(args) : nullptr;
  call.sums = only ? args.out : scratch;
  call.stride_chunk = args.B * args.r;
  call.stride_b = only ? args.out_stride_b : args.r;
  call.stride_k = only ? args.out_stride_k : 1;
  return call;
}

cudaError_t run_direct(const SampledOuterArgs& args, float* scratch, cudaStream_t stream) {
  DirectCall call{call_of(args, scratch)};
  call.o_idx = args.o_idx;
  call.i_idx = args.i_idx;
  call.r = args.r;
  call.num_parts = ceil_div<int64_t>(args.r, kWarp);
  const auto kernel = args.dtype == DType::kBFloat16  ? direct_kernel<BFloat16>
                      : args.dtype == DType::kFloat16 ? direct_kernel<Float16>
                                                      : direct_kernel<float>;
  const int64_t blocks = args.B * call.num_chunks * call.num_parts;
  return launch(kernel, grid_of(blocks), kDirectThreads,
                kDirectThreads * static_cast<int64_t>(sizeof(float)), stream, call);
}

using StagedKernel = void (*)(StagedCall);

template <typename E>
StagedKernel staged_for(int64_t num_slots) {
  // Not every count: each is a kernel to compile, for 3 dtypes and 3 architectures.
  if (num_slots <= 5 * kStagedThreads) return staged_kernel<E, 5>;
  if (num_slots <= 13 * kStagedThreads) return staged_kernel<E, 13>;
  return staged_kernel<E, kMostCoordinates>;
}

cudaError_t run_staged(const SampledOuterArgs& args, const StagedOrder& order, float* scratch,
                       cudaStream_t stream) {
  const int64_t size = size_of(args.dtype), vector = 16 / size;
  StagedCall call{call_of(args, scratch)};
  call.packed = order.packed;
  call.target = order.target;
  int64_t width = 0, num_slots = 0, num_sums = 0;
  call.aligned = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
                 reinterpret_cast<uintptr_t>(args.dy) % 16 == 0;
  for (const int64_t stride :
       {args.x_stride_b, args.x_stride_t, args.dy_stride_b, args.dy_stride_t}) {
    call.aligned &= stride % vector == 0;
  }
  for (int64_t p = 0; p < order.num_passes; ++p) {
    const int64_t* const pass = order.passes + 6 * p;
    width = std::max(width, pass[3] - pass[2]);
    num_slots = std::max(num_slots, pass[5]);
    num_sums = std::max(num_sums, (pass[1] - pass[0]) * args.s);
    call.aligned &= pass[2] % vector == 0;
  }
  call.x_pitch = static_cast<int>(round_up(args.I + args.bias, vector));
  call.dy_pitch = static_cast<int>(round_up(width, vector));
  const int64_t position_bytes = (call.x_pitch + call.dy_pitch) * size;
  call.positions = kUnroll;
  while (2 * call.positions <= kMaxPositions && call.positions < call.chunk &&
         4 * call.positions * position_bytes <= kStagedBytes) {
    call.positions *= 2;
  }
  const int64_t shared_bytes = std::max<int64_t>(2 * call.positions * position_bytes, 4 * num_sums);
  int64_t limit = 0;
  const cudaError_t no_limit = shared_limit(&limit);
  if (no_limit != cudaSuccess) return no_limit;
  if (shared_bytes > limit) return run_direct(args, scratch, stream);
  const StagedKernel kernel = args.dtype == DType::kBFloat16  ? staged_for<BFloat16>(num_slots)
                              : args.dtype == DType::kFloat16 ? staged_for<Float16>(num_slots)
                                                              : staged_for<float>(num_slots);
  for (int64_t first = 0; first < order.num_passes; first += kMaxPasses) {
    call.num_passes = static_cast<int>(std::min<int64_t>(kMaxPasses, order.num_passes - first));
    for (int p = 0; p < call.num_passes; ++p) {
      const int64_t* const from = order.passes + 6 * (first + p);
      int32_t* const to = &call.passes[p].k0;
      std::transform(from, from + 6, to, [](int64_t v) { return static_cast<int32_t>(v); });
    }
    const int64_t blocks = args.B * call.num_chunks * call.num_passes;
    const cudaError_t error =
        launch(kernel, grid_of(blocks), kStagedThreads, shared_bytes, stream, call);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

const int64_t kMaxStagedSlots = kMostCoordinates * kStagedThreads;

int64_t sampled_outer_scratch(const SampledOuterArgs& args) {
  const int64_t num_chunks = num_chunks_of(args);
  return num_chunks == 1 ? 0 : num_chunks * args.B * args.r;
}

cudaError_t sampled_outer(const SampledOuterArgs& args, const StagedOrder* order, float* scratch,
                          cudaStream_t stream) {
  cudaError_t error =
      order ? run_staged(args, *order, scratch, stream) : run_direct(args, scratch, stream);
  const int64_t num_chunks = num_chunks_of(args);
  if (error != cudaSuccess || num_chunks == 1) return error;
  const SumCall call{scratch,  num_chunks,        args.B,           args.r, entry_weights(args),
                     args.out, args.out_stride_b, args.out_stride_k};
  const int64_t blocks = ceil_div<int64_t>(args.B * args.r, kSumThreads);
  return launch(sum_kernel, grid_of(blocks), kSumThreads, 0, stream, call);
}

int64_t sampled_outer_scratch(const SampledOuterArgs& args, const ColumnOrder& order) {
  return std::max(args.B * column_chunks(args) * column_slots(order), sampled_outer_scratch(args));
}

cudaError_t sampled_outer(const SampledOuterArgs& args, const ColumnOrder& order, float* scratch,
                          cudaStream_t stream) {
  int64_t limit = 0;
  const cudaError_t error = shared_limit(&limit);
  if (error != cudaSuccess) return error;
  if (2 * kBufferBytes > limit) return sampled_outer(args, nullptr, scratch, stream);
  return run_columns(args, order, scratch, stream);
}

}  // namespace cuda
}  // namespace dropinf
