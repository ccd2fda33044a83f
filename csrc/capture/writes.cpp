// Writes: the same ATen functions and ops in the same order as dropinf/capturing/runs.py, so that
// rows are equal bit by bit.

#include "writes.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace dropinf {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <typename Signature>
auto op_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor wide(const Tensor& x) { return x.to(at::promote_types(x.scalar_type(), at::kFloat)); }

// [B, T, features] of [B, ..., features] or [B * T, features].
Tensor by_example(const Tensor& x, int64_t B, int64_t features) {
  int64_t width = 1;
  for (int64_t d = x.dim() - features; d < x.dim(); ++d) width *= x.size(d);
  return x.reshape({B, -1, width});
}

Tensor unit_stride(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous();
}

void outer(const Tensor& x, const Tensor& dy, const EntryRun& run, const Tensor& out) {
  static const auto op =
      op_named<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                    bool, at::TensorList, const Tensor&)>("dropinf::sampled_outer");
  op.call(x, dy, run.o_idx, run.i_idx, run.weights, true, run.order, out);
}

void embedding(const Tensor& ids, const Tensor& dy, const EntryRun& run, const Tensor& out) {
  static const auto op =
      op_named<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                    const Tensor&)>("dropinf::sampled_embedding");
  op.call(ids, dy, run.o_idx, run.i_idx, run.weights, out);
}

void conv(const Tensor& x, const Tensor& dy, const Writes& writes, const EntryRun& run,
          const Tensor& out) {
  static const auto op =
      op_named<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::IntArrayRef,
                    at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t, bool,
                    const MaybeTensor&, const Tensor&)>("dropinf::sampled_conv");
  const auto& window = writes.window;
  op.call(x, dy, run.o_idx, run.i_idx, window[0], window[1], window[2], window[3], writes.groups,
          true, run.weights, out);
}

}  // namespace

void Writes::write(Tensor x, Tensor dy, const Tensor& rows) const {
  if (native != Native::kConv) {
    x = by_example(x, rows.size(0), x_features);
    dy = by_example(dy, rows.size(0), dy_features);
  }
  switch (native) {
    case Native::kOuter:
    case Native::kConv:
      x = x.to(dy.scalar_type());  // autocast hands the function a wider x than it multiplies
      break;
    case Native::kLayerNorm:
      x = at::layer_norm(wide(x), {width}, {}, {}, *eps);
      dy = wide(dy);
      break;
    case Native::kRmsNorm:
      x = at::rms_norm(wide(x), {width}, {}, eps);
      dy = wide(dy);
      break;
    case Native::kEmbedding:
      x = x.select(2, 0);
      if (padding_id >= 0) x = x.masked_fill(x == padding_id, -1);
      x = x.to(at::kLong).contiguous();
      break;
  }
  if (native != Native::kConv) dy = unit_stride(dy);
  if (native != Native::kConv && native != Native::kEmbedding) x = unit_stride(x);
  for (const EntryRun& run : runs) {
    const Tensor out = rows.narrow(1, run.column, run.r);
    if (native == Native::kConv) {
      conv(x, dy, *this, run, out);
    } else if (native == Native::kEmbedding) {
      embedding(x, dy, run, out);
    } else {
      outer(x, dy, run, out);
    }
  }
}

}  // namespace dropinf
