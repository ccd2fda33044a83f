// The CUDA kernels checked and timed without torch and Python, should the extension not build:
//
//     nvcc -std=c++17 -O3 -arch=native -Icsrc bench/gpu/kernels.cu csrc/cuda/*.cu
//         csrc/bank_order.cpp -o kernels && ./kernels
//
// Inputs are multiples of 1/8, so that every sum is exact in float32: entries must equal those of a
// plain loop in double, and Cholesky factors, solutions and norms agree to 1e-5 of the largest.
// Then the µs of each kernel beside those of one plain read of what it must read; their ratio is
// the figure to quote. `./kernels --small` takes tiny sizes. It ends with 1 if a check fails.

#include <cstring>

#include "kernels/inverse.cuh"
#include "kernels/measure.cuh"
#include "kernels/outer.cuh"
#include "kernels/rest.cuh"

namespace dropinf {
namespace bench {
namespace {

std::vector<Case> cases(const Pools& pools, bool small) {
  const int64_t most = cuda::kMaxStagedSlots;
  if (small) {
    return {outer(pools, 2, 150, 96, 64, 150, 0),
            outer(pools, 2, 150, 96, 64, 150, most),
            outer(pools, 1, 40, 256, 384, 900, 768),
            gather(pools, 3, 65, 17),
            embedding(pools, 2, 37, 11, 19, 67),
            norm(pools, 2, 70, 40, 60),
            conv(pools, 2, 4, 9, 35, false),
            conv(pools, 2, 4, 9, 35, true),
            gram(pools, 600, 2, 33),
            cholesky(pools, 3, 33, 2),
            topk(pools.scores, 2, 900, 7),
            topk(pools.floats, 3, 700, 5),
            topk(pools.floats, 1, 20000, 5)};
  }
  const int64_t B = 8, T = 2048, I = 4096, O = 4096;
  return {outer(pools, B, T, I, O, 64, 0),
          outer(pools, B, T, I, O, 1024, most),
          outer(pools, B, T, I, O, 8192, most),
          outer(pools, B, T, I, O, 16384, most),
          outer(pools, B, T, I, O, 65536, most),
          gather(pools, 200, 1 << 17, 1024),
          embedding(pools, B, T, 50304, O, 8192),
          norm(pools, B, 1024, 2048, 1024),
          conv(pools, B, 64, 56, 1024, false),
          conv(pools, B, 64, 56, 1024, true),
          gram(pools, 4096, 16, 1024),
          gram(pools, 4096, 1, 1024),
          cholesky(pools, 64, 128, 16),
          cholesky(pools, 64, 256, 16),
          cholesky(pools, 50, 512, 16),
          topk(pools.scores, 16, 1 << 18, 100),
          topk(pools.scores, 1, 1 << 22, 10)};
}

// Whether all are right; a line of each.
bool checked(const std::vector<Case>& all) {
  bool right = true;
  for (const Case& it : all) {
    check(it.run(0), it.name.c_str());
    check(cudaDeviceSynchronize(), it.name.c_str());
    const std::string wrong = it.wrong();
    std::printf("%s %s%s%s\n", wrong.empty() ? "right" : "WRONG", it.name.c_str(),
                wrong.empty() ? "" : ": ", wrong.c_str());
    std::fflush(stdout);
    right = right && wrong.empty();
  }
  return right;
}

int run(bool small) {
  int device = 0;
  cudaDeviceProp properties;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  std::printf("%s, %d SMs\n", properties.name, properties.multiProcessorCount);
  const int blocks = small ? 2 : 8 * properties.multiProcessorCount;
  const int64_t size = small ? 1 << 18 : 1 << 28;
  const Pools pools{{2 * size, 8, blocks}, {size, 8, blocks}, {size / 4, 1 << 22, blocks}};
  bool good = true;
  if (!small) good = checked(cases(pools, true));
  const std::vector<Case> timed = cases(pools, small);
  good = checked(timed) && good;

  Timer timer(pools.halves, blocks, small ? 1 : 15);
  std::printf("%-52s %9s %9s %9s %9s %9s\n", "us", "median", "min", "max", "one read", "ratio");
  for (const Case& it : timed) {
    Times kernel, read;
    timer.time(it, &kernel, &read);
    const double us = kernel.median(), floor = read.median();
    std::printf("%-52s %9.2f %9.2f %9.2f %9.2f %9.2f\n", it.name.c_str(), us, kernel.us.front(),
                kernel.us.back(), floor, us / floor);
    std::fflush(stdout);
  }
  std::printf(good ? "all are right\n" : "NOT all are right\n");
  return good ? 0 : 1;
}

}  // namespace
}  // namespace bench
}  // namespace dropinf

int main(int argc, char** argv) {
  return dropinf::bench::run(argc > 1 && std::strcmp(argv[1], "--small") == 0);
}
