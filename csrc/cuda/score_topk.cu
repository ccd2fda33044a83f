// The merge of score_topk on CUDA: scores [m, c] into each query's k largest so far.
//
// With few queries several blocks share the scores of each: a block keeps the k largest of its
// part, and in a second launch a block a query merges what they kept. A block reads its scores
// once, a tile ahead of the one it looks at. What comes before the last one kept goes behind those
// kept, and when there is no room for more, all are sorted. A tile of which nothing can enter costs
// one vote. Scores of random rows enter about k ln(c / k) times in all.
//
// The order is total: the larger score first, NaN the largest, and of equal scores the lower row.
// So no result depends on how the rows are cut into calls, parts or tiles.
//
// An H200 took 569 us (timed by hand) for 16 queries of 262,144 scores, k=100, at commit 2706d70,
// where a block had all scores of a query: 2,000 cycles a tile of 512, in which it mostly waited.
// By that rate one query of 4,194,304 takes 9.1 ms. Predicted now, at 1.8 GHz, where nothing is
// kept yet:
// - A tile of 2,048 that nothing enters is 64 instructions of a thread, 128 cycles of an SM, behind
//   some 900 for its loads, of which two blocks have 16 KB on their way; 1,200 more where some
//   enter. A step of a sort is 47 instructions and 160 cycles, for it waits for shared memory.
// - m=16, c=262,144, k=100: 17 parts of 8 tiles, 17,000 cycles, and 4 sorts of 45 steps, 29,000: 26
//   us. The second launch has 1,700 candidates in a tile and 2 sorts: 9 us. With 2 launches 38 us.
// - m=1, c=4,194,304, k=10: 264 parts of 8 tiles, and 3 sorts of 36 steps, 34,000 cycles: 19 us;
//   then 2,640 candidates in 2 tiles, and 2 sorts: 9 us. With 2 launches 31 us.
// Later in a pass over a store next to nothing enters, and one sort is left of each.

#include <algorithm>
#include <cmath>

#include "cuda/common.cuh"
#include "cuda/score_topk.cuh"

