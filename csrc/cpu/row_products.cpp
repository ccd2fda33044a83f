// row_products on the CPU: one read of the rows for a few queries, and rows as float32 for many.

#include "row_products.h"

#include <algorithm>

#include "cpu/lanes.h"

namespace dropinf {
namespace {

// Columns of a segment, which stay in the nearest cache for all queries of a group.
constexpr int64_t kSegment = 1024;
// Queries whose sums are kept at a time.
constexpr int64_t kQueryGroup = 24;

// Rows this far behind are fetched while a group is multiplied, unless they are wide: rows of one
// page together are too many streams for the processor to foresee. Of int8 rows of 1,024 that is
// half of the time (2-core Xeon with AVX2, 2026-11).
constexpr int64_t kRowsAhead = 2 * kRowGroup;
constexpr int64_t kBytesAhead = 1 << 18;

}  // namespace

#define KERNELS "cpu/row_products_kernels.h"
#include "cpu/each_capability.h"

namespace {

template <typename F>
void by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kInt8:
      return f(int8_t{});
    default:
      return f(float{});
  }
}

}  // namespace

void row_products_rows(const RowProductsArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t i = begin; i < end; i += kRowGroup) {
      for (int64_t q = 0; q < args.m; q += kQueryGroup) {
        CAPABLE(group_products<E>)(args, i, end, q, std::min(q + kQueryGroup, args.m));
      }
    }
  });
}

void decode_rows(const RowProductsArgs& args, int64_t begin, int64_t end, int64_t first,
                 int64_t last, float* to) {
  by_dtype(args.dtype, [&](auto element) {
    CAPABLE(decode<decltype(element)>)(args, begin, end, first, last, to);
  });
}

}  // namespace dropinf
