// Layers on their way to a kernel, as its arguments: nothing is copied to the device first, and a
// CUDA graph can replay the launch.

#pragma once

#include "cuda/common.cuh"

namespace dropinf {
namespace cuda {

// How many layers a kernel's arguments have room for, with 128 bytes beside the table.
template <typename Layer>
constexpr int kMostLayers = static_cast<int>((kMaxArgumentBytes - 128) / sizeof(Layer));

template <typename Layer, int kSize>
struct LayerTable {
  static_assert(kSize <= kMostLayers<Layer>, "a kernel has no more arguments");
  Layer layers[kSize];
  int count = 0;

  bool full() const { return count == kSize; }
  void add(const Layer& layer) { layers[count++] = layer; }

  // The last layer whose `first` is not behind `index`; that of the first layer is 0.
  template <typename Index>
  __device__ int last_from(Index index) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (layers[middle].first <= index) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

}  // namespace cuda
}  // namespace dropinf
