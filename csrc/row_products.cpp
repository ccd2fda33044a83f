// row_products: its schema and checks, and how a call is run on CPUs.

#include "row_products.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include "checks.h"
#include "registration.h"
#include "threads.h"

#if defined(__linux__) && defined(__GNUC__)
// Of MKL, where torch has it: 0 takes the limit back that is set for the calling thread.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int num_threads);
#endif

namespace dropinf {
namespace {

TORCH_LIBRARY_FRAGMENT(DROPINF_LIBRARY, m) {
  define(m,
         "row_products(Tensor queries, Tensor rows, Tensor? scales, Tensor? offsets, "
         "Tensor(a!) out) -> ()");
}

#ifndef DROPINF_CUDA_ON_HOST

// From this many queries on the matrix product of torch is faster, of float32 rows as they are and
// of others made float32 a piece at a time: R = 1024, 2-core Xeon with AVX2 (torch: AVX-512),
// 2026-11.
constexpr int64_t kManyInPlace = 8, kManyDecoded = 20;
// A piece, 1 MiB, stays in a core's cache. Larger and smaller ones took the same time.
constexpr int64_t kPieceRows = 256, kPieceColumns = 1024;
// Rows of an item of few queries: this many bytes.
constexpr int64_t kItemBytes = 1 << 19;

// `whole` are the bounds of the one layer that rows without scales are.
RowProductsArgs row_products_args(const at::Tensor& queries, const at::Tensor& rows,
                                  const std::optional<at::Tensor>& scales,
                                  const std::optional<at::Tensor>& offsets, const at::Tensor& out,
                                  const int64_t* whole) {
  const char* const op = "row_products";
  TORCH_CHECK_VALUE(
      queries.scalar_type() == at::kFloat && queries.dim() == 2 && unit_stride(queries) &&
          rows.dim() == 2 && rows.size(1) == queries.size(1) && unit_stride(rows) &&
          out.scalar_type() == at::kFloat && out.dim() == 2 && out.size(0) == queries.size(0) &&
          out.size(1) == rows.size(0) && unit_stride(out),
      op,
      ": queries must be float32 [m, R], rows [c, R] and out float32 [m, c], with stride 1 in R ",
      "and c, got ", queries.sizes(), ", ", rows.sizes(), " and ", out.sizes());
  RowProductsArgs args{};
  args.dtype = rows.scalar_type() == at::kChar ? DType::kInt8 : dtype_of(rows);
  args.queries = queries.const_data_ptr<float>();
  args.m = queries.size(0);
  args.R = queries.size(1);
  args.queries_stride = queries.stride(0);
  args.rows = rows.const_data_ptr();
  args.c = rows.size(0);
  args.rows_stride = rows.stride(0);
  args.L = 1;
  args.offsets = whole;
  args.out = out.mutable_data_ptr<float>();
  args.out_stride = out.stride(0);
  if (!scales) return args;
  TORCH_CHECK_VALUE(offsets.has_value(), op, ": scales need offsets");
  check_layers(op, *offsets, {}, {&queries});
  args.L = offsets->numel() - 1;
  TORCH_CHECK_VALUE(scales->scalar_type() == at::kFloat && scales->dim() == 2 &&
                        scales->size(0) == args.c && scales->size(1) == args.L &&
                        unit_stride(*scales),
                    op, ": scales must be float32 [c=", args.c, ", L=", args.L,
                    "] with stride 1 in L, got ", scales->scalar_type(), " ", scales->sizes());
  args.scales = scales->const_data_ptr<float>();
  args.scales_stride = scales->stride(0);
  args.offsets = offsets->const_data_ptr<int64_t>();
  return args;
}

bool in_place(const RowProductsArgs& args) { return args.dtype == DType::kFloat32 && !args.scales; }

// MKL cuts a product by the number of threads that it might use, also where it gets but one, and
// the bits follow.
class OneThread {
 public:
#if defined(__linux__) && defined(__GNUC__)
  OneThread() {
    // What torch does first of all in a new thread takes such a limit back; so it is to do it now.
    at::get_num_threads();
    if (MKL_Set_Num_Threads_Local) before_ = MKL_Set_Num_Threads_Local(1);
  }
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }

 private:
  int before_ = 0;
#endif
};

// Each item is a product on one thread, of rows that begin at a multiple of kPieceRows: what a
// row's products are depends on the number of threads as little as with few queries.
void multiply_pieces(const RowProductsArgs& args, const at::Tensor& queries, const at::Tensor& rows,
                     const at::Tensor& out) {
  // Of few and wide rows threads share the queries too.
  const int64_t height = args.c > 4 * kPieceRows ? args.m : std::min<int64_t>(args.m, 64);
  const int64_t num_pieces = (args.c + kPieceRows - 1) / kPieceRows;
  const int64_t num_heights = (args.m + height - 1) / height;
  run_items(0, num_pieces * num_heights, 1e9, [&](int64_t item) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const OneThread one_thread;
    const int64_t begin = item / num_heights * kPieceRows, q = item % num_heights * height;
    const int64_t count = std::min(kPieceRows, args.c - begin);
    const at::Tensor some = queries.narrow(0, q, std::min(height, args.m - q));
    at::Tensor to = out.narrow(0, q, some.size(0)).narrow(1, begin, count);
    if (in_place(args)) {
      to.addmm_(some, rows.narrow(0, begin, count).t(), 0);
      return;
    }
    const at::Tensor space =
        at::empty({count * std::min(kPieceColumns, args.R)}, queries.options());
    for (int64_t first = 0; first < args.R; first += kPieceColumns) {
      const int64_t width = std::min(kPieceColumns, args.R - first);
      const at::Tensor piece = space.narrow(0, 0, count * width).view({count, width});
      decode_rows(args, begin, begin + count, first, first + width,
                  space.mutable_data_ptr<float>());
      to.addmm_(some.narrow(1, first, width), piece.t(), first ? 1 : 0);
    }
  });
}

void row_products_cpu(const at::Tensor& queries, const at::Tensor& rows,
                      const std::optional<at::Tensor>& scales,
                      const std::optional<at::Tensor>& offsets, const at::Tensor& out) {
  const int64_t whole[] = {0, queries.size(-1)};
  const RowProductsArgs args = row_products_args(queries, rows, scales, offsets, out, whole);
  if (out.numel() == 0) return;
  if (args.m >= (in_place(args) ? kManyInPlace : kManyDecoded) && args.R > 0) {
    return multiply_pieces(args, queries, rows, out);
  }
  const int64_t row_bytes = std::max<int64_t>(1, args.R * size_of(args.dtype));
  const int64_t height = std::max<int64_t>(1, kItemBytes / (kRowGroup * row_bytes)) * kRowGroup;
  // 2-core Xeon with AVX2, 2026-11.
  const double ns = 0.04 * static_cast<double>(args.m) * args.R * args.c + 10.0 * args.c;
  run_items(0, (args.c + height - 1) / height, ns, [&](int64_t item) {
    row_products_rows(args, item * height, std::min((item + 1) * height, args.c));
  });
}

TORCH_LIBRARY_IMPL(DROPINF_LIBRARY, CPU, m) { m.impl("row_products", &row_products_cpu); }

#endif  // DROPINF_CUDA_ON_HOST

}  // namespace
}  // namespace dropinf
