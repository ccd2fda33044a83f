#include "calls.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <memory>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "site_node.h"

namespace dropinf {
namespace {

namespace py = pybind11;

// An argument of a call that was added: the input, a parameter, or a value.
enum class Role { kInput, kParameter, kValue };

struct Argument {
  py::object name;  // of a keyword, or null
  Role role;
  py::object value;  // the parameter or the value
};

struct Call {
  py::object func;
  std::vector<Argument> args;  // positional ones, then keywords
  size_t num_positional;
  // Of the input: what the site's form depends on.
  int64_t dims;
  at::ScalarType dtype;
  at::Device device;
  std::vector<int64_t> trailing;
  bool flat;
  std::shared_ptr<Site> site;
};

// What is kept between captures of one model.
struct CallTable {
  // By the first parameter of the call.
  std::unordered_map<PyObject*, std::vector<std::shared_ptr<const Call>>> calls;

  void add(const py::object& func, const py::tuple& args, const py::dict& kwargs,
           const py::object& input, const py::list& parameters, int64_t num_trailing, bool flat,
           std::shared_ptr<Site> site);
};

// A parameter that meets data in ever new ways is not to fill the memory.
constexpr size_t kMaxCalls = 16;

void CallTable::add(const py::object& func, const py::tuple& args, const py::dict& kwargs,
                    const py::object& input, const py::list& parameters, int64_t num_trailing,
                    bool flat, std::shared_ptr<Site> site) {
  const at::Tensor& x = THPVariable_Unpack(input.ptr());
  const std::vector<int64_t> trailing(x.sizes().end() - num_trailing, x.sizes().end());
  auto call = std::make_shared<Call>(Call{func,
                                          {},
                                          args.size(),
                                          x.dim(),
                                          x.scalar_type(),
                                          x.device(),
                                          trailing,
                                          flat,
                                          std::move(site)});
  PyObject* first = nullptr;
  const auto add = [&](py::object name, py::object value) {
    Role role = value.is(input) ? Role::kInput : Role::kValue;
    for (const py::handle parameter : parameters) {
      if (value.is(parameter)) role = Role::kParameter;
    }
    if (role == Role::kParameter && first == nullptr) first = value.ptr();
    if (role == Role::kInput) value = py::none();  // that of another pass
    call->args.push_back({std::move(name), role, std::move(value)});
  };
  for (const py::handle value : args) add({}, py::reinterpret_borrow<py::object>(value));
  for (const auto& [name, value] : kwargs) {
    add(py::reinterpret_borrow<py::object>(name), py::reinterpret_borrow<py::object>(value));
  }
  if (first == nullptr) return;
  auto& same = calls[first];
  if (same.size() < kMaxCalls) same.push_back(std::move(call));
}

struct Calls {
  PyObject_HEAD           // which ends in its own semicolon
      PyObject* closing;  // with the methods `called`, `noted` and `plausible`
  PyObject* known;
  PyObject* special;     // functions of which every call is shown
  PyObject* describing;  // functions that no parameter meets data in
  PyObject* tap;
  PyObject* forward_ad;  // the module, whose _current_level says whether it is in use
  PyObject* probe;
  PyObject* table_object;
  CallTable* table;                       // of it
  bool froze;                             // whether functions without gradients are to be shown too
  bool shows_all;                         // no call is known, as in a backward pass
  std::unordered_set<PyObject*>* closed;  // parameters that some site has a detached copy of
};

bool is_tensor(PyObject* value) {
  return PyObject_TypeCheck(value, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// The first tensor in a value that is known, or null; also null with an exception set.
PyObject* first_known(const Calls& self, PyObject* value) {
  if (is_tensor(value)) {
    if (!THPVariable_Unpack(value).requires_grad()) return nullptr;
    THPObjectPtr id(PyLong_FromVoidPtr(value));
    return id && PyDict_GetItemWithError(self.known, id.get()) != nullptr ? value : nullptr;
  }
  if (PyTuple_Check(value) || PyList_Check(value)) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i) {
      PyObject* const found = first_known(self, PySequence_Fast_GET_ITEM(value, i));
      if (found != nullptr) return found;
    }
  } else if (PyDict_Check(value)) {
    Py_ssize_t place = 0;
    PyObject *key, *item;
    while (PyDict_Next(value, &place, &key, &item)) {
      PyObject* const found = first_known(self, item);
      if (found != nullptr) return found;
    }
  }
  return nullptr;
}

// Whether functions are being transformed, or what they save is packed away: Python sees to it.
bool is_plain_autograd(const Calls& self) {
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      at::SavedTensorDefaultHooks::get_hooks(true).has_value()) {
    return false;
  }
  THPObjectPtr level(PyObject_GetAttrString(self.forward_ad, "_current_level"));
  if (!level) throw python_error();
  return PyLong_AsLong(level.get()) < 0;
}

bool takes_input(const Call& call, PyObject* value) {
  if (!THPVariable_CheckExact(value)) return false;
  const at::Tensor& x = THPVariable_Unpack(value);
  if (x.dim() != call.dims || x.scalar_type() != call.dtype || x.device() != call.device ||
      x.layout() != at::kStrided) {
    return false;
  }
  const int64_t n = static_cast<int64_t>(call.trailing.size());
  for (int64_t d = 0; d < n; ++d) {
    if (x.size(call.dims - n + d) != call.trailing[d]) return false;
  }
  return true;
}

bool takes_value(PyObject* wanted, PyObject* value) {
  if (wanted == value) {
    return !is_tensor(value) || !THPVariable_Unpack(value).requires_grad();
  }
  if (is_tensor(value) || Py_TYPE(wanted) != Py_TYPE(value)) return false;
  const int same = PyObject_RichCompareBool(wanted, value, Py_EQ);
  if (same < 0) throw python_error();
  return same == 1;
}

// The input of a call that is as it was added; null if it is another.
PyObject* input_of(const Calls& self, const Call& call, PyObject* func, PyObject* args,
                   PyObject* kwargs) {
  const size_t num_keywords = kwargs == nullptr ? 0 : PyDict_GET_SIZE(kwargs);
  if (call.func.ptr() != func || call.num_positional != size_t(PyTuple_GET_SIZE(args)) ||
      call.args.size() != call.num_positional + num_keywords) {
    return nullptr;
  }
  PyObject* input = nullptr;
  for (size_t i = 0; i < call.args.size(); ++i) {
    const Argument& argument = call.args[i];
    PyObject* const value = i < call.num_positional
                                ? PyTuple_GET_ITEM(args, static_cast<Py_ssize_t>(i))
                                : PyDict_GetItemWithError(kwargs, argument.name.ptr());
    if (value == nullptr) return nullptr;
    switch (argument.role) {
      case Role::kInput:
        if (!takes_input(call, value)) return nullptr;
        input = value;
        break;
      case Role::kParameter:
        // Neither one that was hooked, nor frozen.
        if (value != argument.value.ptr() || first_known(self, value) == nullptr) return nullptr;
        break;
      case Role::kValue:
        if (!takes_value(argument.value.ptr(), value)) return nullptr;
        break;
    }
  }
  if (input == nullptr || first_known(self, input) != nullptr) return nullptr;
  const at::Tensor& x = THPVariable_Unpack(input);
  if (x.requires_grad()) return input;
  THPObjectPtr answer(
      PyObject_CallMethod(self.closing, "plausible", "OO", input, call.flat ? Py_True : Py_False));
  if (!answer) throw python_error();
  return answer.get() == Py_True ? input : nullptr;
}

// The same memory and version, without a gradient.
PyObject* detached(PyObject* parameter) {
  c10::TensorImpl* const impl = THPVariable_Unpack(parameter).unsafeGetTensorImpl();
  return THPVariable_Wrap(at::Tensor(
      impl->shallow_copy_and_detach(impl->version_counter(), /*allow_metadata_change=*/false)));
}

PyObject* run_closed(Calls& self, const Call& call, PyObject* args, PyObject* kwargs,
                     PyObject* input) {
  THPObjectPtr new_args(PyTuple_New(static_cast<Py_ssize_t>(call.num_positional)));
  THPObjectPtr new_kwargs(kwargs == nullptr ? nullptr : PyDict_Copy(kwargs));
  if (!new_args || (kwargs != nullptr && !new_kwargs)) throw python_error();
  for (size_t i = 0; i < call.args.size(); ++i) {
    const Argument& argument = call.args[i];
    const bool is_parameter = argument.role == Role::kParameter;
    if (is_parameter) self.closed->insert(argument.value.ptr());
    if (i >= call.num_positional) {
      if (!is_parameter) continue;
      THPObjectPtr value(detached(argument.value.ptr()));
      if (PyDict_SetItem(new_kwargs.get(), argument.name.ptr(), value.get()) < 0) {
        throw python_error();
      }
      continue;
    }
    const auto place = static_cast<Py_ssize_t>(i);
    PyObject* const value =
        is_parameter ? detached(argument.value.ptr()) : Py_NewRef(PyTuple_GET_ITEM(args, place));
    PyTuple_SET_ITEM(new_args.get(), place, value);
  }
  THPObjectPtr result(PyObject_Call(call.func.ptr(), new_args.get(), new_kwargs.get()));
  if (!result) throw python_error();
  return THPVariable_Wrap(SiteNode::attach(
      call.site, c10::SafePyObject(Py_NewRef(self.tap), getPyInterpreter()),
      THPVariable_Unpack(self.probe), THPVariable_Unpack(input), THPVariable_Unpack(result.get())));
}

PyObject* call_function(PyObject* self_object, PyObject* packed, PyObject*) {
  HANDLE_TH_ERRORS
  Calls& self = *reinterpret_cast<Calls*>(self_object);
  PyObject *func = nullptr, *types = nullptr, *args = nullptr, *kwargs = nullptr;
  if (!PyArg_UnpackTuple(packed, "__torch_function__", 2, 4, &func, &types, &args, &kwargs)) {
    return nullptr;
  }
  THPObjectPtr none(args == nullptr ? PyTuple_New(0) : nullptr);
  if (args == nullptr) args = none.get();
  if (kwargs == Py_None || (kwargs != nullptr && PyDict_GET_SIZE(kwargs) == 0)) kwargs = nullptr;
  const bool grad = at::GradMode::is_enabled();
  const int special = PySet_Contains(self.special, func);
  if (special < 0) throw python_error();
  PyObject* known = nullptr;
  bool shown = !grad && (special == 1 || self.froze);
  if (grad) {
    known = first_known(self, args);
    if (known == nullptr && kwargs != nullptr) known = first_known(self, kwargs);
    if (PyErr_Occurred() != nullptr) throw python_error();
    shown = known != nullptr;
    if (shown && special == 0) {
      const int describes = PySet_Contains(self.describing, func);
      if (describes < 0) throw python_error();
      shown = describes == 0;
    }
  }
  const bool noted = grad && special == 1 && !shown;
  if (!shown && !noted) return PyObject_Call(func, args, kwargs);
  if (known != nullptr && !self.shows_all) {
    const auto found = self.table->calls.find(known);
    if (found != self.table->calls.end() && is_plain_autograd(self)) {
      for (const auto& call : found->second) {
        PyObject* const input = input_of(self, *call, func, args, kwargs);
        if (input != nullptr) {
          const std::shared_ptr<const Call> kept = call;  // Python may clear the table meanwhile
          return run_closed(self, *kept, args, kwargs, input);
        }
      }
    }
  }
  THPObjectPtr empty(kwargs == nullptr ? PyDict_New() : nullptr);
  THPObjectPtr called(PyObject_GetAttrString(self.closing, noted ? "noted" : "called"));
  if (!called) throw python_error();
  return PyObject_CallFunctionObjArgs(called.get(), func, args,
                                      kwargs == nullptr ? empty.get() : kwargs, nullptr);
  END_HANDLE_TH_ERRORS
}

int init(PyObject* self_object, PyObject* args, PyObject*) {
  Calls& self = *reinterpret_cast<Calls*>(self_object);
  PyObject *closing, *table, *known, *special, *describing, *tap, *probe;
  int froze;
  if (!PyArg_ParseTuple(args, "OOO!OOOOp", &closing, &table, &PyDict_Type, &known, &special,
                        &describing, &tap, &probe, &froze)) {
    return -1;
  }
  self.forward_ad = PyImport_ImportModule("torch.autograd.forward_ad");
  if (self.forward_ad == nullptr) return -1;
  self.table = py::handle(table).cast<CallTable*>();
  self.table_object = Py_NewRef(table);
  self.closing = Py_NewRef(closing);
  self.known = Py_NewRef(known);
  self.special = Py_NewRef(special);
  self.describing = Py_NewRef(describing);
  self.tap = Py_NewRef(tap);
  self.probe = Py_NewRef(probe);
  self.froze = froze != 0;
  self.closed = new std::unordered_set<PyObject*>();
  return 0;
}

int traverse(PyObject* self_object, visitproc visit, void* arg) {
  const Calls& self = *reinterpret_cast<Calls*>(self_object);
  Py_VISIT(Py_TYPE(self_object));
  Py_VISIT(self.closing);
  Py_VISIT(self.table_object);
  Py_VISIT(self.known);
  Py_VISIT(self.special);
  Py_VISIT(self.describing);
  Py_VISIT(self.tap);
  Py_VISIT(self.probe);
  return 0;
}

int clear(PyObject* self_object) {
  Calls& self = *reinterpret_cast<Calls*>(self_object);
  Py_CLEAR(self.closing);
  Py_CLEAR(self.table_object);
  Py_CLEAR(self.known);
  Py_CLEAR(self.special);
  Py_CLEAR(self.describing);
  Py_CLEAR(self.tap);
  Py_CLEAR(self.probe);
  Py_CLEAR(self.forward_ad);
  delete std::exchange(self.closed, nullptr);
  return 0;
}

void dealloc(PyObject* self_object) {
  PyTypeObject* const type = Py_TYPE(self_object);
  PyObject_GC_UnTrack(self_object);
  clear(self_object);
  type->tp_free(self_object);
  Py_DECREF(type);
}

PyObject* show_all(PyObject* self, PyObject* value) {
  reinterpret_cast<Calls*>(self)->shows_all = value == Py_True;
  Py_RETURN_NONE;
}

PyObject* has_closed(PyObject* self, PyObject* parameter) {
  return PyBool_FromLong(reinterpret_cast<Calls*>(self)->closed->count(parameter) != 0);
}

PyMethodDef methods[] = {
    {"has_closed", has_closed, METH_O, "Whether a known call had a detached copy of a parameter."},
    {"show_all", show_all, METH_O, "Whether every call of what is known is to be shown."},
    {nullptr, nullptr, 0, nullptr},
};

// As a bound method has it, which torch asks for.
PyObject* get_self(PyObject* self, void*) {
  PyObject* const closing = reinterpret_cast<Calls*>(self)->closing;
  return Py_NewRef(closing == nullptr ? Py_None : closing);
}

PyGetSetDef properties[] = {
    {"__self__", get_self, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(init)},
    {Py_tp_call, reinterpret_cast<void*>(call_function)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {0, nullptr},
};
PyType_Spec spec = {"dropinf._C.Calls", sizeof(Calls), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                    slots};

}  // namespace

void init_calls(py::module_& m) {
  py::class_<CallTable>(m, "CallTable")
      .def(py::init<>())
      .def("add", &CallTable::add)
      .def("clear", [](CallTable& table) { table.calls.clear(); })
      .def("__len__", [](const CallTable& table) { return table.calls.size(); });
  m.add_object("Calls", py::reinterpret_steal<py::object>(PyType_FromSpec(&spec)));
}

}  // namespace dropinf
