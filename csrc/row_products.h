// row_products as kernels see it: raw pointers, sizes and strides in elements, no torch.

#pragma once

#include <cstdint>

#include "elements.h"

namespace dropinf {

// The arguments of row_products:
// out[q, i] = Σ_l scales[i, l] * (queries[q, layer l] · rows[i, layer l]).
struct RowProductsArgs {
  DType dtype;           // of the rows
  const float* queries;  // [m, R], stride 1 in R
  int64_t m, R, queries_stride;
  const void* rows;  // [c, R], stride 1 in R
  int64_t c, rows_stride;
  const float* scales;  // [c, L], or null: one layer, all of whose scales are 1
  int64_t scales_stride, L;
  const int64_t* offsets;  // [L + 1]
  float* out;              // [m, c], stride 1 in c
  int64_t out_stride;
};

// Rows that are multiplied side by side: items of rows begin at a multiple of it.
constexpr int64_t kRowGroup = 4;

// Products of all queries with rows [begin, end). The bits depend on query and row alone.
void row_products_rows(const RowProductsArgs& args, int64_t begin, int64_t end);

// Columns [first, last) of rows [begin, end), scaled, as float32 [end - begin, last - first].
void decode_rows(const RowProductsArgs& args, int64_t begin, int64_t end, int64_t first,
                 int64_t last, float* to);

}  // namespace dropinf
