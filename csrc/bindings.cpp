// The one file that includes torch: registers the ops, shares their work out over threads, and
// makes the module dropinf._C with build information.
//
// dropinf/ops.py checks for people; here only what would read or write out of bounds is repeated.

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "bank_order.h"
#include "launchers.h"

namespace dropinf {
namespace {

// A thread must have this much to do to be worth waking: 2-core AMD EPYC Zen 4, 2026-11.
constexpr double kThreadNs = 10e3;

// Examples whose chunks are summed apart at a time: a few work items for each thread, which bounds
// the memory of the sums.
constexpr int64_t kItemsPerThread = 2;

// Rough times of one token's search and of one entry: they only decide when a thread pays.
constexpr double kSearchNs = 20;
constexpr double kZeroNs = 0.5;

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "dropinf: need float32, bfloat16 or float16, got ",
                       tensor.scalar_type());
  }
}

int64_t grain(double item_ns) {
  return std::max<int64_t>(1, static_cast<int64_t>(kThreadNs / std::max(item_ns, 1e-3)));
}

void run(const SampledOuter& call, const SampledOuterArgs& args) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t num_chunks = call.num_chunks;
  if (threads == 1 || num_chunks == 1 || args.B >= 4 * threads) {
    at::parallel_for(0, args.B, grain(num_chunks * call.chunk_ns),
                     [&](int64_t begin, int64_t end) { call.rows(begin, end); });
    return;
  }
  const int64_t group = std::min(args.B, (kItemsPerThread * threads + num_chunks - 1) / num_chunks);
  const int64_t example_size = num_chunks * call.sums_size;
  const std::unique_ptr<float[]> sums(new float[group * example_size]);
  for (int64_t first = 0; first < args.B; first += group) {
    const int64_t last = std::min(first + group, args.B);
    at::parallel_for(first * num_chunks, last * num_chunks, grain(call.chunk_ns),
                     [&](int64_t begin, int64_t end) {
                       call.chunks(begin, end,
                                   sums.get() + (begin - first * num_chunks) * call.sums_size);
                     });
    for (int64_t b = first; b < last; ++b) {
      at::parallel_for(0, args.r, grain(0.1 * num_chunks * args.s),
                       [&](int64_t begin, int64_t end) {
                         call.finish(b, begin, end, sums.get() + (b - first) * example_size);
                       });
    }
  }
}

