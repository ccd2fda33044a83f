// Which outputs a coordinate of sampled_conv meets, and the products of those that it does not.

#pragma once

#include "cuda/common.cuh"
#include "sampled_conv.h"

namespace dropinf {
namespace cuda {

// A coordinate. Offsets are into an example; its outputs are those that meet no padding.
struct Coordinate {
  int64_t x, dy;  // of what output (0, 0, 0) reads, or would read in the padding
  int32_t begin[3], size[3];
  int32_t num_outputs;
  bool ones;  // the bias: x is ones
  bool good;  // the indices are in range
};

__device__ inline Coordinate coordinate(const SampledConvArgs& args, int64_t k) {
  const int32_t o = args.o_idx[k], i = args.i_idx[k];
  const int32_t I = static_cast<int32_t>(args.I);
  Coordinate it{};
  it.good = o >= 0 && o < args.O && i >= 0 && i < I + (args.bias ? 1 : 0);
  if (!it.good) return it;
  it.ones = i == I;
  it.dy = o * args.dy_stride_c;
  it.num_outputs = 1;
  int32_t rest = i;
  for (int d = 2; d >= 0; --d) {
    const int32_t kernel = static_cast<int32_t>(args.kernel_size[d]);
    const uint32_t stride = static_cast<uint32_t>(args.stride[d]);
    int64_t begin = 0, end = args.dy_size[d];
    if (!it.ones) {
      const int64_t offset = rest % kernel * args.dilation[d] - args.padding[d];
      const int64_t last = args.x_size[d] - 1 - offset;  // below 2^32
      if (offset < 0) begin = static_cast<uint32_t>(-offset - 1) / stride + 1;
      const int64_t reached = last < 0 ? 0 : int64_t{static_cast<uint32_t>(last) / stride} + 1;
      end = reached < end ? reached : end;
      it.x += offset * args.x_stride[d];
      rest /= kernel;
    }
    it.begin[d] = static_cast<int32_t>(begin < end ? begin : 0);
    it.size[d] = static_cast<int32_t>(begin < end ? end - begin : 0);
    it.num_outputs *= it.size[d];
  }
  if (!it.ones) {
    const int32_t groups = static_cast<int32_t>(args.groups);
    const int32_t group = o / (static_cast<int32_t>(args.O) / groups);
    const int32_t channel = group * (static_cast<int32_t>(args.C) / groups) + rest;
    it.x += channel * args.x_stride_c;
  }
  return it;
}

// From output to output, in elements.
struct Steps {
  int64_t d, h, w;
};

__device__ inline Steps steps(const int64_t* tensor_stride, const int64_t* stride) {
  if (!stride) return {tensor_stride[0], tensor_stride[1], tensor_stride[2]};
  return {tensor_stride[0] * stride[0], tensor_stride[1] * stride[1], tensor_stride[2] * stride[2]};
}

__device__ inline bool within(int32_t p, const Coordinate& it, int d) {
  return static_cast<uint32_t>(p - it.begin[d]) < static_cast<uint32_t>(it.size[d]);
}

struct Slab {
  int32_t begin, size;
};

// Of one dimension of a slab: what is met of those before `d`, what is before or behind that in `d`
// itself, and all of those after it.
__device__ inline Slab slab_of(const SampledConvArgs& args, const Coordinate& it, int dimension,
                               int d, bool behind) {
  const int32_t all = static_cast<int32_t>(args.dy_size[dimension]);
  const int32_t begin = it.begin[dimension], end = begin + it.size[dimension];
  if (dimension < d) return {begin, end - begin};
  if (dimension > d) return {0, all};
  return behind ? Slab{end, all - end} : Slab{0, begin};
}

// The products of outputs that meet padding, where x is 0: 0, or NaN where dy is not finite. They
// are six slabs, two for each dimension.
template <typename E, int kLanes>
__device__ float padding_sum(const SampledConvArgs& args, const Coordinate& it, const E* dy,
                             int j) {
  float sum = 0.0f;
  const int64_t num_outputs = args.dy_size[0] * args.dy_size[1] * args.dy_size[2];
  if (it.num_outputs == num_outputs || !it.good) return sum;
#pragma unroll 1
  for (int n = 0; n < 6; ++n) {
    const Slab planes = slab_of(args, it, 0, n / 2, n % 2),
               rows = slab_of(args, it, 1, n / 2, n % 2), row = slab_of(args, it, 2, n / 2, n % 2);
    const int32_t count = planes.size * rows.size * row.size;
#pragma unroll 1
    for (int32_t p = j; p < count; p += kLanes) {
      const int64_t at = it.dy + (planes.begin + p / row.size / rows.size) * args.dy_stride[0] +
                         (rows.begin + p / row.size % rows.size) * args.dy_stride[1] +
                         (row.begin + p % row.size) * args.dy_stride[2];
      sum += 0.0f * widen(dy[at]);
    }
  }
  return sum;
}

}  // namespace cuda
}  // namespace dropinf
