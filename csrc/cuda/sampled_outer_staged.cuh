// The staged kernel of sampled_outer, and what both kernels are called with; see sampled_outer.cu.

#pragma once

#include "cuda/common.cuh"

namespace dropinf {
namespace cuda {

struct Rows {  // x or dy
  const void* data;
  int64_t stride_b, stride_t;
};

struct OuterCall {  // what both kernels have
  Rows x, dy;
  int64_t T, I, O;
  const float* weights;        // [r, s] of summands; null for ones, or where s = 1
  const float* entry_weights;  // [r]; null for ones, where s > 1, or where there are partial sums
  int64_t s;
  bool bias;
  int64_t chunk, num_chunks;
  float* sums;  // + chunk * stride_chunk + b * stride_b + k * stride_k
  int64_t stride_chunk, stride_b, stride_k;
};

// Staged. Two blocks an SM, so that one computes while the other loads: 80 registers a thread, of
// which a coordinate takes two, and half of the shared memory each.
constexpr int kStagedThreads = 384;
constexpr int kMostCoordinates = 25;  // of a thread: r=8192 with its padding is mostly one pass
constexpr int kStagedBlocksPerSM = 2;
constexpr int kUnroll = 2;      // rows that a coordinate is unpacked for
constexpr int kMaxRows = 8;     // in a buffer
constexpr int kMaxPasses = 64;  // in a launch; they travel as kernel arguments
constexpr int kVector = 4;      // elements that are loaded at once

// A row of shared memory is x and then dy, in words of one element, of as many positions as a word
// holds; the first is in its low bits.
template <typename E>
constexpr int kPositions = 4 / static_cast<int>(sizeof(E));

template <typename E>
constexpr int kBuffers = kPositions<E> == 1 ? 2 : 1;

struct Pass {
  int32_t k0, k1, o0, o1, first, num_slots;
};

struct StagedCall : OuterCall {
  bool aligned;
  const int32_t *packed, *target;
  int rows;               // in a buffer
  int x_pitch, dy_pitch;  // words of a row, multiples of kVector
  int num_passes;
  Pass passes[kMaxPasses];
};

template <typename E>
constexpr uint32_t kOnes = 0;  // a word of the bias
template <>
constexpr uint32_t kOnes<float> = 0x3f800000;
template <>
constexpr uint32_t kOnes<BFloat16> = 0x3f803f80;
template <>
constexpr uint32_t kOnes<Float16> = 0x3c003c00;

// What a block reads of x or dy: the columns of its pass, from its first position on.
template <typename E>
struct Columns {
  const E* data;
  int64_t stride;
  int width;
};

// Starts copies of `count` positions, each to a row of its own.
__device__ inline void load_columns(const Columns<float>& from, int first, int count, bool aligned,
                                    uint32_t* to, int pitch) {
  const float* const begin = from.data + first * from.stride;
  const int done = aligned ? from.width / kVector * kVector : 0;
#pragma unroll 1  // registers are for the sums
  for (int i = threadIdx.x * kVector; i < done; i += kStagedThreads * kVector) {
    const float* row = begin + i;
    uint32_t* to_row = to + i;
#pragma unroll 1
    for (int p = 0; p < count; ++p) {
      copy_16_async(to_row, row);
      row += from.stride;
      to_row += pitch;
    }
  }
#pragma unroll 1
  for (int i = done + threadIdx.x; i < from.width; i += kStagedThreads) {
#pragma unroll 1
    for (int p = 0; p < count; ++p) to[p * pitch + i] = __float_as_uint(begin[p * from.stride + i]);
  }
}

constexpr int kStep = kStagedThreads * kVector;

// kLoads vectors, kStep apart, of `count` positions, two to a row; zeros for the second if it is
// not there.
template <int kLoads, typename E>
__device__ void load_vectors(const E* low_row, int64_t stride, int count, uint32_t* to, int pitch) {
#pragma unroll 1
  for (int p = 0; p < count; p += 2) {
    const E* const high_row = low_row + stride;
    Halves low[kLoads], high[kLoads];
#pragma unroll
    for (int n = 0; n < kLoads; ++n) low[n] = load_halves(low_row + n * kStep), high[n] = {};
    if (p + 1 < count) {
#pragma unroll
      for (int n = 0; n < kLoads; ++n) high[n] = load_halves(high_row + n * kStep);
    }
#pragma unroll
    for (int n = 0; n < kLoads; ++n) store_interleaved(low[n], high[n], to + n * kStep);
    low_row = high_row + stride;
    to += pitch;
  }
}

template <typename E>
__device__ void load_columns(const Columns<E>& from, int first, int count, bool aligned,
                             uint32_t* to, int pitch) {
  const E* const begin = from.data + first * from.stride;
  const int done = aligned ? from.width / kVector * kVector : 0;
#pragma unroll 1
  for (int i = threadIdx.x * kVector; i < done; i += 3 * kStep) {
    if (i + 2 * kStep < done) {
      load_vectors<3>(begin + i, from.stride, count, to + i, pitch);
    } else if (i + kStep < done) {
      load_vectors<2>(begin + i, from.stride, count, to + i, pitch);
    } else {
      load_vectors<1>(begin + i, from.stride, count, to + i, pitch);
    }
  }
#pragma unroll 1
  for (int i = done + threadIdx.x; i < from.width; i += kStagedThreads) {
    const E* row = begin + i;
#pragma unroll 1
    for (int p = 0; p < count; p += 2, row += 2 * from.stride) {
      const uint32_t high = p + 1 < count ? row[from.stride].bits : 0;
      to[p / 2 * pitch + i] = high << 16 | row->bits;
    }
  }
}

// The positions of a buffer that are there.
template <typename E>
__device__ void load_rows(const StagedCall& call, const Columns<E>& x, const Columns<E>& dy,
                          int first, int count, uint32_t* to) {
  const int most = call.rows * kPositions<E>;
  const int here = count - first < most ? count - first : most;
  const int pitch = call.x_pitch + call.dy_pitch;
  load_columns(x, first, here, call.aligned, to, pitch);
  load_columns(dy, first, here, call.aligned, to + call.x_pitch, pitch);
}

// Has L2 fetch what load_rows will read: a thread a position, and they are spread over the warps.
template <typename E>
__device__ void prefetch_rows(const StagedCall& call, const Columns<E>& x, const Columns<E>& dy,
                              int first, int count) {
  constexpr int kSpread = kStagedThreads / (kMaxRows * kPositions<E>);
  const int n = threadIdx.x / kSpread;
  if (!call.aligned || threadIdx.x % kSpread != 0) return;
  if (n >= call.rows * kPositions<E> || first + n >= count) return;
  prefetch(x.data + (first + n) * x.stride, x.width * sizeof(E));
  prefetch(dy.data + (first + n) * dy.stride, dy.width * sizeof(E));
}

// A coordinate as a thread keeps it: the bytes from the start of a row's x and dy to its words.
__device__ inline uint32_t pack_offsets(uint32_t packed) {  // o << 16 | i
  return packed >> 16 << 17 | (packed & 0xffff) << 2;
}

__device__ inline uint32_t word_at(const uint32_t* row, uint32_t offset) {
  return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(row) + offset);
}

// sums += x * dy of kRows rows.
template <typename E, int kRows, int kCoordinates>
__device__ void add_rows(const uint32_t* rows, int x_pitch, int pitch,
                         uint32_t (&offsets)[kCoordinates], float (&sums)[kCoordinates]) {
#pragma unroll
  for (int k = 0; k < kCoordinates; ++k) {
    make_opaque(offsets[k]);  // or o and i are kept for every k, and registers spill
    const uint32_t o = offsets[k] >> 15 & 0x1fffc, i = offsets[k] & 0x1fffc;
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const uint32_t x = word_at(rows + u * pitch, i), dy = word_at(rows + u * pitch + x_pitch, o);
      sums[k] += widen_low<E>(x) * widen_low<E>(dy);
      if constexpr (kPositions<E> == 2) sums[k] += widen_high<E>(x) * widen_high<E>(dy);
    }
  }
}

