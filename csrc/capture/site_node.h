// The node that a call in closed form leaves in autograd's graph; the Python twin is `Output` in
// dropinf/capturing/graph.py.

#pragma once

#include <Python.h>
#include <c10/core/SafePyObject.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <string>
#include <vector>

#include "streams.h"
#include "writes.h"

namespace dropinf {

using torch::autograd::variable_list;
using NodePtr = decltype(torch::autograd::Edge::function);  // intrusive_ptr, before 2.12 shared_ptr

// What all calls of one site share.
struct Site {
  c10::SafePyObject object;  // a FormSite
  int64_t kind;              // the same for sites that a walk cannot tell apart
  bool reads;                // whether rows depend on the input
  std::shared_ptr<const Writes> writes;
};

// One backward pass of `rows` over all losses, in which some nodes write by themselves.
struct Pass {
  std::vector<int> tasks;  // autograd's numbers of it
  at::Tensor rows;
  Streams streams;
  bool is_running() const;
};

class SiteNode : public torch::autograd::Node {
 public:
  SiteNode(std::shared_ptr<Site> site, c10::SafePyObject tap, const at::Tensor& x);

  // y, with such a node as its grad_fn.
  static at::Tensor attach(std::shared_ptr<Site> site, c10::SafePyObject tap,
                           const at::Tensor& probe, const at::Tensor& x, const at::Tensor& y);

  variable_list apply(variable_list&& grads) override;
  void release_variables() override;
  std::string name() const override { return "dropinf::SiteNode"; }

  const std::shared_ptr<Site> site;
  const c10::SafePyObject tap;
  const std::vector<int64_t> shape;  // of the input
  const bool reads;
  torch::autograd::SavedVariable x;
  const void* trace = nullptr;  // the last one that it was in, as long as that one lives
  int64_t place = -1;           // among the sites of it
  Pass* pass = nullptr;         // in which it writes by itself
  bool wrote = false;           // in that pass
};

constexpr int kProbe = 0, kInput = 1, kFunction = 2;  // a node's edges

// Gives nodes of this class a Python type with `site`, `shared`, `tap`, `place`, `saved_tensors`,
// `shape`.
PyTypeObject* init_site_nodes();

}  // namespace dropinf
