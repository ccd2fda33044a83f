// sampled_embedding on CUDA. A block takes 128 neighbouring coordinates of one example, whose
// tokens are sorted. Its warps share out the positions: each looks its tokens up among the 128,
// lists those that are there in order of t, and adds their dy, a lane four coordinates. No position
// is touched for a coordinate that it does not meet, and the warps wait for each other only for the
// tokens and before their sums are added, in order. The bits of an entry depend on its example
// alone.
//
// Floor at B=8, T=2048, r=1024, a vocabulary of 50,000: 131 KB of ids, 8 KB of indices, 335 sectors
// of 32 bytes of dy (8 * 2048 * 1024 / 50,000 meetings) and 33 KB out, 0.04 µs at 4.3 TB/s. The
// wait for three loads, each for the one before (tokens, ids, dy, 0.7 µs each), takes longer: 2.1
// µs, and with the launch 5 µs. At B=8, T=8192, r=8192 every block of the 512 reads its example's
// ids, 34 MB from L2: 7 µs at 5 TB/s. Measured on an H200 at B=8, T=2048, O=4096, r=8192:
// 9 to 10 µs.

#include "cuda/common.cuh"
#include "cuda/sampled_embedding.cuh"

namespace dropinf {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kPerLane = 4;                     // coordinates
constexpr int kCoordinates = kPerLane * kWarp;  // of a block; a power of two
static_assert(kCoordinates <= kThreads);
constexpr int kIdsPerLane = 8;                   // loads in flight
constexpr int kPositions = kIdsPerLane * kWarp;  // of a warp at a time
constexpr int kHits = 4;                         // added at a time, so 16 loads are in flight

struct Shared {
  int32_t tokens[kCoordinates];  // of the coordinates, rising
  int32_t hits[kWarps][kPositions];
  float sums[kWarps][kCoordinates];
};

// The first of the block's tokens that is not below `id`, or the last one.
__device__ int lower_bound(const int32_t* tokens, int32_t id) {
  int k = 0;
#pragma unroll
  for (int step = kCoordinates / 2; step > 0; step /= 2) k += tokens[k + step - 1] < id ? step : 0;
  return k;
}

template <typename E>
__global__ void __launch_bounds__(kThreads, 3)
    embedding_kernel(const SampledEmbeddingArgs args, int blocks_per_example, int64_t part) {
  Shared& shared = *shared_memory<Shared>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t b = blockIdx.x / blocks_per_example;
  const int64_t k0 = static_cast<int64_t>(blockIdx.x % blocks_per_example) * kCoordinates;
  const int count = static_cast<int>(args.r - k0 < kCoordinates ? args.r - k0 : kCoordinates);
  int32_t o[kPerLane];
#pragma unroll
  for (int c = 0; c < kPerLane; ++c) {
    const int k = c * kWarp + lane;
    o[c] = k < count ? args.o_idx[k0 + k] : -1;
  }
  const int own = threadIdx.x;  // the coordinate that this thread loads and stores
  if (own < kCoordinates) shared.tokens[own] = own < count ? args.i_idx[k0 + own] : INT32_MAX;
  __syncthreads();

  int first[kPerLane];  // the first coordinate of the token; -1 if there is nothing to read
  float sum[kPerLane];
#pragma unroll
  for (int c = 0; c < kPerLane; ++c) {
    const int32_t token = shared.tokens[c * kWarp + lane];
    const bool good = o[c] >= 0 && o[c] < args.O && token >= 0;
    first[c] = good ? lower_bound(shared.tokens, token) : -1;
    sum[c] = 0.0f;
  }

  const int64_t* const ids = args.ids + b * args.T;
  const E* const dy = static_cast<const E*>(args.dy) + b * args.dy_stride_b;
  const int64_t t_end = (warp + 1) * part < args.T ? (warp + 1) * part : args.T;
  const int32_t lowest = shared.tokens[0], highest = shared.tokens[count - 1];
  int32_t* const hits = shared.hits[warp];
  for (int64_t t0 = warp * part; t0 < t_end; t0 += kPositions) {
    int32_t id[kIdsPerLane];
    unsigned wanted = 0;  // a bit each: whether the id is among the block's tokens, or between them
#pragma unroll
    for (int n = 0; n < kIdsPerLane; ++n) {
      const int64_t t = t0 + n * kWarp + lane;
      const int64_t whole = t < t_end ? ids[t] : INT64_MAX;
      id[n] = static_cast<int32_t>(whole);
      wanted |= (lowest <= whole && whole <= highest ? 1u : 0u) << n;
    }
    // Few lanes look, where the block's tokens are a small part of the vocabulary; those that do
    // look for all of their ids at once.
    int at[kIdsPerLane] = {};
    if (wanted) {
#pragma unroll
      for (int n = 0; n < kIdsPerLane; ++n) at[n] = lower_bound(shared.tokens, id[n]);
    }
    int num_hits = 0;
#pragma unroll
    for (int n = 0; n < kIdsPerLane; ++n) {
      const bool hit = (wanted >> n & 1) && shared.tokens[at[n]] == id[n];
      const unsigned lanes = __ballot_sync(kAllLanes, hit);
      const int before = __popc(lanes & ((1u << lane) - 1));
      if (hit) hits[num_hits + before] = (n * kWarp + lane) * kCoordinates + at[n];
      num_hits += __popc(lanes);
    }
    __syncwarp();
    for (int h = 0; h < num_hits; h += kHits) {
      float value[kHits][kPerLane];
#pragma unroll
      for (int n = 0; n < kHits; ++n) {
        const int hit = h + n < num_hits ? hits[h + n] : -1;
        const int k = hit < 0 ? kCoordinates : hit % kCoordinates;
        const E* const row = dy + (t0 + hit / kCoordinates) * args.dy_stride_t;
#pragma unroll
        for (int c = 0; c < kPerLane; ++c) {
          value[n][c] = k == first[c] ? widen(row[o[c]]) : 0.0f;
        }
      }
      // A sum that starts at +0 is never -0: adding the zeros changes no bits.
#pragma unroll
      for (int n = 0; n < kHits; ++n) {
#pragma unroll
        for (int c = 0; c < kPerLane; ++c) sum[c] += value[n][c];
      }
    }
    __syncwarp();
  }

  // Unsorted tokens were not found: NaN says so.
  bool sorted = true;
#pragma unroll
  for (int c = 0; c < kPerLane; ++c) {
    const int k = c * kWarp + lane;
    shared.sums[warp][k] = first[c] < 0 ? not_a_number() : sum[c];
    sorted &= k == 0 || shared.tokens[k - 1] <= shared.tokens[k];
  }
  sorted = !__any_sync(kAllLanes, !sorted);
  __syncthreads();
  if (own < count) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += shared.sums[w][own];
    args.out[b * args.out_stride_b + (k0 + own) * args.out_stride_k] =
        sorted ? weighted(args.weights, k0 + own, total) : not_a_number();
  }
}

template <typename E>
cudaError_t run(const SampledEmbeddingArgs& args, cudaStream_t stream) {
  const int64_t blocks_per_example = ceil_div<int64_t>(args.r, kCoordinates);
  if (args.B > INT32_MAX / blocks_per_example) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(args.B * blocks_per_example));
  // Positions of a warp.
  const int64_t part = round_up(ceil_div<int64_t>(args.T, kWarps), kWarp);
  return launch(embedding_kernel<E>, grid, kThreads, sizeof(Shared), stream, args,
                static_cast<int>(blocks_per_example), part);
}

}  // namespace

cudaError_t sampled_embedding(const SampledEmbeddingArgs& args, cudaStream_t stream) {
  if (args.B == 0 || args.r == 0) return cudaSuccess;
  switch (args.dtype) {
    case DType::kBFloat16:
      return run<BFloat16>(args, stream);
    case DType::kFloat16:
      return run<Float16>(args, stream);
    default:
      return run<float>(args, stream);
  }
}

}  // namespace cuda
}  // namespace dropinf
