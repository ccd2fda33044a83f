#include "compiled_call.h"

#include <ATen/ATen.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_map>
#include <utility>

namespace dropinf {
namespace {

std::mutex mutex;

std::unordered_map<int64_t, CompiledCall*>& calls() {
  static std::unordered_map<int64_t, CompiledCall*> calls;
  return calls;
}

// In Python: write_in_python(x, dy, number, site), which may refuse.
void in_python(const at::Tensor& x, const at::Tensor& dy, int64_t number, int64_t site) {
  pybind11::gil_scoped_acquire gil;
  static PyObject* write = nullptr;
  if (write == nullptr) {
    THPObjectPtr module(PyImport_ImportModule("dropinf.capturing.compiled.sites"));
    if (module) write = PyObject_GetAttrString(module.get(), "write_in_python");
  }
  THPObjectPtr input(THPVariable_Wrap(x)), gradient(THPVariable_Wrap(dy));
  THPObjectPtr done(write == nullptr ? nullptr
                                     : PyObject_CallFunction(write, "OOLL", input.get(),
                                                             gradient.get(), number, site));
  if (!done) {
    python_error error;
    error.persist();
    throw std::move(error);
  }
}

at::Tensor nothing(const at::Tensor& dy) { return at::zeros({}, dy.options().dtype(at::kFloat)); }

at::Tensor write_rows(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& call,
                      int64_t site) {
  const int64_t number = *call.const_data_ptr<int64_t>();
  CompiledCall* found = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto at = calls().find(number);
    if (at != calls().end()) found = at->second;
  }
  if (found == nullptr || !found->write(site, x, dy)) in_python(x, dy, number, site);
  return nothing(dy);
}

at::Tensor write_rows_meta(const at::Tensor&, const at::Tensor& dy, const at::Tensor&, int64_t) {
  return nothing(dy);
}

TORCH_LIBRARY_FRAGMENT(dropinf, m) {
  // A recorded CUDA graph would not come back here.
  m.def("write_rows(Tensor x, Tensor dy, Tensor call, int site) -> Tensor",
        {at::Tag::cudagraph_unsafe});
}

TORCH_LIBRARY_IMPL(dropinf, CompositeExplicitAutograd, m) { m.impl("write_rows", &write_rows); }

TORCH_LIBRARY_IMPL(dropinf, Meta, m) { m.impl("write_rows", &write_rows_meta); }

}  // namespace

CompiledCall::CompiledCall(int64_t number) : number_(number) {
  const std::lock_guard<std::mutex> lock(mutex);
  calls()[number] = this;
}

CompiledCall::~CompiledCall() {
  const std::lock_guard<std::mutex> lock(mutex);
  calls().erase(number_);
}

void CompiledCall::begin(Pass* pass, std::vector<std::shared_ptr<const Writes>> writes) {
  pass_ = pass;
  writes_ = std::move(writes);
  wrote_.assign(writes_.size(), false);
}

bool CompiledCall::write(int64_t site, const at::Tensor& x, const at::Tensor& dy) {
  if (pass_ == nullptr || at::GradMode::is_enabled() || !pass_->is_running()) return false;
  const auto& writes = writes_.at(site);
  if (writes == nullptr || wrote_[site] || !writes->takes(dy, pass_->rows)) return false;
  pass_->streams.enter();
  writes->write(x, dy, pass_->rows);
  wrote_[site] = true;
  return true;
}

std::vector<int64_t> CompiledCall::silent() const {
  std::vector<int64_t> found;
  for (size_t k = 0; k < writes_.size(); ++k) {
    if (writes_[k] != nullptr && !wrote_[k]) found.push_back(static_cast<int64_t>(k));
  }
  return found;
}

void CompiledCall::end() { begin(nullptr, {}); }

}  // namespace dropinf
