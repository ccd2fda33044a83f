// Every launcher: raw pointers, sizes and strides, no torch. Strides are in elements.
//
// The CPU functions run on the calling thread over a range of the work; bindings.cpp shares the
// ranges out over threads.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace dropinf {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// "avx2" where the processor has AVX2, FMA and F16C, else "portable".
std::string cpu_capability();
// For tests. False if this processor or build does not have it.
bool set_cpu_capability(const std::string& name);

// The arguments of sampled_outer:
//   out[b, k] = scale * sum_j sign[k, j] * sum_t dy[b, t, o_idx[k, j]] * x[b, t, i_idx[k, j]]
// A sign of 0 leaves its coordinate out, also where that is not finite.
struct SampledOuterArgs {
  DType dtype;     // of x and dy
  const void* x;   // [B, T, I], stride 1 in I
  const void* dy;  // [B, T, O], stride 1 in O
  int64_t B, T, I, O;
  int64_t x_stride_b, x_stride_t;
  int64_t dy_stride_b, dy_stride_t;
  const int32_t* o_idx;  // [r, s]
  const int32_t* i_idx;  // [r, s]
  const int8_t* sign;    // [r, s], or null for +1
  int64_t r, s;
  bool bias;  // i_idx may be I: a column of ones
  float scale;
  float* out;  // [B, r]
  int64_t out_stride_b, out_stride_k;
};

// Whether all n indices are in [0, size).
bool indices_in_range(const int32_t* idx, int64_t n, int64_t size);
// Whether all n signs are -1, 0 or 1.
bool signs_in_range(const int8_t* sign, int64_t n);

// One call of sampled_outer, prepared once and then shared by the threads. The positions are cut
// into chunks that depend on T alone. A chunk is summed on its own, and the chunks are added in
// order, whoever computes them: the bits of a row depend neither on the threads nor on B.
class SampledOuter {
 public:
  static std::unique_ptr<const SampledOuter> make(const SampledOuterArgs& args);
  virtual ~SampledOuter() = default;

  int64_t num_chunks;  // of one example
  int64_t sums_size;   // floats that hold the sums of one chunk
  double chunk_ns;     // rough time of one chunk

  // out[b_begin:b_end].
  virtual void rows(int64_t b_begin, int64_t b_end) const = 0;
  // The sums of chunks [c_begin, c_end), counted over the batch: chunk c % num_chunks of example
  // c / num_chunks.
  virtual void chunks(int64_t c_begin, int64_t c_end, float* sums) const = 0;
  // out[b, k_begin:k_end] from the sums of example b's chunks; overwrites sums.
  virtual void finish(int64_t b, int64_t k_begin, int64_t k_end, float* sums) const = 0;
};

// The arguments of sampled_embedding:
//   out[b, k] = scale * sum over t with ids[b, t] == i_idx[k] of dy[b, t, o_idx[k]]
struct SampledEmbeddingArgs {
  const int64_t* ids;  // [B, T], contiguous
  DType dtype;         // of dy
  const void* dy;      // [B, T, O], stride 1 in O
  int64_t B, T, O;
  int64_t dy_stride_b, dy_stride_t;
  const int32_t* o_idx;  // [r]
  const int32_t* i_idx;  // [r], rising
  int64_t r;
  float scale;
  float* out;  // [B, r]
  int64_t out_stride_b, out_stride_k;
};

// out[b_begin:b_end].
void sampled_embedding_rows(const SampledEmbeddingArgs& args, int64_t b_begin, int64_t b_end);

// The arguments of sampled_conv. Three spatial dimensions; those that are missing are leading ones.
// With (c_k, q_k) = unravel(i_idx[k]) in (C / groups, kernel_size) and g the group of o_idx[k]:
//   out[b, k] = scale * sum_p dy[b, o_idx[k], p]
//                           * x[b, g * C / groups + c_k, p * stride + q_k * dilation - padding]
// where x counts as zeros outside its sizes.
struct SampledConvArgs {
  DType dtype;     // of x and dy
  const void* x;   // [B, C, *x_size]
  const void* dy;  // [B, O, *dy_size]
  int64_t B, C, O, groups;
  int64_t I;  // C / groups * prod(kernel_size)
  int64_t x_size[3], dy_size[3];
  int64_t x_stride_b, x_stride_c, x_stride[3];
  int64_t dy_stride_b, dy_stride_c, dy_stride[3];
  int64_t kernel_size[3], stride[3], padding[3], dilation[3];
  const int32_t* o_idx;  // [r]
  const int32_t* i_idx;  // [r]
  int64_t r;
  bool bias;  // i_idx may be C / groups * prod(kernel_size): an input of ones
  float scale;
  float* out;  // [B, r]
  int64_t out_stride_b, out_stride_k;
};

// One call of sampled_conv, prepared once and then shared by the threads. Each coordinate is summed
// on its own in an order that depends on the layer alone.
class SampledConv {
 public:
  static std::unique_ptr<const SampledConv> make(const SampledConvArgs& args);
  virtual ~SampledConv() = default;

  double entry_ns;  // rough time of one entry

  // out[b, k_begin:k_end].
  virtual void entries(int64_t b, int64_t k_begin, int64_t k_end) const = 0;
};

// One gradient of gather_grads, and the entries wanted of it.
struct GradEntries {
  const void* data;  // null counts as zeros
  DType dtype;
  int64_t numel;
  // Sizes and strides, outermost first; num_dims = 0 if the data are contiguous.
  int64_t num_dims;
  const int64_t* sizes;
  const int64_t* strides;
  const int64_t* idx;   // [r, s] positions in the flattened gradient
  const int8_t* signs;  // [r, s], 0 leaves a position out; or null for [r, 1] of +1
  int64_t r, s;         // s > 0
  float scale;
  float* out;  // [r]
  int64_t out_stride;
};

// out[k] = scale * sum_j signs[k, j] * gradient.flatten()[idx[k, j]] for k in [k_begin, k_end),
// summed in the order of j. False, with every entry still written, if an index is out of range.
bool gather_entries(const GradEntries& entries, int64_t k_begin, int64_t k_end);

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
