// Trace: what autograd's graph below some losses looks like, so that a walk need not be made twice.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "compiled_call.h"
#include "site_node.h"

namespace dropinf {

class Trace {
 public:
  // `numbers` has the number of each parameter, by its id. Sites of another tap than this one may
  // be in the graph, which is another graph then.
  Trace(const at::Tensor& losses, const pybind11::dict& numbers, const pybind11::object& tap);
  ~Trace() { end(); }
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  // Equal for graphs of the same functions on the same shapes with the same sites, in which the
  // same parameters are leaves; empty for one that it cannot tell from others.
  pybind11::bytes signature() const { return pybind11::bytes(signature_); }
  // The nodes that Python made, with functions of its own or with notes of what a call did.
  const std::vector<int64_t>& in_python() const { return in_python_; }
  int64_t num_nodes() const { return static_cast<int64_t>(nodes_.size()); }
  pybind11::object node(int64_t i) const;
  pybind11::list sites() const;

  // Have the sites that `may_write` write into `rows` in a pass; returns which of them will.
  std::vector<bool> begin(const at::Tensor& rows, const std::vector<bool>& may_write);
  // The same for the sites of a call of compiled code, each with what it writes or nothing.
  void begin_call(const std::shared_ptr<CompiledCall>& call,
                  std::vector<std::shared_ptr<const Writes>> writes);
  // The pass, or a part of it, has this number in autograd.
  void started(int task) { pass_.tasks.push_back(task); }
  // The sites among those that wrote nothing.
  std::vector<int64_t> silent() const;
  void end();

 private:
  std::vector<NodePtr> nodes_;
  std::vector<SiteNode*> sites_;
  std::vector<int64_t> site_places_;  // among the nodes
  std::vector<int64_t> in_python_;
  std::string signature_;
  std::vector<std::shared_ptr<CompiledCall>> calls_;
  Pass pass_;
};

}  // namespace dropinf
