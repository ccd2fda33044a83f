// The schemas of the ops, and what implements them on CUDA.

#pragma once

#include <torch/library.h>

namespace dropinf {

inline void define_ops(torch::Library& m) {
  m.def(
      "sampled_outer(Tensor x, Tensor dy, Tensor o_idx, Tensor i_idx, Tensor? sign, bool bias, "
      "float scale, Tensor[] order, Tensor(a!) out) -> ()");
  m.def(
      "sampled_embedding(Tensor ids, Tensor dy, Tensor o_idx, Tensor i_idx, float scale, "
      "Tensor(a!) out) -> ()");
  m.def(
      "sampled_conv(Tensor x, Tensor dy, Tensor o_idx, Tensor i_idx, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, int groups, bool bias, float scale, "
      "Tensor(a!) out) -> ()");
  m.def("gram(Tensor rows, Tensor offsets, float scale, bool accumulate, Tensor(a!) out) -> ()");
  m.def(
      "damped_cholesky(Tensor matrices, Tensor offsets, Tensor shift, Tensor? rows, "
      "Tensor(a!) out, Tensor(b!) info, Tensor(c!)? solved) -> ()");
  m.def("cholesky_solve(Tensor factors, Tensor offsets, Tensor rows, Tensor(a!) out) -> ()");
  m.def(
      "gather_grads(Tensor?[] grads, Tensor[] indices, Tensor?[] signs, float[] scales, "
      "Tensor(a!) out) -> ()");
  m.def("score_topk(Tensor scores, int first, Tensor(a!) values, Tensor(b!) indices) -> ()");
}

// In cuda/bindings.cpp.
void implement_cuda_ops(torch::Library& m);

}  // namespace dropinf
