// Registers the ops, shares their work out over threads on a CPU, and makes the module dropinf._C
// with build information.

#include <ATen/Parallel.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "bank_order.h"
#include "checks.h"
#include "ops.h"

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
                   double scale, at::TensorList, const at::Tensor& out) {
  const SampledOuterArgs args = sampled_outer_args(x, dy, o_idx, i_idx, sign, bias, scale, out);
  TORCH_CHECK_INDEX(indices_in_range(args.o_idx, o_idx.numel(), args.O),
                    "sampled_outer: o_idx is out of range for O=", args.O);
  TORCH_CHECK_INDEX(indices_in_range(args.i_idx, i_idx.numel(), args.I + bias),
                    "sampled_outer: i_idx is out of range for I=", args.I,
                    bias ? " and the bias column" : "");
  TORCH_CHECK_VALUE(!sign || signs_in_range(args.sign, sign->numel()),
                    "sampled_outer: sign must be of -1, 0 and 1");
  if (out.numel() == 0) return;
  if (args.T == 0 || args.s == 0) {
    out.zero_();
    return;
  }
  run(*SampledOuter::make(args), args);
}

void sampled_embedding(const at::Tensor& ids, const at::Tensor& dy, const at::Tensor& o_idx,
                       const at::Tensor& i_idx, double scale, const at::Tensor& out) {
  const SampledEmbeddingArgs args = sampled_embedding_args(ids, dy, o_idx, i_idx, scale, out);
  TORCH_CHECK_INDEX(indices_in_range(args.o_idx, args.r, args.O),
                    "sampled_embedding: o_idx is out of range for O=", args.O);
  TORCH_CHECK_VALUE(std::is_sorted(args.i_idx, args.i_idx + args.r),
                    "sampled_embedding: i_idx must be sorted");
  TORCH_CHECK_INDEX(args.r == 0 || args.i_idx[0] >= 0,
                    "sampled_embedding: i_idx is out of range, it has negative tokens");
  if (out.numel() == 0) return;
  at::parallel_for(0, args.B, grain(kSearchNs * args.T + kZeroNs * args.r),
                   [&](int64_t begin, int64_t end) { sampled_embedding_rows(args, begin, end); });
}

void sampled_conv(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& o_idx,
                  const at::Tensor& i_idx, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool bias,
                  double scale, const at::Tensor& out) {
  // Strided rows, as of channels_last, cost several times contiguous ones: they are copied unless
  // less is read of them than there is.
  const auto with_rows = [&](const at::Tensor& tensor) {
    const bool empty = tensor.dim() < 3 || tensor.numel() == 0 || dy.numel() == 0;
    if (empty || tensor.stride(-1) == 1 || tensor.size(-1) == 1) return tensor;
    const int64_t outputs = dy.numel() / (dy.size(0) * dy.size(1));
    const bool in_place = o_idx.numel() * outputs <= tensor.numel() / tensor.size(0);
    return in_place ? tensor : tensor.contiguous();
  };
  const at::Tensor x_rows = with_rows(x), dy_rows = with_rows(dy);
  const SampledConvArgs args = sampled_conv_args(x_rows, dy_rows, o_idx, i_idx, kernel_size, stride,
                                                 padding, dilation, groups, bias, scale, out);
  TORCH_CHECK_INDEX(indices_in_range(args.o_idx, args.r, args.O),
                    "sampled_conv: o_idx is out of range for O=", args.O);
  TORCH_CHECK_INDEX(indices_in_range(args.i_idx, args.r, args.I + bias),
                    "sampled_conv: i_idx is out of range for C / groups * prod(kernel_size)=",
                    args.I, bias ? " and the bias" : "");
  if (out.numel() == 0) return;
  if (dy.numel() == 0) {
    out.zero_();
    return;
  }
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

// The entries of a layer that begin before its term n; an entry has s terms.
int64_t entries_before(int64_t n, int64_t s) { return s == 1 ? n : (n + s - 1) / s; }

void gather_grads(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList indices,
                  const c10::List<std::optional<at::Tensor>>& signs, at::ArrayRef<double> scales,
                  const at::Tensor& out) {
  const GatherCall call = gather_call(grads, indices, signs, scales, out);
  const std::vector<int64_t>& offsets = call.offsets;
  const int64_t L = call.layers.size();
  for (int64_t l = 0; l < L; ++l) {
    const GradEntries& entries = call.layers[l];
    TORCH_CHECK_VALUE(!entries.signs || signs_in_range(entries.signs, call.signs[l].numel()),
                      "gather_grads: signs[", l, "] must be of -1, 0 and 1");
  }
  std::atomic<int64_t> bad{-1};  // a layer with an index out of range
  // Threads share the terms; an entry goes with its first one.
  at::parallel_for(0, offsets[L], grain(5.0), [&](int64_t begin, int64_t end) {
    int64_t l = std::upper_bound(offsets.begin(), offsets.end(), begin) - offsets.begin() - 1;
    for (; l < L && offsets[l] < end; ++l) {
      const GradEntries& entries = call.layers[l];
      const int64_t k_begin = entries_before(std::max(begin, offsets[l]) - offsets[l], entries.s);
      const int64_t k_end = entries_before(std::min(end, offsets[l + 1]) - offsets[l], entries.s);
      if (!gather_entries(entries, k_begin, k_end)) bad = l;
    }
  });
  TORCH_CHECK_INDEX(bad < 0, "gather_grads: indices[", bad.load(),
                    "] has an index out of range for a gradient of ",
                    call.layers[std::max<int64_t>(bad, 0)].numel, " elements");
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
  const GramArgs args = gram_args(rows, offsets, scale, accumulate, out);
  if (out.numel() == 0) return;
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
  const CholeskyArgs args = damped_cholesky_args(matrices, offsets, shift, rows, out, info, solved);
  std::fill_n(args.info, args.L, 0);
  run(args);
}

void cholesky_solve(const at::Tensor& factors, const at::Tensor& offsets, const at::Tensor& rows,
                    const at::Tensor& out) {
  const CholeskyArgs args = cholesky_solve_args(factors, offsets, rows, out);
  if (out.numel() > 0) run(args);
}

void score_topk_meta(const at::Tensor&, int64_t, const at::Tensor&, const at::Tensor&) {}

void sampled_outer_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const std::optional<at::Tensor>&, bool, double, at::TensorList,
                        const at::Tensor&) {}

void sampled_embedding_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                            const at::Tensor&, double, const at::Tensor&) {}

void sampled_conv_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                       at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t,
                       bool, double, const at::Tensor&) {}

void gather_grads_meta(const c10::List<std::optional<at::Tensor>>&, at::TensorList,
                       const c10::List<std::optional<at::Tensor>>&, at::ArrayRef<double>,
                       const at::Tensor&) {}

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
#ifdef DROPINF_CUDA
  info["cuda"] = DROPINF_CUDA;
#else
  info["cuda"] = "";
  info["why_no_cuda"] = DROPINF_WHY_NO_CUDA;
#endif
  return info;
}

}  // namespace
}  // namespace dropinf

TORCH_LIBRARY(dropinf, m) { dropinf::define_ops(m); }

#ifdef DROPINF_CUDA
TORCH_LIBRARY_IMPL(dropinf, CUDA, m) { dropinf::implement_cuda_ops(m); }
#endif

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
  m.impl("score_topk", &dropinf::score_topk_meta);
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
