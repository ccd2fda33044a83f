// damped_cholesky and cholesky_solve as kernels see them: raw pointers, sizes and strides in
// elements, no torch.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace dropinf {

// share(count, f) calls f(begin, end) for parts that make up [0, count), on several threads.
using Share = std::function<void(int64_t, const std::function<void(int64_t, int64_t)>&)>;

// The arguments of damped_cholesky and cholesky_solve. Layer l is r_l wide, the difference of its
// offsets; its matrix is row-major [r_l, r_l], one behind the other.
struct CholeskyArgs {
  int64_t L;
  const int64_t* offsets;  // [L + 1]
  const float* matrices;   // to factorise; or factors, if `factors` is null
  float* factors;          // may be `matrices`
  const float* shift;      // [L], added to the diagonals
  int32_t* info;           // [L]: 0, or the first pivot from 1 that is not positive
  const float* rows;       // [m, R] right-hand sides, or null; stride 1 in R
  float* solved;           // [m, R], may be `rows`
  int64_t m, rows_stride, solved_stride;
};

// One call of damped_cholesky or cholesky_solve, cut into items once and then shared by the
// threads. The bits of a layer depend on nothing but that layer.
class CholeskyCall {
 public:
  explicit CholeskyCall(const CholeskyArgs& args);

  int64_t num_items() const { return static_cast<int64_t>(items_.size()); }  // the longest first
  double total_ns = 0;                                                       // rough times
  double item_ns(int64_t k) const { return items_[k].ns; }

  // `share`: how threads share the work of this item, or null for the calling thread alone.
  void item(int64_t k, const Share* share) const;

 private:
  struct Item {
    int64_t first, count;  // layers, in order_
    bool together;
    double ns;
  };

  CholeskyArgs args_;
  std::vector<int64_t> starts_;  // [L], of the matrices
  std::vector<int64_t> order_;   // layers, the widest first
  std::vector<Item> items_;
};

}  // namespace dropinf