namespace dropinf {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kScores = 8;  // of a thread in a tile, and as many on their way
constexpr int kTile = kThreads * kScores;
constexpr int kMinSorted = kThreads;
constexpr int kMaxSorted = 2 * kMaxTopk;
constexpr int64_t kMinPart = 4 * kTile;  // scores of a part, at least: some 2 us

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

struct Call {
  ScoreTopkArgs args;
  int64_t num_parts, part;  // parts of a query, and scores of each
  int sorted;               // entries that are sorted at a time, a power of two
  float* values;            // [m, num_parts, k] what the parts keep
  int64_t* rows;
};

// Scores of consecutive rows.
struct Scores {
  const float* values;
  int64_t first;
  __device__ int64_t row(int64_t i) const { return first + i; }
};

// What the parts of a query kept.
struct Candidates {
  const float* values;
  const int64_t* rows;
  __device__ int64_t row(int64_t i) const { return rows[i]; }
};

// In shared memory: k entries in order, then those that entered since.
struct Entries {
  uint32_t* keys;
  int64_t* rows;
  int* counts;  // [kWarps]
  int sorted, k;
};

__device__ Entries entries_of(const Call& call) {
  Entries all;
  all.rows = shared_memory<int64_t>();
  all.keys = reinterpret_cast<uint32_t*>(all.rows + call.sorted);
  all.counts = reinterpret_cast<int*>(all.keys + call.sorted);
  all.sorted = call.sorted;
  all.k = static_cast<int>(call.args.k);
  return all;
}

__device__ void clear(const Entries& all, int begin) {
#pragma unroll 1
  for (int n = begin + threadIdx.x; n < all.sorted; n += kThreads) {
    all.keys[n] = kNothing;
    all.rows[n] = -1;
  }
}

__device__ bool before(const Entries& all, int a, int b) {
  if (all.keys[a] != all.keys[b]) return all.keys[a] > all.keys[b];
  return all.rows[a] < all.rows[b];
}

// A bitonic sort, the first in order first.
__device__ void sort(const Entries& all) {
  for (int size = 2; size <= all.sorted; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
#pragma unroll 1
      for (int n = threadIdx.x; n < all.sorted / 2; n += kThreads) {
        const int a = 2 * n - (n & (stride - 1)), b = a + stride;
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

// The last entry that may still be among the k: what enters comes before it.
struct Least {
  uint32_t key;
  int64_t row;

  // Whether a score of that key and of row source.row(i) enters.
  template <typename Source>
  __device__ bool admits(uint32_t other, const Source& source, int64_t i) const {
    return other > key || (other == key && key != kNothing && source.row(i) < row);
  }
};

// Sorts what entered into what is kept. Writes of entries go on after a barrier.
__device__ Least settle(const Entries& all, const Least& least) {
  __syncthreads();
  sort(all);
  const Least kept{all.keys[all.k - 1], all.rows[all.k - 1]};
  clear(all, all.k);
  const bool closer = kept.key > least.key || (kept.key == least.key && kept.row < least.row);
  return closer ? kept : least;
}

// This thread's scores of the tile at `start`; -inf where there are none.
template <typename Source>
__device__ void read(const Source& source, int64_t start, int64_t count, float* scores) {
  const float* const from = source.values + start + threadIdx.x;
  const int left = static_cast<int>(count - start < kTile ? count - start : kTile) - threadIdx.x;
#pragma unroll
  for (int n = 0; n < kScores; ++n) {
    scores[n] = n * kThreads < left ? from[n * kThreads] : score_of(kNothing);
  }
}

// A bit for each of them that enters.
template <typename Source>
__device__ unsigned entering(const Source& source, int64_t start, const uint32_t* keys,
                             const Least& least) {
  unsigned bits = 0;
#pragma unroll
  for (int n = 0; n < kScores; ++n) {
    const int64_t i = start + n * kThreads + threadIdx.x;
    bits |= static_cast<unsigned>(least.admits(keys[n], source, i)) << n;
  }
  return bits;
}

// Merges `count` scores into the entries that are kept.
template <typename Source>
__device__ void merge(const Entries& all, const Source& source, int64_t count, Least least) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int room = all.sorted - all.k;
  int entered = 0;  // since the last sort
  float scores[kScores], next[kScores];
  read(source, 0, count, next);
  for (int64_t start = 0; start < count; start += kTile) {
#pragma unroll
    for (int n = 0; n < kScores; ++n) scores[n] = next[n];
    read(source, start + kTile, count, next);
    const float floor = score_of(least.key);
    bool some = false;
#pragma unroll
    for (int n = 0; n < kScores; ++n) some |= !(scores[n] < floor);  // NaN too
    if (!__syncthreads_or(some)) continue;

    uint32_t keys[kScores];
#pragma unroll
    for (int n = 0; n < kScores; ++n) keys[n] = key_of(scores[n]);
    unsigned bits = entering(source, start, keys, least);
    for (;;) {
      const int mine = __popc(bits);
      int until = mine;  // of the threads of this warp, up to this one
#pragma unroll
      for (int delta = 1; delta < kWarp; delta *= 2) {
        const int earlier = __shfl_up_sync(kAllLanes, until, delta);
        if (lane >= delta) until += earlier;
      }
      if (lane == kWarp - 1) all.counts[warp] = until;
      __syncthreads();
      int place = entered + until - mine;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) place += all.counts[w];
        entered += all.counts[w];
      }
#pragma unroll
      for (int n = 0; n < kScores; ++n) {
        if ((bits >> n & 1) == 0 || place >= room) continue;
        all.keys[all.k + place] = keys[n];
        all.rows[all.k + place] = source.row(start + n * kThreads + threadIdx.x);
        bits ^= 1u << n;
        ++place;
      }
      if (entered <= room) break;
      least = settle(all, least);  // and what had no room may no longer enter
      entered = 0;
      bits &= entering(source, start, keys, least);
    }
  }
  if (entered > 0) settle(all, least);
}

__device__ void begin_with(const Entries& all, const float* values, const int64_t* rows) {
  clear(all, all.k);
#pragma unroll 1
  for (int n = threadIdx.x; n < all.k; n += kThreads) {
    all.keys[n] = key_of(values[n]);
    all.rows[n] = rows[n];
  }
}

__device__ void write(const Entries& all, float* values, int64_t* rows) {
#pragma unroll 1
  for (int n = threadIdx.x; n < all.k; n += kThreads) {
    values[n] = score_of(all.keys[n]);
    rows[n] = all.keys[n] == kNothing ? -1 : all.rows[n];
  }
}

// Before a call; a query's scores that do not come before it never enter.
__device__ Least least_of(const ScoreTopkArgs& args, int64_t q) {
  const int64_t last = (q + 1) * args.k - 1;
  return {key_of(args.values[last]), args.indices[last]};
}

// A block a query and part. Of one part, what it keeps is what is asked for.
__global__ void __launch_bounds__(kThreads, 2) part_kernel(const Call call) {
  const ScoreTopkArgs& args = call.args;
  const Entries all = entries_of(call);
  const int64_t q = blockIdx.x / call.num_parts, begin = blockIdx.x % call.num_parts * call.part;
  float* const values = call.values + blockIdx.x * args.k;
  int64_t* const rows = call.rows + blockIdx.x * args.k;
  if (call.num_parts == 1) {
    begin_with(all, values, rows);
  } else {
    clear(all, 0);
  }
  const Scores scores{args.scores + q * args.scores_stride + begin, args.first + begin};
  const int64_t left = args.c - begin;
  merge(all, scores, left < call.part ? left : call.part, least_of(args, q));
  write(all, values, rows);
}

// A block a query.
__global__ void __launch_bounds__(kThreads, 2) finish_kernel(const Call call) {
  const ScoreTopkArgs& args = call.args;
  const Entries all = entries_of(call);
  const int64_t q = blockIdx.x, count = call.num_parts * args.k;
  float* const values = args.values + q * args.k;
  int64_t* const rows = args.indices + q * args.k;
  const Candidates candidates{call.values + q * count, call.rows + q * count};
  begin_with(all, values, rows);
  merge(all, candidates, count, least_of(args, q));
  write(all, values, rows);
}

}  // namespace

