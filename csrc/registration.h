// How an op is registered, in the file that bears its name: its schema and a fake, then its
// implementations for tensors on CPUs and, where DROPINF_CUDA is defined, on GPUs.
//
// tests/cuda_host builds these files with DROPINF_CUDA_ON_HOST, as torch.ops.dropinf_host: what is
// for GPUs then takes tensors on CPUs, and what is for CPUs is left out.

#pragma once

#include <torch/library.h>

#include <cstring>
#include <string>

#ifdef DROPINF_CUDA_ON_HOST
#define DROPINF_LIBRARY dropinf_host
#define DROPINF_CUDA_KEY CPU
#else
#define DROPINF_LIBRARY dropinf
#define DROPINF_CUDA_KEY CUDA
#endif

namespace dropinf {

// The fake of every op: they return nothing, and write into tensors whose shapes are known. One
// input on meta is enough to come here; an output with memory is then one that stays unwritten.
inline void do_nothing(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::IValue& last = stack->back();
  TORCH_CHECK_VALUE(!last.isTensor() || last.toTensor().is_meta(), op.schema().name(),
                    ": all tensors must be on ", last.toTensor().device(), ", got one on meta");
  torch::jit::drop(*stack, op.schema().arguments().size());
}

inline void define(torch::Library& m, const char* schema) {
  m.def(schema);
  const std::string name(schema, std::strcspn(schema, "("));
  m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::Meta,
                                       torch::CppFunction::makeFromBoxedFunction<&do_nothing>()));
}

}  // namespace dropinf
