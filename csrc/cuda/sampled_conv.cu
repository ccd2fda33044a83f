// sampled_conv on CUDA. Where positions are neighbours in memory, a coordinate's outputs are shared
// by 8, 32 or 128 lanes, by the size of the plane; where channels are (channels_last), a lane takes
// a coordinate and the warps of a block share the outputs, so that coordinates of one o read dy
// together. Both read x and dy in place. What meets padding adds nothing, or NaN where dy is not
// finite, as 0 times that is. An entry's sums have an order that depends on the layer and its
// strides alone.
//
// Floor: one read of x and dy. For 64 to 64 channels of 56x56, 3x3, B=8, bf16: 6.4 MB, 1.5 µs at
// 4.3 TB/s. At r=1024 these kernels do more: 25.7 million products, each some 35 instructions of a
// lane and 4 bytes from L2. That is 28 million warp instructions, 31 µs at 132 * 4 a cycle and
// 1.7 GHz, and 103 MB, 21 µs at 5 TB/s. For 256 to 256 channels of 14x14: 1.6 million products,
// 2 µs, no longer than the launch and the setup of a block. channels_last at 56x56: 70 instructions
// a product, 63 µs, and if L1 caught nothing some 22 sectors of 32 bytes for 32 products, 560 MB,
// 110 µs. Measured on an H200: 78 µs, channels_last 85 to 92 µs.
//
// What a measurement could ask for: rows of 2 to 8 elements a lane, for the instructions; a plane
// of dy in shared memory for the coordinates of one o, for L2; tiles of rows [position, channel] as
// in sampled_outer for channels_last; outputs of one coordinate over several blocks where B * r is
// below the number of SMs.

#include "cuda/common.cuh"
#include "cuda/sampled_conv.cuh"
#include "cuda/sampled_conv_outputs.cuh"

