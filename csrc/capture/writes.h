// Writes: how one site's gradient becomes entries of rows, by the ops, without Python.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace dropinf {

// Coordinates whose entries one op computes, and the columns of a row where they stand.
struct EntryRun {
  at::Tensor o_idx, i_idx;
  std::optional<at::Tensor> weights;
  std::vector<at::Tensor> order;  // of a staged kernel, or none
  int64_t column, r;
};

// What a function does to its input before the op takes it.
enum class Native { kOuter, kLayerNorm, kRmsNorm, kSampledNorm, kEmbedding, kConv, kBatchNorm };

// Dimension 0 of x and dy, or of both unflattened, must be the B examples in order.
struct Writes {
  Native native;
  at::ScalarType dtype;                      // of dy
  at::Device device;                         // of dy
  int64_t x_features, dy_features;           // trailing dimensions that are no positions
  int64_t width;                             // of a norm
  std::optional<double> eps;                 // of a norm
  bool rms;                                  // of a norm that one op normalises and sums
  int64_t padding_id;                        // of an embedding, -1 for none
  std::vector<std::vector<int64_t>> window;  // of a convolution: kernel, stride, padding, dilation
  int64_t groups;                            // of a convolution
  std::optional<at::Tensor> mean, var;       // of a batch norm
  std::vector<EntryRun> runs;

  bool takes(const at::Tensor& dy, const at::Tensor& rows) const {
    return dy.scalar_type() == dtype && dy.device() == device && dy.numel() > 0 &&
           rows.scalar_type() == at::kFloat && rows.device() == device;
  }

  // Overwrites the columns of `rows` [B, R], float32.
  void write(at::Tensor x, at::Tensor dy, const at::Tensor& rows) const;
};

}  // namespace dropinf
