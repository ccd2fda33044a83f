// The times of kernels beside those of a plain read.

#pragma once

#include "inputs.cuh"

namespace dropinf {
namespace bench {

// One read of so many times 16 bytes, of which a thread has four in flight.
__global__ void __launch_bounds__(kThreads)
    read_kernel(const float* from, int64_t vectors, float* never) {
  constexpr int kLoads = 4;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  float sum = 0.0f;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; n < vectors;
       n += kLoads * step) {
    float values[kLoads][4] = {};
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (n + k * step < vectors) cuda::load_4(from + 4 * (n + k * step), values[k]);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      sum += values[k][0] + values[k][1] + values[k][2] + values[k][3];
    }
  }
  if (sum == 0x1.23456p100f) *never = sum;  // so that the reads are not left out
}

struct Times {
  std::vector<double> us;
  double median() {
    std::sort(us.begin(), us.end());
    return us[us.size() / 2];
  }
};

class Timer {
 public:
  // `pool` is what is read; `blocks` of a grid fill the device.
  Timer(const Pool<BFloat16>& pool, int blocks, int rounds)
      : pool_(pool), blocks_(blocks), rounds_(rounds), never_(1) {
    check(cudaEventCreate(&first_), "cudaEventCreate");
    check(cudaEventCreate(&last_), "cudaEventCreate");
  }
  ~Timer() {
    cudaEventDestroy(first_);
    cudaEventDestroy(last_);
  }
  Timer(const Timer&) = delete;

  // Rounds of the kernel and of a plain read in turn, after one of each to warm up.
  void time(const Case& it, Times* kernel, Times* read) {
    const auto plain = [&](int64_t turn) { return read_at(turn, it.num_bytes); };
    const double once = round(it.run, 1);
    round(plain, 1);
    const int turns = static_cast<int>(std::min(32.0, std::max(2.0, 1000.0 / once)));
    for (int n = 0; n < rounds_; ++n) {
      kernel->us.push_back(round(it.run, turns));
      read->us.push_back(round(plain, turns));
    }
  }

 private:
  cudaError_t read_at(int64_t turn, int64_t num_bytes) {
    const int64_t most = static_cast<int64_t>(pool_.num_bytes());
    const int64_t vectors = std::min(num_bytes, most) / 16;
    const auto* from = reinterpret_cast<const float*>(pool_.data() + pool_.at(turn, 8 * vectors));
    return cuda::launch(read_kernel, dim3(blocks_), kThreads, 0, cudaStream_t{}, from, vectors,
                        never_.data());
  }

  // The µs of one call. While all of the pool is read, the host is ahead with launches.
  double round(const std::function<cudaError_t(int64_t)>& run, int turns) {
    check(read_at(0, static_cast<int64_t>(pool_.num_bytes())), "read");
    check(cudaEventRecord(first_, cudaStream_t{}), "cudaEventRecord");
    for (int n = 0; n < turns; ++n) check(run(++turn_), "launch");
    check(cudaEventRecord(last_, cudaStream_t{}), "cudaEventRecord");
    check(cudaEventSynchronize(last_), "cudaEventSynchronize");
    float ms = 0.0f;
    check(cudaEventElapsedTime(&ms, first_, last_), "cudaEventElapsedTime");
    return 1e3 * ms / turns;
  }

  const Pool<BFloat16>& pool_;
  int blocks_, rounds_;
  Device<float> never_;
  cudaEvent_t first_, last_;
  int64_t turn_ = 0;
};

}  // namespace bench
}  // namespace dropinf
