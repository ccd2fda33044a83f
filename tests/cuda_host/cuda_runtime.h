// CUDA on the host, for tests: compiles .cu files as C++ and runs their kernels, one block after
// the other. The threads of a block take turns on one thread of the host. For a sanitizer every one
// is real: AddressSanitizer then sees accesses out of range, and ThreadSanitizer missing barriers.
//
// Shared memory starts as NaN in every block. Copies are made when they are waited for, so that a
// missing wait is seen. What kernels must not use is not here: atomics, static shared memory.

#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_execution {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;  // of a block

}  // namespace host_execution

#include "block_threads.h"

namespace host_execution {

// Of a block, as on sm_80; sm_90 and sm_100 have 227 KB, sm_86 and sm_89 99. It is the device's
// number too: with another limit it is another device.
inline std::atomic<int> max_shared_bytes{163 * 1024};

inline std::atomic<int> num_sms{1};

// What cudaFuncSetAttribute allowed a kernel on a device; 48 KB need no such call.
constexpr int kPlainSharedBytes = 48 * 1024;
inline std::mutex allowed_mutex;
inline std::map<std::pair<const void*, int>, int> allowed_bytes;

inline int allowed_shared(const void* kernel) {
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  const auto found = allowed_bytes.find({kernel, max_shared_bytes});
  return found == allowed_bytes.end() ? kPlainSharedBytes : found->second;
}

struct Warp {
  explicit Warp(int threads) : barrier(threads) {}
  Barrier barrier;
  uint64_t slots[kWarp] = {};
  int vote = 0;  // in __syncthreads_or
};

struct Block {
  Block(int threads, int64_t shared_bytes)
      : barrier(threads),
        start(::operator new(shared_bytes, std::align_val_t{16})),
        shared_bytes(shared_bytes) {
    for (int first = 0; first < threads; first += kWarp) {
      warps.push_back(std::make_unique<Warp>(std::min(kWarp, threads - first)));
    }
  }
  ~Block() { ::operator delete(start, std::align_val_t{16}); }
  Block(const Block&) = delete;
  void clear() { std::memset(start, 0xff, shared_bytes); }

  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  void* start;  // exactly as long as asked for, for AddressSanitizer
  int64_t shared_bytes;
};

struct Copy {
  void* to;
  const void* from;
  size_t num_bytes;
};

inline thread_local Block* block = nullptr;
inline thread_local std::deque<std::vector<Copy>>* copies;  // groups; the last one is open

// What others may change of this thread while it waits, where they take turns.
inline void wait_at(Barrier& barrier) {
  const dim3 mine = threadIdx;
  auto* const own = copies;
  barrier.wait();
  threadIdx = mine;
  copies = own;
}

inline void* shared_memory() { return block->start; }

inline Warp& warp() { return *block->warps[threadIdx.x / kWarp]; }

// A device faults on a vector that is not aligned to its size; a host may not.
inline void check_aligned(const void* address, size_t num_bytes) {
  if (reinterpret_cast<uintptr_t>(address) % num_bytes == 0) return;
  std::fprintf(stderr, "an access of %zu bytes at %p is not aligned\n", num_bytes, address);
  std::abort();
}

inline void copy_async(void* to, const void* from, size_t num_bytes) {
  check_aligned(to, num_bytes);
  check_aligned(from, num_bytes);
  copies->back().push_back({to, from, num_bytes});
}

inline void end_copy_group() { copies->emplace_back(); }

inline void wait_for_copies(size_t pending) {
  while (copies->size() > pending + 1) {
    for (const Copy& copy : copies->front()) std::memcpy(copy.to, copy.from, copy.num_bytes);
    copies->pop_front();
  }
}

// Runs `body`, a call of `kernel`.
template <typename Body>
cudaError_t run(const void* kernel, dim3 grid, int threads, int64_t shared_bytes,
                const Body& body) {
  const bool fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffffu &&
                    grid.y <= 65535 && grid.z <= 65535 && threads > 0 && threads <= kMaxThreads &&
                    shared_bytes <= allowed_shared(kernel);
  if (!fits) return cudaErrorInvalidValue;
  Block shared_block(threads, shared_bytes);
  const auto work = [&](unsigned thread) {
    std::deque<std::vector<Copy>> own;
    copies = &own;
    block = &shared_block;
    threadIdx = dim3(thread, 0, 0);
    blockDim = dim3(threads);
    gridDim = grid;
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, z);
          own.assign(1, {});
          if (thread == 0) shared_block.clear();
          wait_at(shared_block.barrier);
          body();
          wait_at(shared_block.barrier);
        }
      }
    }
  };
  run_threads(threads, work);
  return cudaSuccess;
}