void sampled_outer(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& o_idx,
                   const at::Tensor& i_idx, const std::optional<at::Tensor>& sign, bool bias,
                   double scale, const at::Tensor& out) {
  TORCH_CHECK_VALUE(x.dim() == 3 && dy.dim() == 3 && x.size(0) == dy.size(0) &&
                        x.size(1) == dy.size(1) && x.scalar_type() == dy.scalar_type(),
                    "sampled_outer: x must be [B, T, I] and dy [B, T, O] of one dtype, got ",
                    x.scalar_type(), " ", x.sizes(), " and ", dy.scalar_type(), " ", dy.sizes());
  for (const auto& tensor : {x, dy}) {
    TORCH_CHECK_VALUE(tensor.stride(2) == 1 || tensor.size(2) <= 1,
                      "sampled_outer: x and dy must have stride 1 in the last dimension, got ",
                      tensor.strides());
  }
  TORCH_CHECK_VALUE(o_idx.scalar_type() == at::kInt && i_idx.scalar_type() == at::kInt &&
                        o_idx.is_contiguous() && i_idx.is_contiguous() &&
                        o_idx.sizes() == i_idx.sizes() && o_idx.dim() == (sign ? 2 : 1),
                    "sampled_outer: o_idx and i_idx must be contiguous int32, [r] or with sign "
                    "[r, s], got ",
                    o_idx.sizes(), " and ", i_idx.sizes());
  TORCH_CHECK_VALUE(!sign || (sign->scalar_type() == at::kChar && sign->is_contiguous() &&
                              sign->sizes() == o_idx.sizes()),
                    "sampled_outer: sign must be contiguous int8 ", o_idx.sizes());
  SampledOuterArgs args;
  args.B = x.size(0);
  args.T = x.size(1);
  args.I = x.size(2);
  args.O = dy.size(2);
  args.r = o_idx.size(0);
  args.s = sign ? o_idx.size(1) : 1;
  args.bias = bias;
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat && out.dim() == 2 && out.size(0) == args.B &&
                        out.size(1) == args.r,
                    "sampled_outer: out must be float32 [B=", args.B, ", r=", args.r, "], got ",
                    out.sizes());
  args.o_idx = o_idx.const_data_ptr<int32_t>();
  args.i_idx = i_idx.const_data_ptr<int32_t>();
  TORCH_CHECK_INDEX(indices_in_range(args.o_idx, o_idx.numel(), args.O),
                    "sampled_outer: o_idx is out of range for O=", args.O);
  TORCH_CHECK_INDEX(indices_in_range(args.i_idx, i_idx.numel(), args.I + bias),
                    "sampled_outer: i_idx is out of range for I=", args.I,
                    bias ? " and the bias column" : "");
  if (out.numel() == 0) return;
  if (args.T == 0 || args.s == 0) {
    out.zero_();
    return;
  }
  args.dtype = dtype_of(x);
  args.x = x.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.x_stride_b = x.stride(0);
  args.x_stride_t = x.stride(1);
  args.dy_stride_b = dy.stride(0);
  args.dy_stride_t = dy.stride(1);
  args.sign = sign ? sign->const_data_ptr<int8_t>() : nullptr;
  args.scale = static_cast<float>(scale);
  args.out = out.mutable_data_ptr<float>();
  args.out_stride_b = out.stride(0);
  args.out_stride_k = out.stride(1);
  run(*SampledOuter::make(args), args);
}

void sampled_embedding(const at::Tensor& ids, const at::Tensor& dy, const at::Tensor& o_idx,
                       const at::Tensor& i_idx, double scale, const at::Tensor& out) {
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.scalar_type() == at::kLong && ids.is_contiguous() &&
                        dy.dim() == 3 && dy.size(0) == ids.size(0) && dy.size(1) == ids.size(1) &&
                        (dy.stride(2) == 1 || dy.size(2) <= 1),
                    "sampled_embedding: ids must be contiguous int64 [B, T] and dy [B, T, O] with "
                    "stride 1 in O, got ",
                    ids.scalar_type(), " ", ids.sizes(), " and ", dy.sizes());
  TORCH_CHECK_VALUE(o_idx.scalar_type() == at::kInt && i_idx.scalar_type() == at::kInt &&
                        o_idx.is_contiguous() && i_idx.is_contiguous() && o_idx.dim() == 1 &&
                        o_idx.sizes() == i_idx.sizes(),
                    "sampled_embedding: o_idx and i_idx must be contiguous int32 [r], got ",
                    o_idx.sizes(), " and ", i_idx.sizes());
  SampledEmbeddingArgs args;
  args.r = o_idx.numel();
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat && out.dim() == 2 &&
                        out.size(0) == ids.size(0) && out.size(1) == args.r,
                    "sampled_embedding: out must be float32 [B=", ids.size(0), ", r=", args.r,
                    "], got ", out.sizes());
  args.o_idx = o_idx.const_data_ptr<int32_t>();
  args.i_idx = i_idx.const_data_ptr<int32_t>();
  TORCH_CHECK_INDEX(indices_in_range(args.o_idx, args.r, dy.size(2)),
                    "sampled_embedding: o_idx is out of range for O=", dy.size(2));
  TORCH_CHECK_VALUE(std::is_sorted(args.i_idx, args.i_idx + args.r),
                    "sampled_embedding: i_idx must be sorted");
  if (out.numel() == 0) return;
  args.ids = ids.const_data_ptr<int64_t>();
  args.dtype = dtype_of(dy);
  args.dy = dy.const_data_ptr();
  args.T = ids.size(1);
  args.dy_stride_b = dy.stride(0);
  args.dy_stride_t = dy.stride(1);
  args.scale = static_cast<float>(scale);
  args.out = out.mutable_data_ptr<float>();
  args.out_stride_b = out.stride(0);
  args.out_stride_k = out.stride(1);
  at::parallel_for(0, ids.size(0), grain(kSearchNs * args.T + kZeroNs * args.r),
                   [&](int64_t begin, int64_t end) { sampled_embedding_rows(args, begin, end); });
}

