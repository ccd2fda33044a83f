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

// Staged. Two blocks an SM, so that one computes while the other waits: 80 registers a thread, of
// which a coordinate takes two, and 80 KB each of sm_80's 164 KB (sm_90 has 228; the 100 KB of
// sm_86 and sm_89 hold one). A position of more than 28 KB, on sm_80 20, gets one block an SM; it
// has at most a fourth of what a block may have.
constexpr int kStagedThreads = 384;
constexpr int kMostCoordinates = 25;  // of a thread: r=8192 with its padding is mostly one pass
constexpr int kStagedBlocksPerSM = 2;
constexpr int64_t kStagedBytes = 80 * 1024;
constexpr int kUnroll = 2;         // positions that a coordinate is unpacked for
constexpr int kMaxPositions = 16;  // in a buffer; a multiple of kUnroll
constexpr int kMaxPasses = 64;     // in a launch; they travel as kernel arguments

struct Pass {
  int32_t k0, k1, o0, o1, first, num_slots;
};

struct StagedCall : OuterCall {
  bool aligned;
  const int32_t *packed, *target;
  int positions;          // in a buffer
  int x_pitch, dy_pitch;  // elements of a staged position, multiples of 16 bytes
  int num_passes;
  Pass passes[kMaxPasses];
};

template <typename E>
__device__ E one();
template <>
__device__ inline float one<float>() {
  return 1.0f;
}
template <>
__device__ inline BFloat16 one<BFloat16>() {
  return {0x3f80};
}
template <>
__device__ inline Float16 one<Float16>() {
  return {0x3c00};
}

// Starts the copy of a row to shared memory, or clears it if it is behind the last position.
template <typename E>
__device__ void stage_row(E* to, const E* from, int width, bool there, bool aligned) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(E));
  const int done = there && aligned ? width / kVector * kVector : 0;
#pragma unroll 1  // registers are for the sums
  for (int i = threadIdx.x * kVector; i < done; i += kStagedThreads * kVector) {
    copy_16_async(to + i, from + i);
  }
#pragma unroll 1
  for (int i = done + threadIdx.x; i < width; i += kStagedThreads) to[i] = there ? from[i] : E{};
}

// What lies so many bytes behind. Offsets need no multiplication, so that an address is a register
// and what all threads share.
template <typename E>
__device__ E at_byte(const E* from, uint32_t offset) {
  return *reinterpret_cast<const E*>(reinterpret_cast<const char*>(from) + offset);
}

// Reads this thread's coordinates, as offsets in bytes, of dy in the upper half; no sums yet.
template <typename E, int kCoordinates>
__device__ void begin_sums(const StagedCall& call, const Pass& pass,
                           uint32_t (&offsets)[kCoordinates], float (&sums)[kCoordinates]) {
#pragma unroll
  for (int k = 0; k < kCoordinates; ++k) {
    const int slot = k * kStagedThreads + threadIdx.x;
    // Lanes behind the last slot do the same work on element 0, which costs less than a branch.
    const int32_t packed = slot < pass.num_slots ? call.packed[pass.first + slot] : 0;
    offsets[k] = static_cast<uint32_t>(packed) * static_cast<uint32_t>(sizeof(E));
    sums[k] = 0.0f;
  }
}

// Adds the products of a buffer to this thread's sums.
template <typename E, int kCoordinates>
__device__ void add_products(const StagedCall& call, const E* x_rows, const E* dy_rows,
                             uint32_t (&offsets)[kCoordinates], float (&sums)[kCoordinates]) {
#pragma unroll 1
  for (int p = 0; p < call.positions; p += kUnroll) {
#pragma unroll
    for (int k = 0; k < kCoordinates; ++k) {
      make_opaque(offsets[k]);  // or o and i are kept for every k, and registers spill
      const uint32_t o = offsets[k] >> 16, i = offsets[k] & 0xffff;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        sums[k] += widen(at_byte(x_rows + u * call.x_pitch, i)) *
                   widen(at_byte(dy_rows + u * call.dy_pitch, o));
      }
    }
    x_rows += kUnroll * call.x_pitch;
    dy_rows += kUnroll * call.dy_pitch;
  }
}

// Writes the entries of chunk c of example b, from the sums of all threads.
template <int kCoordinates>
__device__ void write_entries(const StagedCall& call, const Pass& pass, int64_t c, int64_t b,
                              const float (&sums)[kCoordinates]) {
  float* const placed = shared_memory<float>();  // [k1 - k0, s], over the buffers
#pragma unroll
  for (int k = 0; k < kCoordinates; ++k) {
    const int slot = k * kStagedThreads + threadIdx.x;
    if (slot >= pass.num_slots) break;
    const int target = call.target[pass.first + slot];
    if (target >= 0) placed[target] = sums[k];  // else padding
  }
  __syncthreads();
  float* const to = call.sums + c * call.stride_chunk + b * call.stride_b;
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
  const int I = static_cast<int>(call.I), O = pass.o1 - pass.o0;
  const int64_t begin = c * call.chunk;
  const int64_t left = call.T - begin;
  const int count = static_cast<int>(left < call.chunk ? left : call.chunk);
  const int num_buffers = ceil_div(count, call.positions);
  const E* x = static_cast<const E*>(call.x.data) + b * call.x.stride_b + begin * call.x.stride_t;
  const E* dy = static_cast<const E*>(call.dy.data) + b * call.dy.stride_b +
                begin * call.dy.stride_t + pass.o0;

  E* const shared = shared_memory<E>();  // two buffers
  const int x_size = call.positions * call.x_pitch;
  const int buffer_size = x_size + call.positions * call.dy_pitch;
  uint32_t offsets[kCoordinates];
  float sums[kCoordinates];
  begin_sums<E>(call, pass, offsets, sums);
  if (call.bias) {  // no copy writes there
    for (int p = threadIdx.x; p < 2 * call.positions; p += kStagedThreads) {
      shared[p / call.positions * buffer_size + p % call.positions * call.x_pitch + I] = one<E>();
    }
  }

  // Starts the copies of buffer n. What loads it in another way, such as bulk copies, takes its
  // place.
  const auto start_copies = [&](int n) {
    E* const to = shared + n % 2 * buffer_size;
#pragma unroll 1
    for (int p = 0; p < call.positions; ++p) {
      const bool there = n * call.positions + p < count;
      stage_row(to + p * call.x_pitch, x, I, there, call.aligned);
      stage_row(to + x_size + p * call.dy_pitch, dy, O, there, call.aligned);
      x += call.x.stride_t;
      dy += call.dy.stride_t;
    }
  };

  // Turn n starts the copies of buffer n and works on buffer n - 1.
  for (int n = 0; n <= num_buffers; ++n) {
    if (n < num_buffers) start_copies(n);
    end_copy_group();
    if (n == 0) continue;
    wait_for_copies<1>();
    __syncthreads();
    const E* const x_rows = shared + (n - 1) % 2 * buffer_size;
    add_products(call, x_rows, x_rows + x_size, offsets, sums);
    __syncthreads();
  }
  write_entries(call, pass, c, b, sums);
}

}  // namespace cuda
}  // namespace dropinf
