#include "trace.h"

#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/python_anomaly_mode.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <typeinfo>
#include <unordered_map>
#include <utility>

namespace dropinf {
namespace {

namespace py = pybind11;
using torch::autograd::Node;

class Writer {
 public:
  explicit Writer(std::string& bytes) : bytes_(bytes) {}
  void operator()(int64_t value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

 private:
  std::string& bytes_;
};

int64_t address_of(const void* p) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(p)); }

// What Python noted of a node; making sure that there is a dictionary is what asking costs.
PyObject* notes_of(Node& node) {
  return static_cast<torch::autograd::PyAnomalyMetadata*>(node.metadata())->dict();
}

// The class is hidden in torch's library, so that no cast to it can be linked.
bool made_by_python(const Node& node) {
  return std::strstr(typeid(node).name(), "6PyNode") != nullptr;
}

}  // namespace

Trace::Trace(const at::Tensor& losses, const py::dict& numbers, const py::object& tap) {
  Writer add(signature_);
  std::unordered_map<Node*, int64_t> place;
  const auto number = [&](const NodePtr& node) {
    const auto [found, is_new] = place.try_emplace(node.get(), place.size());
    if (is_new) nodes_.push_back(node);
    return found->second;
  };
  bool known = losses.grad_fn() != nullptr;
  if (known) number(losses.grad_fn());
  add(losses.output_nr());
  for (size_t i = 0; known && i < nodes_.size(); ++i) {
    Node& node = *nodes_[i];
    auto* const site = dynamic_cast<SiteNode*>(&node);
    const auto& edges = node.next_edges();
    size_t first = 0, last = edges.size();
    if (site != nullptr) {
      site->trace = this;  // even if an earlier one, of a pass that failed, is still there
      site->place = static_cast<int64_t>(sites_.size());
      sites_.push_back(site);
      site_places_.push_back(static_cast<int64_t>(i));
      add(-1);
      add(site->site->kind);
      add(site->tap.ptr(getPyInterpreter()) == tap.ptr());
      first = kInput, last = kInput + 1;  // past the function itself
    } else if (auto* const leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(&node)) {
      add(-2);
      const py::handle variable(THPVariable_Wrap(leaf->variable));
      const py::int_ id(address_of(variable.ptr()));
      add(numbers.contains(id) ? numbers[id].cast<int64_t>() : -1);
      variable.dec_ref();
    } else if (made_by_python(node)) {
      add(-3);
      const py::object object = this->node(static_cast<int64_t>(i));
      add(address_of(Py_TYPE(object.ptr())));
      in_python_.push_back(static_cast<int64_t>(i));
    } else {
      add(address_of(&typeid(node)));
    }
    if (PyDict_GET_SIZE(notes_of(node)) != 0 &&
        (in_python_.empty() || in_python_.back() != static_cast<int64_t>(i))) {
      add(-4);
      in_python_.push_back(static_cast<int64_t>(i));
    }
    for (size_t e = first; e < last; ++e) {
      add(edges[e].is_valid() ? number(edges[e].function) : -1);
      add(edges[e].input_nr);
    }
    add(-5);
    for (uint32_t nr = 0; nr < node.num_inputs(); ++nr) {
      const auto& metadata = node.input_metadata(nr);
      if (metadata.was_default_constructed()) {
        add(-6);
        continue;
      }
      if (metadata.is_nested_tensor() || metadata.is_tensor_subclass()) {
        known = false;
        break;
      }
      for (const auto& size : metadata.shape_as_dim_vector()) {
        const auto known_size = size.maybe_as_int();
        known &= known_size.has_value();
        add(known_size.value_or(-1));
      }
      add(static_cast<int64_t>(c10::typeMetaToScalarType(metadata.options().dtype())));
      add(-7);
    }
  }
  if (!known) signature_.clear();
}

py::object Trace::node(int64_t i) const {
  return py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(nodes_.at(i)));
}

py::list Trace::sites() const {
  py::list found;
  for (const int64_t i : site_places_) found.append(node(i));
  return found;
}

std::vector<bool> Trace::begin(const at::Tensor& rows, const std::vector<bool>& may_write) {
  pass_.rows = rows;
  pass_.tasks.clear();
  pass_.streams.begin(rows);
  std::vector<bool> will(sites_.size());
  for (size_t k = 0; k < sites_.size(); ++k) {
    sites_[k]->wrote = false;
    will[k] = may_write.at(k) && sites_[k]->site->writes != nullptr;
    sites_[k]->pass = will[k] ? &pass_ : nullptr;
  }
  return will;
}

void Trace::begin_call(const std::shared_ptr<CompiledCall>& call,
                       std::vector<std::shared_ptr<const Writes>> writes) {
  calls_.push_back(call);
  call->begin(&pass_, std::move(writes));
}

std::vector<int64_t> Trace::silent() const {
  std::vector<int64_t> found;
  for (size_t k = 0; k < sites_.size(); ++k) {
    if (sites_[k]->pass != nullptr && !sites_[k]->wrote) found.push_back(static_cast<int64_t>(k));
  }
  return found;
}

void Trace::end() {
  for (SiteNode* const site : sites_) {
    if (site->trace != this) continue;
    site->trace = nullptr;
    site->pass = nullptr;
    site->place = -1;
  }
  for (const auto& call : calls_) call->end();
  calls_.clear();
  pass_.streams.end();
  pass_.rows = at::Tensor();
  pass_.tasks.clear();
}

}  // namespace dropinf