// The values of one argument of sampled_conv, behind `fill` for the dimensions that are missing.
void spatial(const char* name, at::IntArrayRef values, int64_t num_dims, int64_t least,
             int64_t fill, int64_t* to) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(values.size()) == num_dims, "sampled_conv: ", name,
                    " must be ", num_dims, " ints, got ", values);
  std::fill_n(to, 3, fill);
  for (int64_t d = 0; d < num_dims; ++d) {
    TORCH_CHECK_VALUE(values[d] >= least && values[d] <= kInt32Max, "sampled_conv: ", name,
                      " must be ints from ", least, " to ", kInt32Max, ", got ", values);
    to[3 - num_dims + d] = values[d];
  }
}

void sampled_conv(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& o_idx,
                  const at::Tensor& i_idx, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool bias,
                  double scale, const at::Tensor& out) {
  const int64_t num_dims = x.dim() - 2;
  TORCH_CHECK_VALUE(num_dims >= 1 && num_dims <= 3 && dy.dim() == x.dim() &&
                        x.size(0) == dy.size(0) && x.scalar_type() == dy.scalar_type(),
                    "sampled_conv: x must be [B, C, *S] and dy [B, O, *S'] of one dtype, got ",
                    x.scalar_type(), " ", x.sizes(), " and ", dy.scalar_type(), " ", dy.sizes());
  TORCH_CHECK_VALUE(o_idx.scalar_type() == at::kInt && i_idx.scalar_type() == at::kInt &&
                        o_idx.is_contiguous() && i_idx.is_contiguous() && o_idx.dim() == 1 &&
                        o_idx.sizes() == i_idx.sizes(),
                    "sampled_conv: o_idx and i_idx must be contiguous int32 [r], got ",
                    o_idx.sizes(), " and ", i_idx.sizes());
  SampledConvArgs args;
  args.C = x.size(1);
  args.O = dy.size(1);
  args.groups = groups;
  TORCH_CHECK_VALUE(groups >= 1 && args.C % groups == 0 && args.O % groups == 0,
                    "sampled_conv: groups must divide C=", args.C, " and O=", args.O, ", got ",
                    groups);
  spatial("kernel_size", kernel_size, num_dims, 1, 1, args.kernel_size);
  spatial("stride", stride, num_dims, 1, 1, args.stride);
  spatial("padding", padding, num_dims, 0, 0, args.padding);
  spatial("dilation", dilation, num_dims, 1, 1, args.dilation);
  int64_t taps = 1;
  for (const int64_t size : args.kernel_size) {
    TORCH_CHECK_VALUE(taps <= kInt32Max / size, "sampled_conv: kernel_size ", kernel_size,
                      " is too large");
    taps *= size;
  }
  TORCH_CHECK_VALUE(args.C / groups < kInt32Max / taps, "sampled_conv: C=", args.C,
                    " and kernel_size ", kernel_size, " are too large for int32 indices");
  const int64_t I = args.C / groups * taps;
  args.r = o_idx.numel();
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat && out.dim() == 2 && out.size(0) == x.size(0) &&
                        out.size(1) == args.r,
                    "sampled_conv: out must be float32 [B=", x.size(0), ", r=", args.r, "], got ",
                    out.sizes());
  args.o_idx = o_idx.const_data_ptr<int32_t>();
  args.i_idx = i_idx.const_data_ptr<int32_t>();
  TORCH_CHECK_INDEX(indices_in_range(args.o_idx, args.r, args.O),
                    "sampled_conv: o_idx is out of range for O=", args.O);
  TORCH_CHECK_INDEX(indices_in_range(args.i_idx, args.r, I + bias),
                    "sampled_conv: i_idx is out of range for C / groups * prod(kernel_size)=", I,
                    bias ? " and the bias" : "");
  if (out.numel() == 0) return;
  if (dy.numel() == 0) {
    out.zero_();
    return;
  }
  // Strided rows, as of channels_last, cost several times contiguous ones: they are copied unless
  // less is read of them than there is.
  const int64_t outputs = dy.numel() / (dy.size(0) * args.O);
  const auto with_rows = [&](const at::Tensor& tensor) {
    const bool in_place = tensor.stride(-1) == 1 || tensor.size(-1) == 1 ||
                          args.r * outputs <= tensor.numel() / tensor.size(0);
    return in_place ? tensor : tensor.contiguous();
  };
  const at::Tensor x_rows = with_rows(x), dy_rows = with_rows(dy);
  args.dtype = dtype_of(x);
  args.x = x_rows.const_data_ptr();
  args.dy = dy_rows.const_data_ptr();
  args.x_stride_b = x_rows.stride(0);
  args.x_stride_c = x_rows.stride(1);
  args.dy_stride_b = dy_rows.stride(0);
  args.dy_stride_c = dy_rows.stride(1);
  for (int64_t d = 0; d < 3; ++d) {
    const int64_t from = d - 3 + x_rows.dim();
    const bool there = from >= 2;
    args.x_size[d] = there ? x_rows.size(from) : 1;
    args.dy_size[d] = there ? dy_rows.size(from) : 1;
    args.x_stride[d] = there ? x_rows.stride(from) : 0;
    args.dy_stride[d] = there ? dy_rows.stride(from) : 0;
  }
  args.bias = bias;
  args.scale = static_cast<float>(scale);
  args.out = out.mutable_data_ptr<float>();
  args.out_stride_b = out.stride(0);
  args.out_stride_k = out.stride(1);
  const std::unique_ptr<const SampledConv> call = SampledConv::make(args);
  const int64_t r = args.r;
  at::parallel_for(0, out.numel(), grain(call->entry_ns), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / r, k = begin % r, count = std::min(r - k, end - begin);
      call->entries(b, k, k + count);
      begin += count;
    }
  });
}

