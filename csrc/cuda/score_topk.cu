// The merge of score_topk on CUDA: scores [m, c] into each query's k largest so far, a block a
// query.
//
// A block reads its scores once. One that beats the smallest kept goes to a buffer; before that
// could overflow, the buffer and what is kept are sorted together. Scores of random rows beat it
// about k ln(c / k) times in all, so sorts are rare after the first thousands of rows.
//
// The order is total: the larger score first, NaN the largest, and of equal scores the lower row.
// So no result depends on how the rows are cut into calls.
//
// 16 queries of 262,144 scores are 16.8 MB, of which an SM reads its own 1 MB; on an H200 that
// takes 569 us, which was predicted to be 20; the product that makes them reads 262,144 rows, at
// R=65536 16 ms.

#include "cuda/common.cuh"
#include "cuda/score_topk.cuh"

namespace dropinf {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kScores = 2;  // of a thread, before the block looks at the buffer
constexpr int kTile = kThreads * kScores;
constexpr int kBuffer = 2 * kTile;
constexpr int kSorted = kMaxTopk + kBuffer;
static_assert((kSorted & (kSorted - 1)) == 0, "the sort wants a power of two");

constexpr uint32_t kNothing = 0;  // the key of -inf, and of no score at all

// Rises with the score; -0 equals 0.
__device__ uint32_t key_of(float score) {
  if (score != score) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);
  const uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
  return bits == 0xff800000u ? kNothing : key;
}

__device__ float score_of(uint32_t key) {
  if (key == kNothing) return __uint_as_float(0xff800000u);
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

struct Entries {  // in shared memory: kMaxTopk kept, then the buffer
  uint32_t* keys;
  int64_t* rows;
};

__device__ bool before(const Entries& all, int a, int b) {
  if (all.keys[a] != all.keys[b]) return all.keys[a] > all.keys[b];
  return all.rows[a] < all.rows[b];
}

// A bitonic sort, the first in order first.
__device__ void sort(const Entries& all) {
  for (int size = 2; size <= kSorted; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int n = threadIdx.x; n < kSorted / 2; n += kThreads) {
        const int a = n / stride * 2 * stride + n % stride, b = a + stride;
        const bool in_order = (a & size) == 0;
        if (before(all, b, a) == in_order) {
          const uint32_t key = all.keys[a];
          const int64_t row = all.rows[a];
          all.keys[a] = all.keys[b];
          all.rows[a] = all.rows[b];
          all.keys[b] = key;
          all.rows[b] = row;
        }
      }
      __syncthreads();
    }
  }
}

struct Merge {
  const float* scores;
  int64_t stride, c, first;
  float* values;
  int64_t* indices;
  int k;
};

__global__ void __launch_bounds__(kThreads) merge_kernel(const Merge merge) {
  Entries all;
  all.rows = shared_memory<int64_t>();
  all.keys = reinterpret_cast<uint32_t*>(all.rows + kSorted);
  int* const counts = reinterpret_cast<int*>(all.keys + kSorted);  // [kWarps]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, k = merge.k;
  const int64_t q = blockIdx.x;
  const float* const scores = merge.scores + q * merge.stride;
  float* const values = merge.values + q * k;
  int64_t* const indices = merge.indices + q * k;

  for (int n = threadIdx.x; n < kSorted; n += kThreads) {
    all.keys[n] = n < k ? key_of(values[n]) : kNothing;
    all.rows[n] = n < k ? indices[n] : -1;
  }
  __syncthreads();

  int buffered = 0;
  for (int64_t start = 0; start < merge.c; start += kTile) {
    const uint32_t least = all.keys[k - 1];
    const int64_t least_row = all.rows[k - 1];
    uint32_t keys[kScores];
    unsigned enters[kScores];
    int mine = 0;  // of this warp
#pragma unroll
    for (int n = 0; n < kScores; ++n) {
      const int64_t i = start + n * kThreads + threadIdx.x;
      keys[n] = i < merge.c ? key_of(scores[i]) : kNothing;
      const bool tie = keys[n] == least && merge.first + i < least_row;
      enters[n] = __ballot_sync(kAllLanes, keys[n] != kNothing && (keys[n] > least || tie));
      mine += __popc(enters[n]);
    }
    if (lane == 0) counts[warp] = mine;
    __syncthreads();
    int at = kMaxTopk + buffered;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += counts[w];
      buffered += counts[w];
    }
#pragma unroll
    for (int n = 0; n < kScores; ++n) {
      if (enters[n] >> lane & 1) {
        const int place = at + __popc(enters[n] & ((1u << lane) - 1));
        all.keys[place] = keys[n];
        all.rows[place] = merge.first + start + n * kThreads + threadIdx.x;
      }
      at += __popc(enters[n]);
    }
    __syncthreads();
    const bool last = start + kTile >= merge.c;
    if (buffered > kBuffer - kTile || (last && buffered > 0)) {
      sort(all);
      for (int n = k + threadIdx.x; n < kSorted; n += kThreads) {
        all.keys[n] = kNothing;
        all.rows[n] = -1;
      }
      buffered = 0;
      __syncthreads();
    }
  }
  for (int n = threadIdx.x; n < k; n += kThreads) {
    values[n] = score_of(all.keys[n]);
    indices[n] = all.keys[n] == kNothing ? -1 : all.rows[n];
  }
}

}  // namespace

cudaError_t score_topk(const float* scores, int64_t m, int64_t c, int64_t stride, int64_t first,
                       float* values, int64_t* indices, int64_t k, cudaStream_t stream) {
  const Merge merge{scores, stride, c, first, values, indices, static_cast<int>(k)};
  const int64_t shared_bytes =
      kSorted * (sizeof(int64_t) + sizeof(uint32_t)) + kWarps * sizeof(int);
  return launch(merge_kernel, grid_of(m), kThreads, shared_bytes, stream, merge);
}

}  // namespace cuda
}  // namespace dropinf
