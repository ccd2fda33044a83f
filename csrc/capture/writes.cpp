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

// The coordinates of a norm's sums are numbers of them, o = i.
void norm(const Tensor& x, const Tensor& dy, bool rms, double eps, const EntryRun& run,
          const Tensor& out) {
  static const auto op =
      op_named<void(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, bool, double,
                    const Tensor&)>("dropinf::sampled_norm");
  op.call(x, dy, run.o_idx, run.weights, rms, eps, out);
}

void embedding(const Tensor& ids, const Tensor& dy, const EntryRun& run, const Tensor& out) {
  static const auto op =
      op_named<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                    const Tensor&)>("dropinf::sampled_embedding");
  op.call(ids, dy, run.o_idx, run.i_idx, run.weights, out);
}

void conv(const Tensor& x, const Tensor& dy, const std::vector<std::vector<int64_t>>& window,
          int64_t groups, const EntryRun& run, const Tensor& out) {
  static const auto op =
      op_named<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::IntArrayRef,
                    at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t, bool,
                    const MaybeTensor&, const Tensor&)>("dropinf::sampled_conv");
  op.call(x, dy, run.o_idx, run.i_idx, window[0], window[1], window[2], window[3], groups, true,
          run.weights, out);
}

// [B, 2 C] sums of x * dy, x normalised by the statistics, in every channel, then of dy.
Tensor channel_sums(Tensor x, Tensor dy, const Writes& writes) {
  x = x.dim() > 2 ? wide(x).flatten(2) : wide(x).unsqueeze(2);
  dy = dy.dim() > 2 ? wide(dy).flatten(2) : wide(dy).unsqueeze(2);
  const int64_t C = x.size(1);
  const Tensor every = at::arange(2 * C, x.options().dtype(at::kInt));
  const Tensor sums = at::empty({x.size(0), 2 * C}, x.options());
  conv(x, dy, {{1}, {1}, {0}, {1}}, C,
       {every.div(2, "floor"), every.remainder(2), std::nullopt, {}, 0, 2 * C}, sums);
  const Tensor total = sums.slice(1, 1, std::nullopt, 2);
  const Tensor product =
      (sums.slice(1, 0, std::nullopt, 2) - writes.mean->to(total.options()) * total) *
      (writes.var->to(total.options()) + *writes.eps).rsqrt();
  return at::cat({product, total}, 1);
}

}  // namespace

void Writes::write(Tensor x, Tensor dy, const Tensor& rows) const {
  if (native == Native::kBatchNorm) {
    const Tensor sums = channel_sums(x, dy, *this);
    const int64_t C = sums.size(1) / 2;
    for (const EntryRun& run : runs) {
      Tensor entries = sums.index_select(1, run.o_idx + C * run.i_idx);
      if (run.weights) entries.mul_(*run.weights);
      rows.narrow(1, run.column, run.r).copy_(entries);
    }
    return;
  }
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
    case Native::kSampledNorm: {
      const auto dtype = at::promote_types(x.scalar_type(), dy.scalar_type());
      x = x.to(dtype);
      dy = dy.to(dtype);
      break;
    }
    case Native::kEmbedding:
      x = x.select(2, 0);
      if (padding_id >= 0) x = x.masked_fill(x == padding_id, -1);
      x = x.to(at::kLong).contiguous();
      break;
    case Native::kBatchNorm:
      break;
  }
  if (native != Native::kConv) dy = unit_stride(dy);
  if (native != Native::kConv && native != Native::kEmbedding) x = unit_stride(x);
  for (const EntryRun& run : runs) {
    const Tensor out = rows.narrow(1, run.column, run.r);
    if (native == Native::kConv) {
      conv(x, dy, window, groups, run, out);
    } else if (native == Native::kEmbedding) {
      embedding(x, dy, run, out);
    } else if (native == Native::kSampledNorm) {
      norm(x, dy, rms, *eps, run, out);
    } else {
      outer(x, dy, run, out);
    }
  }
}

}  // namespace dropinf
