// gram as kernels see it: raw pointers, sizes and strides in elements, no torch.

#pragma once

#include <cstdint>
#include <vector>

namespace dropinf {

// The arguments of gram: out's matrix l (+)= scale * rows_lᵀ rows_l, lower triangles.
struct GramArgs {
  const float* rows;  // [n, R], stride 1 in R
  int64_t n, rows_stride;
  int64_t L;
  const int64_t* offsets;  // [L + 1]
  float scale;
  bool accumulate;
  float* out;  // [Σ r_l²]; above the diagonals zeros, or untouched if accumulating
};

// One call of gram, cut into items that the threads share.
class GramCall {
 public:
  explicit GramCall(const GramArgs& args);

  int64_t num_items() const { return static_cast<int64_t>(items_.size()); }  // the longest first
  double total_ns = 0;                                                       // rough time

  void item(int64_t k) const;

 private:
  struct Item {
    int64_t offset, r, begin, end;
    float* out;
    double ns;
  };

  GramArgs args_;
  std::vector<Item> items_;
};

}  // namespace dropinf
