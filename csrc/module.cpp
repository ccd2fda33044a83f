// The module dropinf._C: build information, and what is called from Python that is no op. Importing
// it registers the ops, each in a file of its own.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "bank_order.h"
#include "capture/bindings.h"
#include "checks.h"
#include "column_order.h"
#include "cpu/capability.h"

namespace dropinf {
namespace {

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

// dropinf/ops/bank_schedule.py gives it checked arrays [r, s].
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

// (warps [n], how many)
pybind11::tuple pack_warps_of(const Array<int32_t>& x_word, const Array<int32_t>& dy_word) {
  const int64_t n = x_word.size();
  TORCH_CHECK_VALUE(
      x_word.ndim() == 1 && dy_word.ndim() == 1 && dy_word.size() == n && n <= kInt32Max,
      "pack_warps: x_word and dy_word must be [n]");
  TORCH_CHECK_INDEX(indices_in_range(x_word.data(), n, kInt32Max) &&
                        indices_in_range(dy_word.data(), n, kInt32Max),
                    "pack_warps: negative word");
  Array<int32_t> warp(n);
  const int64_t count = pack_warps(x_word.data(), dy_word.data(), n, warp.mutable_data());
  return pybind11::make_tuple(warp, count);
}

// (coordinates [steps, lanes], cells of x [pieces, lanes], bits of the pieces), or None
pybind11::object order_columns_of(const Array<int32_t>& x_cell, const Array<int32_t>& dy_cell) {
  const int64_t n = x_cell.size();
  TORCH_CHECK_VALUE(
      x_cell.ndim() == 1 && dy_cell.ndim() == 1 && dy_cell.size() == n && n > 0 && n <= kInt32Max,
      "order_columns: x_cell and dy_cell must be [n], n > 0");
  TORCH_CHECK_INDEX(indices_in_range(x_cell.data(), n, kInt32Max) &&
                        indices_in_range(dy_cell.data(), n, kInt32Max),
                    "order_columns: negative cell");
  const PassOrder order = order_columns(x_cell.data(), dy_cell.data(), n);
  if (order.coordinate.empty()) return pybind11::none();
  return pybind11::make_tuple(Array<int32_t>({kLaneSteps, kColumnLanes}, order.coordinate.data()),
                              Array<int32_t>({kLanePieces, kColumnLanes}, order.x_cell.data()),
                              order.pieces);
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

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  dropinf::init_capture(m);
  m.def("build_info", &dropinf::build_info);
  m.def("cut_passes", &dropinf::cut_passes_of);
  m.def("pack_warps", &dropinf::pack_warps_of);
  m.def("order_columns", &dropinf::order_columns_of);
  m.def("cpu_capability", &dropinf::cpu_capability);
  m.def("set_cpu_capability", [](const std::string& name) {
    if (!dropinf::set_cpu_capability(name)) {
      throw pybind11::value_error("set_cpu_capability: '" + name + "' is not supported here");
    }
  });
}