void gather_grads(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList indices,
                  at::ArrayRef<double> scales, const at::Tensor& out) {
  const int64_t L = indices.size();
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(grads.size()) == L && static_cast<int64_t>(scales.size()) == L,
      "gather_grads: grads, indices and scales must be equally long, got ", grads.size(), ", ", L,
      " and ", scales.size());
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat && out.dim() == 1,
                    "gather_grads: out must be float32 [R], got ", out.scalar_type(), " ",
                    out.sizes());
  std::vector<at::Tensor> kept(L), positions(L);  // what the entries below point into
  std::vector<GradEntries> layers(L);
  std::vector<int64_t> offsets(L + 1);
  for (int64_t l = 0; l < L; ++l) {
    TORCH_CHECK_VALUE(indices[l].scalar_type() == at::kLong && indices[l].dim() == 1,
                      "gather_grads: indices[", l, "] must be int64 [r], got ", indices[l].sizes());
    const at::Tensor& index = positions[l] = indices[l].contiguous();
    offsets[l + 1] = offsets[l] + index.numel();
    GradEntries& entries = layers[l];
    entries = GradEntries{};
    entries.idx = index.const_data_ptr<int64_t>();
    entries.r = index.numel();
    entries.scale = static_cast<float>(scales[l]);
    std::optional<at::Tensor> grad = grads.get(l);
    if (!grad || !grad->defined()) continue;
    kept[l] = std::move(*grad);
    const at::Tensor& g = kept[l];
    TORCH_CHECK_VALUE(g.layout() == at::kStrided, "gather_grads: grads[", l, "] is ", g.layout(),
                      ", not dense");
    entries.dtype = dtype_of(g);
    entries.numel = g.numel();
    TORCH_CHECK_INDEX(entries.numel > 0 || entries.r == 0, "gather_grads: indices[", l,
                      "] has an index out of range for a gradient of 0 elements");
    entries.data = g.const_data_ptr();
    if (!g.is_contiguous()) {
      entries.num_dims = g.dim();
      entries.sizes = g.sizes().data();
      entries.strides = g.strides().data();
    }
  }
  const int64_t R = offsets[L];
  TORCH_CHECK_VALUE(out.numel() == R, "gather_grads: out must have the ", R,
                    " entries of all indices, got ", out.numel());
  if (R == 0) return;
  float* const data = out.mutable_data_ptr<float>();
  const int64_t out_stride = out.stride(0);
  for (int64_t l = 0; l < L; ++l) {
    layers[l].out = data + offsets[l] * out_stride;
    layers[l].out_stride = out_stride;
  }

  std::atomic<int64_t> bad{-1};  // a layer with an index out of range
  at::parallel_for(0, R, grain(5.0), [&](int64_t begin, int64_t end) {
    int64_t l = std::upper_bound(offsets.begin(), offsets.end(), begin) - offsets.begin() - 1;
    for (; l < L && offsets[l] < end; ++l) {
      const int64_t k_begin = std::max(begin, offsets[l]) - offsets[l];
      const int64_t k_end = std::min(end, offsets[l + 1]) - offsets[l];
      if (!gather_entries(layers[l], k_begin, k_end)) bad = l;
    }
  });
  TORCH_CHECK_INDEX(bad < 0, "gather_grads: indices[", bad.load(),
                    "] has an index out of range for a gradient of ",
                    layers[std::max<int64_t>(bad, 0)].numel, " elements");
}