namespace dropinf {
namespace cuda {
namespace {

constexpr int kThreads = 128;        // of the lanes over positions
constexpr int kParts = 8;            // warps of the lanes over coordinates
constexpr int kFewLoads = 4;         // outputs whose loads are in flight, over positions
constexpr int kManyLoads = 8;        // and over coordinates
constexpr int kMaxCoordinates = 64;  // of a block
constexpr int kRounds = 4;           // of coordinates in a block, at least: they share its setup
constexpr int64_t kBlocks = 528;     // enough: 4 for each of 132 SMs

// The most outputs that 8 and 32 lanes share.
constexpr int64_t kFewOutputs = 64;
constexpr int64_t kSomeOutputs = 1024;

// The products of every kLanes-th output from the j-th on. Offset holds what offsets_fit has asked.
template <typename E, int kLanes, typename Offset>
__device__ float lane_sum(const SampledConvArgs& args, const Coordinate& it, const E* x,
                          const E* dy, int j) {
  if (j >= it.num_outputs) return 0.0f;
  // For the bias dy stands for x, so that every load is of something that is there.
  const Steps dy_steps = steps(args.dy_stride, nullptr);
  const Steps x_steps = it.ones ? dy_steps : steps(args.x_stride, args.stride);
  const int32_t H = it.size[1], W = it.size[2];
  const Offset x_row = x_steps.h - W * x_steps.w, x_plane = x_steps.d - H * x_steps.h;
  const Offset dy_row = dy_steps.h - W * dy_steps.w, dy_plane = dy_steps.d - H * dy_steps.h;
  // kLanes outputs on are step_d planes, step_h rows and step_w outputs on.
  const int32_t step_w = kLanes % W, step_h = kLanes / W % H, step_d = kLanes / W / H;
  const Offset x_step = step_d * x_steps.d + step_h * x_steps.h + step_w * x_steps.w;
  const Offset dy_step = step_d * dy_steps.d + step_h * dy_steps.h + step_w * dy_steps.w;

  int32_t w = j % W, h = j / W % H;
  const int32_t first_d = it.begin[0] + j / W / H, first_h = it.begin[1] + h,
                first_w = it.begin[2] + w;
  x = it.ones ? dy + it.dy : x + it.x;
  x += first_d * x_steps.d + first_h * x_steps.h + first_w * x_steps.w;
  dy += it.dy + first_d * dy_steps.d + first_h * dy_steps.h + first_w * dy_steps.w;
  Offset x_next = 0, dy_next = 0;
  float sum = 0.0f;
  int32_t left = (it.num_outputs - 1 - j) / kLanes + 1;
  for (; left > 0; left -= kFewLoads) {
    // The steps first, and the first output again instead of one too many, so that no branch is
    // between the loads.
    Offset x_at[kFewLoads], dy_at[kFewLoads];
#pragma unroll
    for (int n = 0; n < kFewLoads; ++n) {
      x_at[n] = n < left ? x_next : x_at[0];
      dy_at[n] = n < left ? dy_next : dy_at[0];
      w += step_w;
      h += step_h;
      x_next += x_step;
      dy_next += dy_step;
      if (w >= W) {
        w -= W;
        ++h;
        x_next += x_row;
        dy_next += dy_row;
      }
      if (h >= H) {
        h -= H;
        x_next += x_plane;
        dy_next += dy_plane;
      }
    }
    float u[kFewLoads], v[kFewLoads];
#pragma unroll
    for (int n = 0; n < kFewLoads; ++n) {
      u[n] = widen(x[x_at[n]]);
      v[n] = widen(dy[dy_at[n]]);
    }
#pragma unroll
    for (int n = 0; n < kFewLoads; ++n) {
      if (n < left) sum += (it.ones ? 1.0f : u[n]) * v[n];
    }
  }
  return sum;
}

template <int kParts>
struct Shared {
  Coordinate coordinates[kMaxCoordinates];
  float sums[kMaxCoordinates][kParts];
};

template <typename E, int kLanes, typename Offset>
__global__ void __launch_bounds__(kThreads)
    conv_positions_kernel(const SampledConvArgs args, int per_block, int blocks_per_example) {
  constexpr int kWidth = kLanes < kWarp ? kLanes : kWarp;
  constexpr int kWarpsEach = kLanes / kWidth;  // warps of a coordinate
  auto& shared = *shared_memory<Shared<kWarpsEach>>();
  const int64_t b = blockIdx.x / blocks_per_example;
  const int64_t k0 = static_cast<int64_t>(blockIdx.x % blocks_per_example) * per_block;
  const int count = static_cast<int>(args.r - k0 < per_block ? args.r - k0 : per_block);
  const E* const x = static_cast<const E*>(args.x) + b * args.x_stride_b;
  const E* const dy = static_cast<const E*>(args.dy) + b * args.dy_stride_b;

  const int thread = threadIdx.x;
  if (thread < count) shared.coordinates[thread] = coordinate(args, k0 + thread);
  __syncthreads();

  const int j = thread % kLanes;
  for (int c0 = 0; c0 < count; c0 += kThreads / kLanes) {
    const int c = c0 + thread / kLanes;
    float sum = 0.0f;
    if (c < count) sum = lane_sum<E, kLanes, Offset>(args, shared.coordinates[c], x, dy, j);
    for (int distance = kWidth / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    }
    if (c < count && j % kWidth == 0) shared.sums[c][j / kWidth] = sum;
  }
  // On their own, for the registers.
  for (int c0 = 0; c0 < count; c0 += kThreads / kLanes) {
    const int c = c0 + thread / kLanes;
    float sum = 0.0f;
    if (c < count) sum = padding_sum<E, kLanes>(args, shared.coordinates[c], dy, j);
    for (int distance = kWidth / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    }
    if (c < count && j % kWidth == 0) shared.sums[c][j / kWidth] += sum;
  }
  __syncthreads();

  if (thread < count) {
    float total = 0.0f;
    for (int n = 0; n < kWarpsEach; ++n) total += shared.sums[thread][n];
    args.out[b * args.out_stride_b + (k0 + thread) * args.out_stride_k] =
        shared.coordinates[thread].good ? weighted(args.weights, k0 + thread, total)
                                        : not_a_number();
  }
}

template <typename E>
__global__ void __launch_bounds__(kParts* kWarp)
    conv_channels_kernel(const SampledConvArgs args, int part, int blocks_per_example) {
  auto& shared = *shared_memory<Shared<kParts>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t b = blockIdx.x / blocks_per_example;
  const int64_t k = static_cast<int64_t>(blockIdx.x % blocks_per_example) * kWarp + lane;
  if (warp == 0) shared.coordinates[lane] = k < args.r ? coordinate(args, k) : Coordinate{};
  __syncthreads();

  const Coordinate it = shared.coordinates[lane];
  const E* x = static_cast<const E*>(args.x) + b * args.x_stride_b + it.x;
  const E* dy = static_cast<const E*>(args.dy) + b * args.dy_stride_b + it.dy;
  const Steps x_steps = steps(args.x_stride, args.stride);
  const Steps dy_steps = steps(args.dy_stride, nullptr);
  const int32_t H = static_cast<int32_t>(args.dy_size[1]),
                W = static_cast<int32_t>(args.dy_size[2]);
  const int64_t x_row = x_steps.h - W * x_steps.w, x_plane = x_steps.d - H * x_steps.h;
  const int64_t dy_row = dy_steps.h - W * dy_steps.w, dy_plane = dy_steps.d - H * dy_steps.h;
  const int64_t end = args.dy_size[0] * H * W;
  const int64_t first = int64_t{warp} * part;
  int32_t left = static_cast<int32_t>(end - first < part ? end - first : part);
  float sum = 0.0f;
  if (left > 0) {
    const int32_t p = static_cast<int32_t>(first);
    int32_t w = p % W, h = p / W % H, d = p / W / H;  // the same in every lane
    x += d * x_steps.d + h * x_steps.h + w * x_steps.w;
    dy += d * dy_steps.d + h * dy_steps.h + w * dy_steps.w;
    for (; left > 0; left -= kManyLoads) {
      float u[kManyLoads], v[kManyLoads];
#pragma unroll
      for (int n = 0; n < kManyLoads; ++n) {
        const bool there = n < left && it.good;
        const bool inside = there && within(w, it, 2) && within(h, it, 1) && within(d, it, 0);
        v[n] = there ? widen(*dy) : 0.0f;
        u[n] = it.ones ? 1.0f : inside ? widen(*x) : 0.0f;
        ++w;
        x += x_steps.w;
        dy += dy_steps.w;
        if (w == W) {
          w = 0;
          ++h;
          x += x_row;
          dy += dy_row;
        }
        if (h == H) {
          h = 0;
          ++d;
          x += x_plane;
          dy += dy_plane;
        }
      }
#pragma unroll
      for (int n = 0; n < kManyLoads; ++n) sum += u[n] * v[n];
    }
  }
  shared.sums[lane][warp] = sum;
  __syncthreads();

  if (warp == 0 && k < args.r) {
    float total = 0.0f;
    for (int n = 0; n < kParts; ++n) total += shared.sums[lane][n];
    args.out[b * args.out_stride_b + k * args.out_stride_k] =
        it.good ? weighted(args.weights, k, total) : not_a_number();
  }
}

// Whether channels are neighbours and positions are not. Strides of a dimension of size 1 mean
// nothing, and torch lets them be anything: they do not count.
bool channels_innermost(int64_t channels, int64_t stride_c, const int64_t* size,
                        const int64_t* stride) {
  bool positions = false;
  for (int d = 0; d < 3; ++d) positions |= size[d] > 1 && stride[d] == 1;
  return channels > 1 && stride_c == 1 && !positions;
}

// Whether 32 bits hold the offsets of a coordinate's outputs from its first one, and of the steps
// that are taken beyond the last one. The sums are the same with 64.
bool offsets_fit(const SampledConvArgs& args) {
  int64_t x = 0, dy = 0;
  for (int d = 0; d < 3; ++d) {
    const int64_t outputs = args.dy_size[d] + kThreads * kFewLoads;
    if (args.x_stride[d] > INT32_MAX / args.stride[d] || args.dy_stride[d] > INT32_MAX)
      return false;
    x += outputs * args.x_stride[d] * args.stride[d];
    dy += outputs * args.dy_stride[d];
    if (x > INT32_MAX || dy > INT32_MAX) return false;
  }
  return true;
}

template <typename E, int kLanes, typename Offset>
cudaError_t launch_positions(const SampledConvArgs& args, cudaStream_t stream) {
  constexpr int kSlots = kThreads / kLanes;
  const int64_t wanted = ceil_div(ceil_div(args.B * args.r, kBlocks), int64_t{kSlots}) * kSlots;
  int64_t per_block = wanted < kRounds * kSlots ? kRounds * kSlots : wanted;
  if (per_block > kMaxCoordinates) per_block = kMaxCoordinates;
  const int64_t blocks = ceil_div(args.r, per_block);
  if (args.B > INT32_MAX / blocks) return cudaErrorInvalidValue;
  return launch(conv_positions_kernel<E, kLanes, Offset>,
                dim3(static_cast<unsigned>(args.B * blocks)), kThreads,
                sizeof(Shared<ceil_div(kLanes, kWarp)>), stream, args, static_cast<int>(per_block),
                static_cast<int>(blocks));
}

template <typename E, int kLanes>
cudaError_t run_positions(const SampledConvArgs& args, cudaStream_t stream) {
  return offsets_fit(args) ? launch_positions<E, kLanes, int32_t>(args, stream)
                           : launch_positions<E, kLanes, int64_t>(args, stream);
}

template <typename E>
cudaError_t run(const SampledConvArgs& args, int64_t num_outputs, cudaStream_t stream) {
  if (channels_innermost(args.C, args.x_stride_c, args.x_size, args.x_stride) &&
      channels_innermost(args.O, args.dy_stride_c, args.dy_size, args.dy_stride)) {
    const int64_t blocks = ceil_div<int64_t>(args.r, kWarp);
    if (args.B > INT32_MAX / blocks) return cudaErrorInvalidValue;
    return launch(conv_channels_kernel<E>, dim3(static_cast<unsigned>(args.B * blocks)),
                  kParts * kWarp, sizeof(Shared<kParts>), stream, args,
                  static_cast<int>(ceil_div<int64_t>(num_outputs, kParts)),
                  static_cast<int>(blocks));
  }
  if (num_outputs <= kFewOutputs) return run_positions<E, 8>(args, stream);
  if (num_outputs <= kSomeOutputs) return run_positions<E, 32>(args, stream);
  return run_positions<E, kThreads>(args, stream);
}

}  // namespace

cudaError_t sampled_conv(const SampledConvArgs& args, cudaStream_t stream) {
  if (args.B == 0 || args.r == 0) return cudaSuccess;
  // Within an example the kernels count with 32 bits; offsets have 64.
  int64_t num_outputs = 1;
  bool counts = args.C <= INT32_MAX && args.O <= INT32_MAX;
  for (int d = 0; d < 3; ++d) {
    counts = counts && args.x_size[d] <= INT32_MAX && args.dy_size[d] <= INT32_MAX &&
             num_outputs * args.dy_size[d] <= INT32_MAX;
    num_outputs *= args.dy_size[d];
  }
  if (!counts) return cudaErrorInvalidValue;
  switch (args.dtype) {
    case DType::kBFloat16:
      return run<BFloat16>(args, num_outputs, stream);
    case DType::kFloat16:
      return run<Float16>(args, num_outputs, stream);
    default:
      return run<float>(args, num_outputs, stream);
  }
}

}  // namespace cuda
}  // namespace dropinf
