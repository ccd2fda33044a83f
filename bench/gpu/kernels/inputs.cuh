// Arrays of the device, and numbers that both sides know.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/common.cuh"

namespace dropinf {
namespace bench {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// An array of the device, which starts as NaN. Copies share it.
template <typename T>
class Device {
 public:
  explicit Device(int64_t size) : size_(size) {
    void* data = nullptr;
    check(cudaMalloc(&data, num_bytes()), "cudaMalloc");
    data_.reset(static_cast<T*>(data), cudaFree);
    check(cudaMemset(data, 0xff, num_bytes()), "cudaMemset");
  }
  explicit Device(const std::vector<T>& values) : Device(static_cast<int64_t>(values.size())) {
    check(cudaMemcpy(data(), values.data(), num_bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }

  T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  size_t num_bytes() const { return static_cast<size_t>(size_) * sizeof(T); }
  std::vector<T> on_host() const {
    std::vector<T> values(static_cast<size_t>(size_));
    check(cudaMemcpy(values.data(), data(), num_bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  int64_t size_;
  std::shared_ptr<T> data_;
};

// A multiple of 1 / steps in [-1, 1], by the last steps of MurmurHash3.
__host__ __device__ inline float number(int64_t n, int steps) {
  uint32_t h = static_cast<uint32_t>(n) * 0x9e3779b9u + static_cast<uint32_t>(n >> 32);
  h = (h ^ h >> 16) * 0x85ebca6bu;
  h = (h ^ h >> 13) * 0xc2b2ae35u;
  h ^= h >> 16;
  const int step = static_cast<int>(h % static_cast<uint32_t>(2 * steps + 1)) - steps;
  return static_cast<float>(step) / static_cast<float>(steps);
}

__device__ inline void put(float value, float* to) { *to = value; }
__device__ inline void put(float value, BFloat16* to) {
  to->bits = static_cast<uint16_t>(__float_as_uint(value) >> 16);  // the rest is 0 for eighths
}

constexpr int kThreads = 256;

template <typename E>
__global__ void __launch_bounds__(kThreads) fill_kernel(E* to, int64_t size, int steps) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; n < size; n += step) {
    put(number(n, steps), to + n);
  }
}

// Numbers in memory larger than the L2 cache, of which inputs are slices: input set `turn` lies
// behind the one before, until all is used.
template <typename E>
class Pool {
 public:
  Pool(int64_t size, int steps, int blocks) : steps_(steps), data_(size) {
    const auto error = cuda::launch(fill_kernel<E>, dim3(blocks), kThreads, 0, cudaStream_t{},
                                    data_.data(), size, steps);
    check(error, "fill");
  }

  const E* data() const { return data_.data(); }
  size_t num_bytes() const { return data_.num_bytes(); }
  double operator[](int64_t n) const { return number(n, steps_); }
  int64_t at(int64_t turn, int64_t length) const {
    const int64_t pitch = cuda::ceil_div<int64_t>(length, 64) * 64;
    const int64_t sets = data_.size() / pitch;
    if (sets == 0) check(cudaErrorInvalidValue, "a pool is smaller than its inputs");
    return turn % sets * pitch;
  }

 private:
  int steps_;
  Device<E> data_;
};

struct Pools {
  Pool<BFloat16> halves;
  Pool<float> floats;
  Pool<float> scores;  // of which few are equal
};

// r different positions below `size`, rising.
inline std::vector<int64_t> positions(int64_t r, int64_t size) {
  std::mt19937_64 generator(1);
  std::vector<int64_t> at;
  while (static_cast<int64_t>(at.size()) < r) {
    while (static_cast<int64_t>(at.size()) < r) at.push_back(generator() % size);
    std::sort(at.begin(), at.end());
    at.erase(std::unique(at.begin(), at.end()), at.end());
  }
  return at;
}

// r coordinates of a matrix, sorted.
struct Coordinates {
  std::vector<int32_t> row, column;
  Coordinates(int64_t r, int64_t num_rows, int64_t num_columns) {
    for (const int64_t at : positions(r, num_rows * num_columns)) {
      row.push_back(static_cast<int32_t>(at / num_columns));
      column.push_back(static_cast<int32_t>(at % num_columns));
    }
  }
};

// Weights of r entries that no sum is rounded by, and that differ from one to the next.
inline std::vector<float> weights(int64_t r) {
  constexpr float kWeights[] = {0.5f, -1.0f, 0.0f, 2.0f, -0.25f};
  std::vector<float> of_entries;
  for (int64_t k = 0; k < r; ++k) of_entries.push_back(kWeights[k % 5]);
  return of_entries;
}

// What is wrong with `out`, of which entry n is the truth's to within `tolerance`; nothing if "".
// An entry costs so many products: some 20 million are spent on entries at even distances.
template <typename Truth>
std::string compare(const std::vector<float>& out, int64_t products, double tolerance,
                    const Truth& truth) {
  const auto size = static_cast<int64_t>(out.size());
  const int64_t step = size * products / 20000000 | 1;  // odd, and so of all columns
  int64_t num_wrong = 0;
  std::string first;
  for (int64_t n = 0; n < size; ++n) {
    const bool known = n % step == 0 || n == size - 1;
    const double wanted = known ? truth(n) : out[n];
    if (std::abs(out[n] - wanted) <= tolerance) continue;
    if (num_wrong++ == 0) {
      first = "entry " + std::to_string(n) + " is " + std::to_string(out[n]);
      if (known) first += " instead of " + std::to_string(wanted);
    }
  }
  return num_wrong == 0 ? "" : std::to_string(num_wrong) + " entries are wrong, " + first;
}

constexpr int64_t kSector = 32;  // bytes that memory gives at least

inline std::string label(const char* format, int64_t a, int64_t b = 0, int64_t c = 0) {
  char text[80];
  std::snprintf(text, sizeof text, format, static_cast<int>(a), static_cast<int>(b),
                static_cast<int>(c));
  return text;
}

struct Case {
  std::string name;
  int64_t num_bytes;  // that must be read
  std::function<cudaError_t(int64_t turn)> run;
  std::function<std::string()> wrong;  // after turn 0
};

}  // namespace bench
}  // namespace dropinf
