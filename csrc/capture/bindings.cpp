#include "bindings.h"

#include <pybind11/stl.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>

#include "calls.h"
#include "compiled_call.h"
#include "site_node.h"
#include "trace.h"
#include "writes.h"

namespace dropinf {
namespace {

namespace py = pybind11;

c10::SafePyObject safe(const py::object& object) {
  return {Py_NewRef(object.ptr()), getPyInterpreter()};
}

}  // namespace

void init_capture(py::module_& m) {
  m.add_object("SiteNode",
               py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(init_site_nodes())));
  init_calls(m);
  py::enum_<Native>(m, "Native")
      .value("outer", Native::kOuter)
      .value("layer_norm", Native::kLayerNorm)
      .value("rms_norm", Native::kRmsNorm)
      .value("sampled_norm", Native::kSampledNorm)
      .value("embedding", Native::kEmbedding)
      .value("conv", Native::kConv)
      .value("batch_norm", Native::kBatchNorm);
  py::class_<EntryRun>(m, "EntryRun")
      .def(py::init([](at::Tensor o_idx, at::Tensor i_idx, std::optional<at::Tensor> weights,
                       std::vector<at::Tensor> order, int64_t column) {
        const int64_t r = o_idx.size(0);
        return EntryRun{std::move(o_idx), std::move(i_idx), std::move(weights),
                        std::move(order), column,           r};
      }));
  py::class_<Writes, std::shared_ptr<Writes>>(m, "Writes")
      .def(
          py::init([](Native native, const py::object& dtype, at::Device device, int64_t x_features,
                      int64_t dy_features, int64_t width, std::optional<double> eps, bool rms,
                      int64_t padding_id, std::vector<std::vector<int64_t>> window, int64_t groups,
                      std::optional<at::Tensor> mean, std::optional<at::Tensor> var,
                      std::vector<EntryRun> runs) {
            return std::make_shared<Writes>(
                Writes{native, dtype.cast<at::ScalarType>(), device, x_features, dy_features, width,
                       eps, rms, padding_id, std::move(window), groups, std::move(mean),
                       std::move(var), std::move(runs)});
          }),
          py::kw_only(), py::arg("native"), py::arg("dtype"), py::arg("device"),
          py::arg("x_features"), py::arg("dy_features"), py::arg("width") = 0,
          py::arg("eps") = std::nullopt, py::arg("rms") = false, py::arg("padding_id") = -1,
          py::arg("window") = std::vector<std::vector<int64_t>>(), py::arg("groups") = 1,
          py::arg("mean") = std::nullopt, py::arg("var") = std::nullopt, py::arg("runs"));
  py::class_<Site, std::shared_ptr<Site>>(m, "Site")
      .def(py::init([](const py::object& object, int64_t kind, bool reads) {
        return std::make_shared<Site>(Site{safe(object), kind, reads, nullptr});
      }))
      .def_property(
          "writes", [](const Site&) { return py::none(); },
          [](Site& site, std::shared_ptr<Writes> writes) { site.writes = std::move(writes); });
  m.def("attach_site", [](std::shared_ptr<Site> site, const py::object& tap,
                          const at::Tensor& probe, const at::Tensor& x, const at::Tensor& y) {
    return SiteNode::attach(std::move(site), safe(tap), probe, x, y);
  });
  py::class_<CompiledCall, std::shared_ptr<CompiledCall>>(m, "CompiledCall")
      .def(py::init<int64_t>())
      .def("silent", &CompiledCall::silent);
  py::class_<Trace>(m, "Trace")
      .def(py::init<const at::Tensor&, const py::dict&, const py::object&>())
      .def_property_readonly("signature", &Trace::signature)
      .def_property_readonly("in_python", &Trace::in_python)
      .def_property_readonly("sites", &Trace::sites)
      .def("__len__", &Trace::num_nodes)
      .def("node", &Trace::node)
      .def("begin", &Trace::begin)
      .def("begin_call",
           [](Trace& trace, const std::shared_ptr<CompiledCall>& call,
              const std::vector<std::shared_ptr<Writes>>& writes) {
             trace.begin_call(call, {writes.begin(), writes.end()});
           })
      .def("started", &Trace::started)
      .def("silent", &Trace::silent)
      .def("end", &Trace::end);
}

}  // namespace dropinf

// One translation unit, as torch's headers for Python take 13 s to compile in each.
#include "calls.cpp"
#include "compiled_call.cpp"
#include "site_node.cpp"
#include "trace.cpp"
#include "writes.cpp"
