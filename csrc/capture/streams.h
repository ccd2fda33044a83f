// Streams: a node works on the stream of its forward pass, which may not be that on which rows were
// asked for. It then waits for what made the rows' memory, and whoever asked for what it writes.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace dropinf {

class Streams {
 public:
  // Rows are asked for on the current stream.
  void begin(const at::Tensor& rows) {
    others_.clear();
    asking_.reset();
    if (!rows.is_cuda()) return;
    guard_.emplace(rows.device().type());
    asking_ = guard_->getStream(rows.device());
  }

  // Something will be written on the current stream.
  void enter() {
    if (!asking_) return;
    const c10::Stream here = guard_->getStream(asking_->device());
    if (here == *asking_ || std::find(others_.begin(), others_.end(), here) != others_.end()) {
      return;
    }
    others_.push_back(here);
    order(*asking_, here);
  }

  // All is written.
  void end() {
    for (const c10::Stream& other : others_) order(other, *asking_);
    others_.clear();
    asking_.reset();
  }

 private:
  static void order(const c10::Stream& before, const c10::Stream& after) {
    c10::Event event(before.device_type());
    event.record(before);
    event.block(after);
  }

  std::optional<c10::impl::VirtualGuardImpl> guard_;
  std::optional<c10::Stream> asking_;
  std::vector<c10::Stream> others_;
};

}  // namespace dropinf