// What gram, damped_cholesky and cholesky_solve repeat of the checks: [L + 1] rising bounds, and
// the packed matrices and rows that fit them.
void check_layers(const char* op, const at::Tensor& offsets,
                  std::initializer_list<const at::Tensor*> packed,
                  std::initializer_list<const at::Tensor*> rows) {
  TORCH_CHECK_VALUE(offsets.scalar_type() == at::kLong && offsets.dim() == 1 &&
                        offsets.numel() > 0 && offsets.is_contiguous(),
                    op, ": offsets must be contiguous int64 [L + 1], got ", offsets.sizes());
  const int64_t* const bounds = offsets.const_data_ptr<int64_t>();
  int64_t num_packed = 0;
  bool rising = bounds[0] == 0;
  for (int64_t l = 0; l + 1 < offsets.numel(); ++l) {
    const int64_t r = bounds[l + 1] - bounds[l];
    rising &= r >= 0;
    num_packed += r * r;
  }
  TORCH_CHECK_VALUE(rising, op, ": offsets must rise from 0");
  for (const at::Tensor* tensor : packed) {
    TORCH_CHECK_VALUE(tensor->scalar_type() == at::kFloat && tensor->is_contiguous() &&
                          tensor->dim() == 1 && tensor->numel() == num_packed,
                      op, ": packed matrices must be contiguous float32 [", num_packed, "], got ",
                      tensor->scalar_type(), " ", tensor->sizes());
  }
  const int64_t R = bounds[offsets.numel() - 1];
  for (const at::Tensor* tensor : rows) {
    TORCH_CHECK_VALUE(tensor->scalar_type() == at::kFloat && tensor->dim() == 2 &&
                          tensor->size(0) == (*rows.begin())->size(0) && tensor->size(1) == R &&
                          (tensor->stride(1) == 1 || R <= 1),
                      op, ": rows and their solutions must be float32 [m, R=", R,
                      "] with stride 1 in R, got ", tensor->scalar_type(), " ", tensor->sizes());
  }
}

// item(k) for k in [first, num_items), each by whichever thread is free.
template <typename F>
void run_items(int64_t first, int64_t num_items, double ns, const F& item) {
  std::atomic<int64_t> next{first};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t k = next++; k < num_items; k = next++) item(k);
  };
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t workers =
      std::min({threads, num_items - first, 1 + static_cast<int64_t>(ns / kThreadNs)});
  if (workers > 1) {
    at::parallel_for(0, workers, 1, work);
  } else {
    work(0, 1);
  }
}

