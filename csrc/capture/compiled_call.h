// What a call of compiled code reaches in its backward pass: the op write_rows, and the sites of
// each call that write their rows by themselves.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "site_node.h"

namespace dropinf {

// One call of compiled code, which knows it by its number.
class CompiledCall {
 public:
  explicit CompiledCall(int64_t number);
  ~CompiledCall();
  CompiledCall(const CompiledCall&) = delete;
  CompiledCall& operator=(const CompiledCall&) = delete;

  // Have those sites write into the rows of a pass that have something to write.
  void begin(Pass* pass, std::vector<std::shared_ptr<const Writes>> writes);
  // Whether the site has written.
  bool write(int64_t site, const at::Tensor& x, const at::Tensor& dy);
  // The sites among those that wrote nothing.
  std::vector<int64_t> silent() const;
  void end();

 private:
  const int64_t number_;
  Pass* pass_ = nullptr;
  std::vector<std::shared_ptr<const Writes>> writes_;
  std::vector<bool> wrote_;
};

}  // namespace dropinf
