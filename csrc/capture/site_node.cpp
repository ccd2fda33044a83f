#include "site_node.h"

#include <ATen/core/grad_mode.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
#include <type_traits>
#include <utility>

namespace dropinf {
namespace {

using torch::autograd::Edge;
using torch::autograd::Node;

template <typename Ptr, typename... Args>
Ptr make_node(Args&&... args) {
  if constexpr (std::is_same_v<Ptr, std::shared_ptr<Node>>) {
    return Ptr(new SiteNode(std::forward<Args>(args)...), [](auto* node) { deleteNode(node); });
  } else {
    return Ptr(c10::make_intrusive<SiteNode>(std::forward<Args>(args)...));
  }
}

template <typename Ptr, typename AnyNode>
Ptr pointer_to(AnyNode* node) {
  if constexpr (std::is_same_v<Ptr, std::shared_ptr<Node>>) {
    return node->getptr();
  } else {
    return Ptr::reclaim_copy(node);
  }
}

Edge edge_of(const at::Tensor& t) {
  return t.requires_grad() ? torch::autograd::impl::gradient_edge(t) : Edge();
}

SiteNode* node_of(PyObject* self) {
  auto* const function = reinterpret_cast<torch::autograd::THPCppFunction*>(self);
  return static_cast<SiteNode*>(function->cdata.get());
}

PyObject* get_site(PyObject* self, void*) {
  return Py_NewRef(node_of(self)->site->object.ptr(getPyInterpreter()));
}

PyObject* get_shared(PyObject* self, void*) {
  return pybind11::cast(node_of(self)->site).release().ptr();
}

PyObject* get_tap(PyObject* self, void*) {
  return Py_NewRef(node_of(self)->tap.ptr(getPyInterpreter()));
}

PyObject* get_place(PyObject* self, void*) { return PyLong_FromLongLong(node_of(self)->place); }

PyObject* get_saved(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  SiteNode* const node = node_of(self);
  if (!node->reads) return PyTuple_New(0);
  at::Tensor x;
  {
    pybind11::gil_scoped_release no_gil;  // hooks of saved tensors take it
    x = node->x.unpack();
  }
  THPObjectPtr wrapped(THPVariable_Wrap(std::move(x)));
  return PyTuple_Pack(1, wrapped.get());
  END_HANDLE_TH_ERRORS
}

PyObject* get_shape(PyObject* self, void*) {
  const std::vector<int64_t>& shape = node_of(self)->shape;
  PyObject* const sizes = PyTuple_New(static_cast<Py_ssize_t>(shape.size()));
  for (size_t d = 0; d < shape.size(); ++d) {
    PyTuple_SET_ITEM(sizes, static_cast<Py_ssize_t>(d), PyLong_FromLongLong(shape[d]));
  }
  return sizes;
}

// What Python does with a gradient: (gradient of the input, of the function itself).
PyObject* with_gradient = nullptr;

variable_list in_python(SiteNode& node, const NodePtr& self, const at::Tensor& dy) {
  pybind11::gil_scoped_acquire gil;
  if (with_gradient == nullptr) {
    THPObjectPtr module(PyImport_ImportModule("dropinf.capturing.graph"));
    if (module) with_gradient = PyObject_GetAttrString(module.get(), "with_gradient");
  }
  THPObjectPtr wrapped(torch::autograd::functionToPyObject(self));
  THPObjectPtr gradient(THPVariable_Wrap(dy));
  THPObjectPtr pair(with_gradient == nullptr ? nullptr
                                             : PyObject_CallFunctionObjArgs(
                                                   with_gradient, node.tap.ptr(getPyInterpreter()),
                                                   wrapped.get(), gradient.get(), nullptr));
  if (!pair) {
    python_error error;
    error.persist();
    throw std::move(error);
  }
  variable_list grads(3);
  for (const int edge : {kInput, kFunction}) {
    PyObject* const grad = PyTuple_GET_ITEM(pair.get(), edge - 1);
    if (grad != Py_None) grads[edge] = THPVariable_Unpack(grad);
  }
  return grads;
}

}  // namespace

bool Pass::is_running() const {
  const int task = torch::autograd::get_current_graph_task_id();
  return std::find(tasks.begin(), tasks.end(), task) != tasks.end();
}

SiteNode::SiteNode(std::shared_ptr<Site> site, c10::SafePyObject tap, const at::Tensor& x)
    : site(std::move(site)),
      tap(std::move(tap)),
      shape(x.sizes().vec()),
      reads(this->site->reads),
      x(reads ? torch::autograd::SavedVariable(x, false) : torch::autograd::SavedVariable()) {}

at::Tensor SiteNode::attach(std::shared_ptr<Site> site, c10::SafePyObject tap,
                            const at::Tensor& probe, const at::Tensor& x, const at::Tensor& y) {
  NodePtr node = make_node<NodePtr>(std::move(site), std::move(tap), x);
  node->set_next_edges({edge_of(probe), edge_of(x), edge_of(y)});
  // Not a view of y: a later in-place activation would be refused on one.
  at::Tensor out = y.variable_data();
  torch::autograd::set_history(out, node);
  return out;
}

variable_list SiteNode::apply(variable_list&& grads) {
  const at::Tensor& dy = grads[0];
  if (!dy.defined()) return variable_list(3);
  const bool writes = pass != nullptr && !at::GradMode::is_enabled() && pass->is_running() &&
                      site->writes != nullptr && site->writes->takes(dy, pass->rows);
  if (!writes) {
    return in_python(*this, pointer_to<NodePtr, Node>(this), dy);
  }
  pass->streams.enter();
  site->writes->write(reads ? x.unpack() : dy.new_zeros({}).expand(shape), dy, pass->rows);
  wrote = true;
  variable_list found(3);
  if (task_should_compute_output(kFunction)) found[kFunction] = std::move(grads[0]);
  return found;
}

void SiteNode::release_variables() { x.reset_data(); }

PyTypeObject* init_site_nodes() {
  using namespace torch::autograd;  // the macro names functions of it
  static PyGetSetDef properties[] = {
      THP_FUNCTION_DEFAULT_PROPERTIES,
      {"site", get_site, nullptr, nullptr, nullptr},
      {"shared", get_shared, nullptr, nullptr, nullptr},
      {"tap", get_tap, nullptr, nullptr, nullptr},
      {"place", get_place, nullptr, nullptr, nullptr},
      {"saved_tensors", get_saved, nullptr, nullptr, nullptr},
      {"shape", get_shape, nullptr, nullptr, nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr},
  };
  static PyTypeObject type;
  torch::autograd::_initFunctionPyTypeObject(type, "dropinf.SiteNode", properties, nullptr);
  torch::autograd::registerCppFunction(typeid(SiteNode), &type);
  return &type;
}

}  // namespace dropinf