void gram(const at::Tensor& rows, const at::Tensor& offsets, double scale, bool accumulate,
          const at::Tensor& out) {
  check_layers("gram", offsets, {&out}, {&rows});
  if (out.numel() == 0) return;
  GramArgs args;
  args.rows = rows.const_data_ptr<float>();
  args.n = rows.size(0);
  args.rows_stride = rows.stride(0);
  args.L = offsets.numel() - 1;
  args.offsets = offsets.const_data_ptr<int64_t>();
  args.scale = static_cast<float>(scale);
  args.accumulate = accumulate;
  args.out = out.mutable_data_ptr<float>();
  const GramCall call(args);
  run_items(0, call.num_items(), call.total_ns, [&](int64_t k) { call.item(k); });
}

// A layer must have this much to do for its rows to be shared out.
constexpr double kSharedNs = 100e3;

// Threads that stay together over many short jobs of one caller. They take the parts of a job as
// they come free, so a thread that the system has put aside holds nobody up; a parallel_for for
// each job would wait for it every time.
class Team {
 public:
  // f(part, part + 1) for each part, on the caller and on the helpers that are there.
  void share(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
    job_ = &f;
    done_ = 0;
    ++generation_;
    left_.store(generation_ << 32 | static_cast<uint64_t>(count), std::memory_order_release);
    while (take()) {
    }
    for (int64_t tries = 0; done_.load(std::memory_order_acquire) < count;) wait(&tries);
  }
  void help() {
    for (int64_t tries = 0; !over_.load(std::memory_order_acquire);) {
      take() ? void(tries = 0) : wait(&tries);
    }
  }
  void end() { over_.store(true, std::memory_order_release); }

 private:
  struct Count {
    ~Count() { done.fetch_add(1, std::memory_order_release); }
    std::atomic<int64_t>& done;
  };

  // The part is counted even if f throws. Its job is the current one: until all parts are counted,
  // the caller does not go on.
  bool take() {
    uint64_t left = left_.load(std::memory_order_acquire);
    do {
      if ((left & kParts) == 0) return false;
    } while (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel));
    const Count count{done_};
    const int64_t part = static_cast<int64_t>(left & kParts) - 1;
    (*job_)(part, part + 1);
    return true;
  }
  static void wait(int64_t* tries) {
    if (++*tries > 2000) std::this_thread::yield();
  }

  static constexpr uint64_t kParts = 0xffffffff;
  std::atomic<uint64_t> left_{0};  // the job's generation, and its parts that nobody took yet
  std::atomic<int64_t> done_{0};
  std::atomic<bool> over_{false};
  uint64_t generation_ = 0;
  const std::function<void(int64_t, int64_t)>* job_ = nullptr;
};

// An item that would keep one thread busy while the others are done is shared by all of them.
void run(const CholeskyArgs& args) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const CholeskyCall call(args);
  const int64_t num_items = call.num_items();
  int64_t shared = 0;
  double rest_ns = call.total_ns;
  while (threads > 1 && shared < num_items && call.item_ns(shared) > kSharedNs &&
         call.item_ns(shared) * threads > 0.5 * rest_ns) {
    rest_ns -= call.item_ns(shared++);
  }
  if (shared > 0) {
    Team team;
    const Share share = [&](int64_t count, const std::function<void(int64_t, int64_t)>& f) {
      team.share(count, f);
    };
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      if (begin > 0) return team.help();
      const struct End {
        ~End() { team.end(); }
        Team& team;
      } end{team};
      for (int64_t k = 0; k < shared; ++k) call.item(k, &share);
    });
  }
  run_items(shared, num_items, rest_ns, [&](int64_t k) { call.item(k, nullptr); });
}

