// For tests: the stream of a kernel that runs on the host.

#pragma once

#include <cuda_runtime.h>

namespace c10::cuda {
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
}  // namespace c10::cuda