// Two blocks for each SM; no more parts than leave the second launch fewer scores of a query than
// a part has, c / parts >= parts * k; and none that takes less time than that launch.
cudaError_t score_topk_parts(const ScoreTopkArgs& args, int64_t* num_parts) {
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  const auto most = static_cast<int64_t>(std::sqrt(static_cast<double>(args.c / args.k)));
  const int64_t wanted =
      std::min({ceil_div<int64_t>(2 * num_sms, args.m), most, args.c / kMinPart});
  *num_parts = std::max<int64_t>(1, wanted);
  return error;
}

int64_t score_topk_scratch(const ScoreTopkArgs& args, int64_t num_parts) {
  constexpr int64_t kFloats = 1 + sizeof(int64_t) / sizeof(float);
  return num_parts == 1 ? 0 : kFloats * args.m * num_parts * args.k;
}

cudaError_t score_topk(const ScoreTopkArgs& args, int64_t num_parts, float* scratch,
                       cudaStream_t stream) {
  Call call{args, num_parts, args.c, kMinSorted, args.values, args.indices};
  // With room for 3 k, four times as many scores are behind each sort as behind the one before it;
  // for the largest k there is room for k.
  while (call.sorted < 4 * args.k && call.sorted < kMaxSorted) call.sorted *= 2;
  const int64_t blocks = args.m * num_parts;
  if (num_parts > 1) {
    call.part = round_up(ceil_div(args.c, num_parts), kWarp);  // whole sectors
    call.rows = reinterpret_cast<int64_t*>(scratch);
    call.values = scratch + blocks * args.k * (sizeof(int64_t) / sizeof(float));
  }
  const int64_t shared_bytes =
      call.sorted * static_cast<int64_t>(sizeof(int64_t) + sizeof(uint32_t)) +
      kWarps * static_cast<int64_t>(sizeof(int));
  const cudaError_t error =
      launch(part_kernel, grid_of(blocks), kThreads, shared_bytes, stream, call);
  if (error != cudaSuccess || num_parts == 1) return error;
  return launch(finish_kernel, grid_of(args.m), kThreads, shared_bytes, stream, call);
}

}  // namespace cuda
}  // namespace dropinf