void damped_cholesky(const at::Tensor& matrices, const at::Tensor& offsets, const at::Tensor& shift,
                     const std::optional<at::Tensor>& rows, const at::Tensor& out,
                     const at::Tensor& info, const std::optional<at::Tensor>& solved) {
  const char* const op = "damped_cholesky";
  TORCH_CHECK_VALUE(rows.has_value() == solved.has_value(), op, ": rows and solved go together");
  check_layers(op, offsets, {&matrices, &out}, {});
  if (rows) check_layers(op, offsets, {}, {&*rows, &*solved});
  const int64_t L = offsets.numel() - 1;
  TORCH_CHECK_VALUE(shift.scalar_type() == at::kFloat && shift.is_contiguous() &&
                        shift.numel() == L && info.scalar_type() == at::kInt &&
                        info.is_contiguous() && info.numel() == L,
                    op, ": shift must be float32 and info int32 [L=", L, "], got ", shift.sizes(),
                    " and ", info.sizes());
  CholeskyArgs args{};
  args.L = L;
  args.offsets = offsets.const_data_ptr<int64_t>();
  args.matrices = matrices.const_data_ptr<float>();
  args.factors = out.mutable_data_ptr<float>();
  args.shift = shift.const_data_ptr<float>();
  args.info = info.mutable_data_ptr<int32_t>();
  std::fill_n(args.info, L, 0);
  if (rows) {
    args.rows = rows->const_data_ptr<float>();
    args.solved = solved->mutable_data_ptr<float>();
    args.m = rows->size(0);
    args.rows_stride = rows->stride(0);
    args.solved_stride = solved->stride(0);
  }
  run(args);
}

void cholesky_solve(const at::Tensor& factors, const at::Tensor& offsets, const at::Tensor& rows,
                    const at::Tensor& out) {
  check_layers("cholesky_solve", offsets, {&factors}, {&rows, &out});
  if (out.numel() == 0) return;
  CholeskyArgs args{};
  args.L = offsets.numel() - 1;
  args.offsets = offsets.const_data_ptr<int64_t>();
  args.matrices = factors.const_data_ptr<float>();
  args.rows = rows.const_data_ptr<float>();
  args.solved = out.mutable_data_ptr<float>();
  args.m = rows.size(0);
  args.rows_stride = rows.stride(0);
  args.solved_stride = out.stride(0);
  run(args);
}

void sampled_outer_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const std::optional<at::Tensor>&, bool, double, const at::Tensor&) {}

void sampled_embedding_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                            const at::Tensor&, double, const at::Tensor&) {}

void sampled_conv_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                       at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t,
                       bool, double, const at::Tensor&) {}

void gather_grads_meta(const c10::List<std::optional<at::Tensor>>&, at::TensorList,
                       at::ArrayRef<double>, const at::Tensor&) {}

void gram_meta(const at::Tensor&, const at::Tensor&, double, bool, const at::Tensor&) {}

void damped_cholesky_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                          const std::optional<at::Tensor>&, const at::Tensor&, const at::Tensor&,
                          const std::optional<at::Tensor>&) {}

void cholesky_solve_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         const at::Tensor&) {}

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

// dropinf/staging.py gives it checked arrays [r, s].
Array<int64_t> cut_passes_of(const Array<int32_t>& o_idx, const Array<int32_t>& i_idx,
                             int64_t element_size, int64_t alignment, int64_t max_outputs,
                             int64_t max_warps) {
  TORCH_CHECK_VALUE(o_idx.ndim() == 2 && i_idx.ndim() == 2 && o_idx.shape(0) == i_idx.shape(0) &&
                        o_idx.shape(1) == i_idx.shape(1) && element_size > 0 && alignment > 0,
                    "cut_passes: o_idx and i_idx must be [r, s]");
  const int64_t n = o_idx.size();
  TORCH_CHECK_INDEX(
      indices_in_range(o_idx.data(), n, kInt32Max) && indices_in_range(i_idx.data(), n, kInt32Max),
      "cut_passes: negative index");
  const std::vector<int64_t> bounds =
      cut_passes(o_idx.data(), i_idx.data(), o_idx.shape(0), o_idx.shape(1),
                 {element_size, alignment, max_outputs, max_warps});
  return Array<int64_t>(static_cast<pybind11::ssize_t>(bounds.size()), bounds.data());
}

