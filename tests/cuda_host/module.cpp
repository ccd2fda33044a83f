// What the tests set of torch.ops.dropinf_host, the CUDA ops for CPU tensors: see registration.h.

#include <cuda_runtime.h>
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(dropinf_host, m) {
  m.def("set_max_shared_bytes",
        [](int64_t n) { host_execution::max_shared_bytes = static_cast<int>(n); });
}
