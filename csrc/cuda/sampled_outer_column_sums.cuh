// What the sums of the columns kernel go through on their way to the rows, and the launches of all
// of it; see sampled_outer_columns.cuh.

#pragma once

#include <algorithm>

#include "cuda/sampled_outer_columns.cuh"

namespace dropinf {
namespace cuda {

struct ColumnSumsCall {
  const float* sums;  // [B, num_chunks, num_slots]
  int64_t num_chunks, B, num_slots, r;
  const int32_t* target;  // [num_slots]: an entry, or -1
  const float* weights;   // [r], or null for ones
  float* out;
  int64_t out_stride_b, out_stride_k;
};

// A thread a slot.
__global__ void __launch_bounds__(kColumnSumThreads) column_sums_kernel(const ColumnSumsCall call) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kColumnSumThreads + threadIdx.x;
  if (n >= call.B * call.num_slots) return;
  const int64_t b = n / call.num_slots, slot = n % call.num_slots;
  const int64_t k = call.target[slot];
  if (k < 0 || k >= call.r) return;
  const float* const sums = call.sums + b * call.num_chunks * call.num_slots + slot;
  float total = 0.0f;
  for (int64_t c = 0; c < call.num_chunks; ++c) total += sums[c * call.num_slots];
  call.out[b * call.out_stride_b + k * call.out_stride_k] = weighted(call.weights, k, total);
}

inline int64_t column_slots(const ColumnOrder& order) {
  return order.num_passes * kLaneSteps * kColumnLanes;
}

inline int64_t column_chunks(const SampledOuterArgs& args) {
  return std::max<int64_t>(1, ceil_div(args.T, kColumnChunk));
}

// Whether every four columns of an operand that a pass stages together can be read as 8 bytes.
inline bool columns_aligned(const SampledOuterArgs& args, const ColumnOrder& order) {
  const uintptr_t bytes = 8;
  bool aligned = reinterpret_cast<uintptr_t>(args.x) % bytes == 0 &&
                 reinterpret_cast<uintptr_t>(args.dy) % bytes == 0;
  for (const int64_t size :
       {args.x_stride_b, args.x_stride_t, args.dy_stride_b, args.dy_stride_t, args.I, args.O}) {
    aligned &= size % 4 == 0;
  }
  for (int64_t p = 0; p < order.num_passes; ++p) {
    const int64_t* const pass = order.passes + 5 * p;
    aligned &= pass[0] % 4 == 0 && (pass[1] % 4 == 0 || pass[1] >= args.I) && pass[2] % 4 == 0 &&
               pass[3] % 4 == 0;
  }
  return aligned;
}

inline cudaError_t run_columns(const SampledOuterArgs& args, const ColumnOrder& order,
                               float* scratch, cudaStream_t stream) {
  ColumnsCall call{};
  const int64_t size = size_of(args.dtype);
  call.x = static_cast<const unsigned char*>(args.x);
  call.dy = static_cast<const unsigned char*>(args.dy);
  call.x_example_bytes = args.x_stride_b * size;
  call.x_row_bytes = args.x_stride_t * size;
  call.dy_example_bytes = args.dy_stride_b * size;
  call.dy_row_bytes = args.dy_stride_t * size;
  call.T = args.T;
  call.I = args.I;
  call.num_chunks = column_chunks(args);
  call.packed = order.packed;
  call.columns = order.columns;
  call.sums = scratch;
  call.num_passes = static_cast<int>(order.num_passes);
  for (int p = 0; p < call.num_passes; ++p) {
    const int64_t* const from = order.passes + 5 * p;
    int32_t* const to = &call.passes[p].i0;
    std::transform(from, from + 4, to, [](int64_t v) { return static_cast<int32_t>(v); });
    call.pieces |= static_cast<uint32_t>(from[4]);
  }
  const bool aligned = columns_aligned(args, order);
  const auto kernel =
      args.dtype == DType::kBFloat16
          ? (aligned ? columns_kernel<BFloat16, true> : columns_kernel<BFloat16, false>)
          : (aligned ? columns_kernel<Float16, true> : columns_kernel<Float16, false>);
  const int64_t blocks = args.B * call.num_chunks * order.num_passes;
  const cudaError_t error =
      launch(kernel, grid_of(blocks), kColumnThreads, 2 * kBufferBytes, stream, call);
  if (error != cudaSuccess) return error;
  const int64_t num_slots = column_slots(order);
  const ColumnSumsCall sums{
      scratch,      call.num_chunks, args.B,   num_slots,         args.r,
      order.target, args.weights,    args.out, args.out_stride_b, args.out_stride_k};
  return launch(column_sums_kernel,
                grid_of(ceil_div<int64_t>(args.B * num_slots, kColumnSumThreads)),
                kColumnSumThreads, 0, stream, sums);
}

}  // namespace cuda
}  // namespace dropinf
