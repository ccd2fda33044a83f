// gather_grads on the CPU: bound by cache and TLB misses of single elements, which the processor
// overlaps on its own as long as the loop has no branch that depends on the data.

#include "gather_grads.h"

#include <algorithm>

#include "elements.h"

namespace dropinf {
namespace {

constexpr int64_t kBlock = 256;  // summands that are read before any is added

// Offset of a flat row-major position.
int64_t offset_of(const GradEntries& entries, int64_t position) {
  if (entries.num_dims == 0) return position;
  int64_t offset = 0;
  for (int64_t d = entries.num_dims - 1; d > 0; --d) {
    offset += position % entries.sizes[d] * entries.strides[d];
    position /= entries.sizes[d];
  }
  return offset + position * entries.strides[0];
}

template <typename E>
bool gather(const GradEntries& entries, int64_t k_begin, int64_t k_end) {
  const E* data = static_cast<const E*>(entries.data);
  bool in_range = true;
  // Short, with nothing in it of what is the same for all: then more misses are under way at once.
  const auto loop = [&](const auto& offset) {
    const int64_t* idx = entries.idx;
    const uint64_t numel = entries.numel;
    const int64_t stride = entries.out_stride;
    float* out = entries.out + k_begin * stride;
    for (int64_t k = k_begin; k < k_end; ++k, out += stride) {
      const bool good = static_cast<uint64_t>(idx[k]) < numel;
      in_range &= good;
      *out = to_float(data[offset(good ? idx[k] : 0)]);
    }
  };
  if (entries.num_dims == 0) {
    loop([](int64_t position) { return position; });
  } else {
    loop([&](int64_t position) { return offset_of(entries, position); });
  }
  // Apart, which keeps that loop short.
  float* out = entries.out + k_begin * entries.out_stride;
  if (entries.weights) weigh(entries.weights + k_begin, k_end - k_begin, out, entries.out_stride);
  return in_range;
}

template <typename E>
bool gather_sums(const GradEntries& entries, int64_t k_begin, int64_t k_end) {
  const E* data = static_cast<const E*>(entries.data);
  const int64_t s = entries.s, end = k_end * s;
  bool in_range = true;
  float values[kBlock];
  float* out = entries.out + k_begin * entries.out_stride;
  float sum = 0.0f;
  int64_t left = s;  // of the entry that is summed
  for (int64_t begin = k_begin * s; begin < end; begin += kBlock) {
    const int64_t count = std::min(kBlock, end - begin);
    const int64_t* idx = entries.idx + begin;
    for (int64_t n = 0; n < count; ++n) {
      const bool good = static_cast<uint64_t>(idx[n]) < static_cast<uint64_t>(entries.numel);
      in_range &= good;
      values[n] = to_float(data[offset_of(entries, good ? idx[n] : 0)]);
    }
    for (int64_t n = 0; n < count; ++n) {
      const float weight = entries.weights ? entries.weights[begin + n] : 1.0f;
      if (weight != 0.0f) sum += weight * values[n];
      if (--left > 0) continue;
      *out = sum;
      out += entries.out_stride;
      sum = 0.0f;
      left = s;
    }
  }
  return in_range;
}

template <typename E>
bool gather_any(const GradEntries& entries, int64_t k_begin, int64_t k_end) {
  return entries.s == 1 ? gather<E>(entries, k_begin, k_end)
                        : gather_sums<E>(entries, k_begin, k_end);
}

}  // namespace

bool gather_entries(const GradEntries& entries, int64_t k_begin, int64_t k_end) {
  if (!entries.data || entries.numel == 0) {
    for (int64_t k = k_begin; k < k_end; ++k) entries.out[k * entries.out_stride] = 0.0f;
    return !entries.data || k_begin == k_end;
  }
  switch (entries.dtype) {
    case DType::kBFloat16:
      return gather_any<BFloat16>(entries, k_begin, k_end);
    case DType::kFloat16:
      return gather_any<Float16>(entries, k_begin, k_end);
    default:
      return gather_any<float>(entries, k_begin, k_end);
  }
}

}  // namespace dropinf