// Sums to their places, and those of an entry added with their weights.
template <int kCoordinates>
__device__ void write_sums(const StagedCall& call, const Pass& pass,
                           const float (&sums)[kCoordinates], float* to) {
  float* const placed = shared_memory<float>();  // [k1 - k0, s], over the buffers
#pragma unroll
  for (int k = 0; k < kCoordinates; ++k) {
    const int slot = k * kStagedThreads + threadIdx.x;
    if (slot >= pass.num_slots) break;
    const int target = call.target[pass.first + slot];
    if (target >= 0) placed[target] = sums[k];  // else padding
  }
  __syncthreads();
  const int s = static_cast<int>(call.s);
  for (int n = threadIdx.x; n < pass.k1 - pass.k0; n += kStagedThreads) {
    const int64_t k = pass.k0 + n;
    float total = 0.0f;
    for (int j = 0; j < s; ++j) {
      total += weighted(call.weights, k * s + j, placed[n * s + j]);
    }
    to[k * call.stride_k] = weighted(call.entry_weights, k, total);
  }
}

// blockIdx.x counts (b, chunk, pass), the passes fastest: they read the same x.
template <typename E, int kCoordinates>
__global__ void __launch_bounds__(kStagedThreads, kStagedBlocksPerSM)
    staged_kernel(const StagedCall call) {
  const int64_t item = blockIdx.x / call.num_passes;
  const Pass& pass = call.passes[blockIdx.x % call.num_passes];
  const int64_t c = item % call.num_chunks, b = item / call.num_chunks;
  const int64_t begin = c * call.chunk;
  const int64_t left = call.T - begin;
  const int count = static_cast<int>(left < call.chunk ? left : call.chunk);
  const int I = static_cast<int>(call.I);
  const Columns<E> x{
      static_cast<const E*>(call.x.data) + b * call.x.stride_b + begin * call.x.stride_t,
      call.x.stride_t, I};
  const Columns<E> dy{static_cast<const E*>(call.dy.data) + b * call.dy.stride_b +
                          begin * call.dy.stride_t + pass.o0,
                      call.dy.stride_t, pass.o1 - pass.o0};

  uint32_t* const shared = shared_memory<uint32_t>();
  const int pitch = call.x_pitch + call.dy_pitch;
  uint32_t offsets[kCoordinates];
  float sums[kCoordinates];
#pragma unroll
  for (int k = 0; k < kCoordinates; ++k) {
    const int slot = k * kStagedThreads + threadIdx.x;
    // Lanes behind the last slot do the same work on element 0, which costs less than a branch.
    const int32_t packed = slot < pass.num_slots ? call.packed[pass.first + slot] : 0;
    offsets[k] = pack_offsets(static_cast<uint32_t>(packed));
    sums[k] = 0.0f;
  }
  if (call.bias) {  // no load writes there
    for (int row = threadIdx.x; row < kBuffers<E> * call.rows; row += kStagedThreads) {
      shared[row * pitch + I] = kOnes<E>;
    }
  }

  const int step = call.rows * kPositions<E>;
  if constexpr (kBuffers<E> == 2) load_rows(call, x, dy, 0, count, shared);
  for (int first = 0, buffer = 0; first < count; first += step) {
    if constexpr (kBuffers<E> == 2) {
      end_copy_group();
      wait_for_copies<0>();
      __syncthreads();  // all are there, and the other buffer is no longer read
      load_rows(call, x, dy, first + step, count, shared + (1 - buffer) * call.rows * pitch);
    } else {
      prefetch_rows(call, x, dy, first + step, count);
      __syncthreads();  // the buffer is no longer read
      load_rows(call, x, dy, first, count, shared);
      __syncthreads();
    }
    const uint32_t* const rows = shared + buffer * call.rows * pitch;
    const int there = ceil_div(count - first, kPositions<E>);
    const int num_rows = there < call.rows ? there : call.rows;
    int row = 0;
#pragma unroll 1
    for (; row + kUnroll <= num_rows; row += kUnroll) {
      add_rows<E, kUnroll>(rows + row * pitch, call.x_pitch, pitch, offsets, sums);
    }
    if (row < num_rows) add_rows<E, 1>(rows + row * pitch, call.x_pitch, pitch, offsets, sums);
    if constexpr (kBuffers<E> == 2) buffer = 1 - buffer;
  }
  __syncthreads();
  write_sums(call, pass, sums, call.sums + c * call.stride_chunk + b * call.stride_b);
}

}  // namespace cuda
}  // namespace dropinf