// What lane `from` of the warp gave, for every lane that calls it.
template <typename T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& mine = warp();
  std::memcpy(&mine.slots[threadIdx.x % kWarp], &value, sizeof value);
  wait_at(mine.barrier);
  T result = value;
  if (from >= 0 && from < kWarp) std::memcpy(&result, &mine.slots[from], sizeof result);
  wait_at(mine.barrier);
  return result;
}

}  // namespace host_execution

enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) {
  *device = host_execution::max_shared_bytes;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const bool sms = attribute == cudaDevAttrMultiProcessorCount;
  *value = sms ? host_execution::num_sms.load() : device;
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int num_bytes) {
  const int device = host_execution::max_shared_bytes;
  if (num_bytes > device) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(host_execution::allowed_mutex);
  host_execution::allowed_bytes[{kernel, device}] = num_bytes;
  return cudaSuccess;
}

// Memory of the device is the host's; what is launched is over when the launch returns.
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMalloc(void** data, size_t num_bytes) {
  *data = ::operator new(num_bytes, std::align_val_t{256});
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* data) {
  ::operator delete(data, std::align_val_t{256});
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* data, int value, size_t num_bytes) {
  std::memset(data, value, num_bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t num_bytes, cudaMemcpyKind) {
  std::memcpy(to, from, num_bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

struct cudaDeviceProp {
  char name[256];
  int multiProcessorCount;
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"host", host_execution::num_sms};
  return cudaSuccess;
}

using cudaEvent_t = std::chrono::steady_clock::time_point*;
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new std::chrono::steady_clock::time_point;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *event = std::chrono::steady_clock::now();
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t first, cudaEvent_t last) {
  *ms = std::chrono::duration<float, std::milli>(*last - *first).count();
  return cudaSuccess;
}

inline void __syncthreads() { host_execution::wait_at(host_execution::block->barrier); }
inline void __syncwarp(unsigned = ~0u) { host_execution::wait_at(host_execution::warp().barrier); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return host_execution::exchange(value, lane % host_execution::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host_execution::exchange(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  return host_execution::exchange(value, static_cast<int>(threadIdx.x % 32) - int(delta));
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  return host_execution::exchange(value, static_cast<int>(threadIdx.x % 32) + int(delta));
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  host_execution::Warp& mine = host_execution::warp();
  mine.slots[threadIdx.x % 32] = predicate != 0;
  host_execution::wait_at(mine.barrier);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= unsigned(mine.slots[lane]) << lane;
  host_execution::wait_at(mine.barrier);
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

inline int __syncthreads_or(int predicate) {
  host_execution::Block& mine = *host_execution::block;
  const int any = __any_sync(~0u, predicate);
  if (threadIdx.x % 32 == 0) host_execution::warp().vote = any;
  host_execution::wait_at(mine.barrier);
  int result = 0;
  for (const auto& warp : mine.warps) result |= warp->vote;
  host_execution::wait_at(mine.barrier);
  return result;
}

inline int __popc(unsigned value) { return std::popcount(value); }

// Each byte of the result is one of the eight, as a digit of the selector says.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  unsigned result = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const unsigned from = selector >> 4 * byte & 7;
    result |= ((from < 4 ? a : b) >> 8 * (from % 4) & 0xff) << 8 * byte;
  }
  return result;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
// Rounded as the device's are; its approximate ones (__fdividef, rsqrtf) are not here.
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
