// What every CUDA kernel uses: widening loads, shared memory, asynchronous copies, the
// launch. No torch.
//
// Launchers do not wait for the device, and launch nothing for work of size zero. A kernel never
// reads at an index out of range: its entry becomes NaN, since a kernel cannot raise without a
// wait.
//
// Compiled by nvcc, and as C++ for the tests, which then have a <cuda_runtime.h> of their own.
// Whatever the two spell differently is in this file.
//
// Kernels use dynamic shared memory only, leave no barrier out by returning early, and use no
// atomics.

#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <set>
#include <utility>

#include "elements.h"

namespace dropinf {
namespace cuda {

constexpr int kWarp = 32;
constexpr size_t kMaxArgumentBytes = 32764;  // of a kernel, with CUDA 12.1 or later
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

inline int64_t round_up(int64_t size, int64_t multiple) {
  return ceil_div(size, multiple) * multiple;
}

__device__ inline float widen(float value) { return value; }

__device__ inline float widen(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

__device__ inline float widen(Float16 value) {
#ifdef __CUDACC__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return to_float(value);
#endif
}

// 1 / sqrt(value) to about its last bit, without the branches of a root and a division; 0 for
// infinity.
__device__ inline float inverse_root(float value) {
#ifdef __CUDACC__
  // The unit takes what is subnormal for zero.
  float root, of_tiny;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(value));
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(of_tiny) : "f"(16777216.0f * value));
  root = value < FLT_MIN ? 4096.0f * of_tiny : root;
#else
  const float root = 1.0f / std::sqrt(value);
#endif
  const float finite = fminf(value, FLT_MAX);
  return fmaf(0.5f * root, fmaf(-finite * root, root, 1.0f), root);
}

__device__ inline float not_a_number() { return __uint_as_float(0x7fc00000u); }

// A finished sum times the weight of entry k, if there are weights; what is not finite is left out
// by a weight of 0 too.
__device__ inline float weighted(const float* weights, int64_t k, float sum) {
  if (!weights) return sum;
  const float weight = weights[k];
  return weight == 0.0f ? 0.0f : weight * sum;
}

// Makes the compiler forget what it knows of a value, so that nothing made of it is kept in
// registers from one turn of a loop to the next.
__device__ inline void make_opaque(uint32_t& value) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(value));
#else
  (void)value;
#endif
}

// Reads four floats from an address that is a multiple of 16, or writes them to one.
__device__ inline void load_4(const float* from, float* to) {
#ifdef __CUDACC__
  const float4 values = *reinterpret_cast<const float4*>(from);
  to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
#else
  host_execution::check_aligned(from, 16);
  for (int k = 0; k < 4; ++k) to[k] = from[k];
#endif
}

__device__ inline void store_4(const float* from, float* to) {
#ifdef __CUDACC__
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
#else
  host_execution::check_aligned(to, 16);
  for (int k = 0; k < 4; ++k) to[k] = from[k];
#endif
}

// Reads kVector elements, widened: one, or as many as 16 bytes hold, from an address that is a
// multiple of 16. What is not `there` is not read, and 0.
template <int kVector, typename E>
__device__ void load_vector(const E* from, float* to, bool there = true) {
  static_assert(kVector == 1 || kVector * sizeof(E) == 16);
  if constexpr (kVector == 1) {
    to[0] = there ? widen(from[0]) : 0.0f;
  } else {
#ifdef __CUDACC__
    const uint4 bits = there ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (sizeof(E) == sizeof(float)) {
        to[k] = __uint_as_float(words[k]);
      } else {
        to[2 * k] = widen(E{static_cast<uint16_t>(words[k])});
        to[2 * k + 1] = widen(E{static_cast<uint16_t>(words[k] >> 16)});
      }
    }
#else
    host_execution::check_aligned(from, 16);
    for (int k = 0; k < kVector; ++k) to[k] = there ? widen(from[k]) : 0.0f;
#endif
  }
}

// Writes one float, or a multiple of four to an address that is a multiple of 16.
template <int kVector>
__device__ void store_vector(const float* from, float* to) {
  if constexpr (kVector == 1) {
    to[0] = from[0];
  } else {
#pragma unroll
    for (int k = 0; k < kVector; k += 4) store_4(from + k, to + k);
  }
}

// The block's dynamic shared memory, aligned to 16 bytes.
template <typename T>
__device__ T* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char dropinf_shared[];
  return reinterpret_cast<T*>(dropinf_shared);
#else
  return static_cast<T*>(host_execution::shared_memory());
#endif
}

// Copies 16 bytes to shared memory, without waiting; both addresses are multiples of 16.
__device__ inline void copy_16_async(void* shared, const void* global) {
#ifdef __CUDACC__
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
  host_execution::copy_async(shared, global, 16);
#endif
}

// The same of one float, if it is wanted: a predicate and no branch.
__device__ inline void copy_4_async(void* shared, const void* global, bool wanted) {
#ifdef __CUDACC__
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %2, 0;\n"
      "@wanted cp.async.ca.shared.global [%0], [%1], 4;\n}" ::"r"(address),
      "l"(global), "r"(int{wanted})
      : "memory");
#else
  if (wanted) host_execution::copy_async(shared, global, 4);
#endif
}

// The copies of this thread since the last call are a group.
__device__ inline void end_copy_group() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host_execution::end_copy_group();
#endif
}

// Waits for this thread's copies, but for those of the latest `pending` groups. Other threads see
// them after a barrier.
template <int pending>
__device__ void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
  host_execution::wait_for_copies(pending);
#endif
}

// A grid of so many blocks; of none, which is refused, if that is more than a grid can have.
inline dim3 grid_of(int64_t blocks) {
  return dim3(blocks <= INT32_MAX ? static_cast<unsigned>(blocks) : 0);
}

// Bytes of shared memory that a block may have on the current device: 163 KB on sm_80, 99 on sm_86
// and sm_89, 227 on sm_90 and sm_100.
inline cudaError_t shared_limit(int64_t* num_bytes) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *num_bytes = limit;
  return error;
}

// A kernel has no more than this unless it is allowed to.
constexpr int64_t kPlainSharedBytes = 48 * 1024;

// Allows a kernel all that the current device has, once: were it what a launch needs, a launch of
// another thread could lower it in between.
inline cudaError_t allow_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;  // on a device
  int device = 0;
  int64_t limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return cudaSuccess;
  error = shared_limit(&limit);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(limit));
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

// Launches kernel(params...); every launch of the package is this one.
template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int64_t shared_bytes,
                   cudaStream_t stream, Params... params) {
  static_assert((sizeof(Params) + ... + 0) <= kMaxArgumentBytes, "too many arguments");
  const auto address = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kPlainSharedBytes) {
    const cudaError_t error = allow_shared(address);
    if (error != cudaSuccess) return error;
  }
#ifdef __CUDACC__
  kernel<<<grid, threads, static_cast<size_t>(shared_bytes), stream>>>(params...);
  return cudaGetLastError();
#else
  (void)stream;
  return host_execution::run(address, grid, threads, shared_bytes, [&] { kernel(params...); });
#endif
}

}  // namespace cuda
}  // namespace dropinf
