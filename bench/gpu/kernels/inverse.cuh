// gram, and damped Cholesky factors with solutions.

#pragma once

#include "cuda/cholesky.cuh"
#include "cuda/gram.cuh"
#include "inputs.cuh"

namespace dropinf {
namespace bench {

// L layers of one width.
inline std::vector<int64_t> bounds_of(int64_t L, int64_t width) {
  std::vector<int64_t> offsets;
  for (int64_t l = 0; l <= L; ++l) offsets.push_back(l * width);
  return offsets;
}

inline Case gram(const Pools& pools, int64_t n, int64_t L, int64_t width) {
  const Pool<float>& pool = pools.floats;
  const auto offsets = bounds_of(L, width);
  const int64_t R = L * width;
  const Device<float> out(R * width);
  GramArgs args{};
  args.n = n, args.rows_stride = R, args.L = L;
  args.scale = 0.5f;
  args.out = out.data();
  args.offsets = offsets.data();
  const int64_t size = cuda::gram_scratch(args);
  const Device<float> scratch(size + 1);

  Case it;
  it.name = label("gram, n=%d, %d layers, r=%d", n, L, width) + (size ? ", chunks apart" : "");
  it.num_bytes = 4 * n * R;
  it.run = [=, &pool](int64_t turn) {
    GramArgs call = args;
    call.offsets = offsets.data();
    call.rows = pool.data() + pool.at(turn, n * R);
    return cuda::gram(call, size ? scratch.data() : nullptr, nullptr);
  };
  it.wrong = [=, &pool] {
    return compare(out.on_host(), n, 0, [&](int64_t at) {
      const int64_t first = at / (width * width) * width;
      const int64_t i = at / width % width, j = at % width;
      double sum = 0;
      for (int64_t t = 0; t < n && j <= i; ++t) {
        sum += pool[t * R + first + i] * pool[t * R + first + j];
      }
      return 0.5 * sum;
    });
  };
  return it;
}

// The factor of a row-major [n, n], and x = (L Lᵀ)⁻¹ x for each of the right-hand sides.
inline void factorise(std::vector<double>& A, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      if (j > i) A[i * n + j] = 0;
      for (int64_t k = 0; k < j && j <= i; ++k) A[i * n + j] -= A[i * n + k] * A[j * n + k];
      if (j < i) A[i * n + j] /= A[j * n + j];
      if (j == i) A[i * n + i] = std::sqrt(A[i * n + i]);
    }
  }
}

inline void solve(const std::vector<double>& L, int64_t n, double* x) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < i; ++k) x[i] -= L[i * n + k] * x[k];
    x[i] /= L[i * n + i];
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    for (int64_t k = i + 1; k < n; ++k) x[i] -= L[k * n + i] * x[k];
    x[i] /= L[i * n + i];
  }
}

// Of the numbers' lower triangles, whose eigenvalues are within 1.3 sqrt(n): the shift makes them
// positive.
inline Case cholesky(const Pools& pools, int64_t L, int64_t n, int64_t m) {
  const Pool<float>& pool = pools.floats;
  const int64_t R = L * n;
  const float shift = 2.0f * std::sqrt(static_cast<float>(n)) + 1.0f;
  const auto offsets = bounds_of(L, n);
  const Device<float> factors(R * n), solved(m * R);
  const Device<float> shifts(std::vector<float>(static_cast<size_t>(L), shift));
  const Device<int32_t> info(L);

  Case it;
  it.name = label("cholesky, %d layers, r=%d, m=%d", L, n, m);
  it.num_bytes = 4 * R * (n + m);
  it.run = [=, &pool](int64_t turn) {
    CholeskyArgs args{};
    args.L = L;
    args.offsets = offsets.data();
    args.matrices = pool.data() + pool.at(turn, R * (n + m));
    args.factors = factors.data();
    args.shift = shifts.data();
    args.info = info.data();
    args.rows = args.matrices + R * n;
    args.solved = solved.data();
    args.m = m, args.rows_stride = args.solved_stride = R;
    return cuda::cholesky(args, nullptr);
  };
  it.wrong = [=, &pool] {
    for (const int32_t failed : info.on_host()) {
      if (failed) return label("info is %d", failed);
    }
    const auto all_factors = factors.on_host(), all_solved = solved.on_host();
    for (const int64_t l : {int64_t{0}, L - 1}) {
      std::vector<double> A;
      for (int64_t k = 0; k < n * n; ++k) {
        A.push_back(pool[l * n * n + k] + (k % (n + 1) ? 0.0f : shift));
      }
      factorise(A, n);
      const float* const factor = all_factors.data() + l * n * n;
      const std::string wrong =
          compare({factor, factor + n * n}, 1, 1e-5 * A[0], [&](int64_t k) { return A[k]; });
      if (!wrong.empty()) return wrong;
      for (int64_t q = 0; q < m; ++q) {
        std::vector<double> x;
        for (int64_t k = 0; k < n; ++k) x.push_back(pool[R * n + q * R + l * n + k]);
        solve(A, n, x.data());
        double largest = 0;
        for (const double value : x) largest = std::max(largest, std::abs(value));
        const float* const row = all_solved.data() + q * R + l * n;
        const std::string wrong =
            compare({row, row + n}, 1, 1e-5 * largest, [&](int64_t k) { return x[k]; });
        if (!wrong.empty()) return "in a solution " + wrong;
      }
    }
    return std::string();
  };
  return it;
}

}  // namespace bench
}  // namespace dropinf
