// gather_grads on the CPU: bound by cache and TLB misses of single elements, which the processor
// overlaps on its own as long as the loop has no branch that depends on the data.

#include "gather_grads.h"

#include "elements.h"

namespace dropinf {
namespace {

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

template <bool kWeighted, typename E>
bool gather(const GradEntries& entries, int64_t k_begin, int64_t k_end) {
  const E* data = static_cast<const E*>(entries.data);
  bool in_range = true;
  for (int64_t k = k_begin; k < k_end; ++k) {
    const bool good = static_cast<uint64_t>(entries.idx[k]) < static_cast<uint64_t>(entries.numel);
    in_range &= good;
    const int64_t position = good ? entries.idx[k] : 0;
    const float value = to_float(data[offset_of(entries, position)]);
    entries.out[k * entries.out_stride] = kWeighted ? weighted(entries.weights[k], value) : value;
  }
  return in_range;
}

template <typename E>
bool gather_sums(const GradEntries& entries, int64_t k_begin, int64_t k_end) {
  const E* data = static_cast<const E*>(entries.data);
  bool in_range = true;
  for (int64_t k = k_begin; k < k_end; ++k) {
    float sum = 0.0f;
    for (int64_t q = k * entries.s; q < (k + 1) * entries.s; ++q) {
      const int64_t position = entries.idx[q];
      const bool good = static_cast<uint64_t>(position) < static_cast<uint64_t>(entries.numel);
      in_range &= good;
      const float value = to_float(data[offset_of(entries, good ? position : 0)]);
      sum += entries.weights ? weighted(entries.weights[q], value) : value;
    }
    entries.out[k * entries.out_stride] = sum;
  }
  return in_range;
}

template <typename E>
bool gather_any(const GradEntries& entries, int64_t k_begin, int64_t k_end) {
  if (entries.s != 1) return gather_sums<E>(entries, k_begin, k_end);
  return entries.weights ? gather<true, E>(entries, k_begin, k_end)
                         : gather<false, E>(entries, k_begin, k_end);
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