// (colours [n], how many)
pybind11::tuple colour_edges_of(const Array<uint8_t>& left, const Array<uint8_t>& right) {
  const int64_t n = left.size();
  TORCH_CHECK_VALUE(left.ndim() == 1 && right.ndim() == 1 && right.size() == n && n <= kInt32Max,
                    "colour_edges: left and right must be [n]");
  for (int64_t e = 0; e < n; ++e) {
    TORCH_CHECK_INDEX(left.data()[e] < kNumBanks && right.data()[e] < kNumBanks,
                      "colour_edges: a bank is out of range");
  }
  Array<int32_t> colour(n);
  const int64_t count = colour_edges(left.data(), right.data(), n, colour.mutable_data());
  return pybind11::make_tuple(colour, count);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#elif defined(_MSC_VER)
  info["compiler"] = "msvc " + std::to_string(_MSC_VER);
#else
  info["compiler"] = "unknown";
#endif
  info["cpp_standard"] = static_cast<int64_t>(__cplusplus);
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda"] = false;
  return info;
}

}  // namespace
}  // namespace dropinf

TORCH_LIBRARY(dropinf, m) {
  m.def(
      "sampled_outer(Tensor x, Tensor dy, Tensor o_idx, Tensor i_idx, Tensor? sign, bool bias, "
      "float scale, Tensor(a!) out) -> ()");
  m.def(
      "sampled_embedding(Tensor ids, Tensor dy, Tensor o_idx, Tensor i_idx, float scale, "
      "Tensor(a!) out) -> ()");
  m.def(
      "sampled_conv(Tensor x, Tensor dy, Tensor o_idx, Tensor i_idx, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, int groups, bool bias, float scale, "
      "Tensor(a!) out) -> ()");
  m.def("gram(Tensor rows, Tensor offsets, float scale, bool accumulate, Tensor(a!) out) -> ()");
  m.def(
      "damped_cholesky(Tensor matrices, Tensor offsets, Tensor shift, Tensor? rows, "
      "Tensor(a!) out, Tensor(b!) info, Tensor(c!)? solved) -> ()");
  m.def("cholesky_solve(Tensor factors, Tensor offsets, Tensor rows, Tensor(a!) out) -> ()");
  m.def("gather_grads(Tensor?[] grads, Tensor[] indices, float[] scales, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(dropinf, CPU, m) {
  m.impl("sampled_outer", &dropinf::sampled_outer);
  m.impl("sampled_embedding", &dropinf::sampled_embedding);
  m.impl("sampled_conv", &dropinf::sampled_conv);
  m.impl("gather_grads", &dropinf::gather_grads);
  m.impl("gram", &dropinf::gram);
  m.impl("damped_cholesky", &dropinf::damped_cholesky);
  m.impl("cholesky_solve", &dropinf::cholesky_solve);
}

TORCH_LIBRARY_IMPL(dropinf, Meta, m) {
  m.impl("sampled_outer", &dropinf::sampled_outer_meta);
  m.impl("sampled_embedding", &dropinf::sampled_embedding_meta);
  m.impl("sampled_conv", &dropinf::sampled_conv_meta);
  m.impl("gather_grads", &dropinf::gather_grads_meta);
  m.impl("gram", &dropinf::gram_meta);
  m.impl("damped_cholesky", &dropinf::damped_cholesky_meta);
  m.impl("cholesky_solve", &dropinf::cholesky_solve_meta);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &dropinf::build_info);
  m.def("cut_passes", &dropinf::cut_passes_of);
  m.def("colour_edges", &dropinf::colour_edges_of);
  m.def("cpu_capability", &dropinf::cpu_capability);
  m.def("set_cpu_capability", [](const std::string& name) {
    if (!dropinf::set_cpu_capability(name)) {
      throw pybind11::value_error("set_cpu_capability: '" + name + "' is not supported here");
    }
  });
}
