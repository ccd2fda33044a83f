// Sums of products in registers, once for each capability: included inside `namespace avx2` and
// `namespace portable` with TARGET defined as the attribute of their functions. No include guard.
//
// Together, an element is eight floats, one of each of eight matrices. Else it is one float, and
// eight rows next to one another make up a register.

template <bool together>
constexpr int64_t kStep = together ? kLanes : 1;
template <bool together>
constexpr int64_t kRows = together ? 1 : kLanes;  // of a register

template <bool together>
TARGET inline Lanes operand(const float* p) {
  if constexpr (together) {
    return load(p);
  } else {
    return spread(*p);
  }
}

// sums[v][c] += sum_k a[k * a_step + 8 * v] * b[k * b_step + c * b_next]; with `lower`, c <= v
// only.
template <bool together, int V, bool lower = false>
TARGET inline __attribute__((always_inline)) void accumulate(const float* a, int64_t a_step,
                                                             const float* b, int64_t b_step,
                                                             int64_t b_next, int64_t count,
                                                             Lanes (&sums)[V][4]) {
  for (int64_t k = 0; k < count; ++k, a += a_step, b += b_step) {
    Lanes x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(a + v * kLanes);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const Lanes y = operand<together>(b + c * b_next);
#pragma GCC unroll 4
      for (int v = lower ? c : 0; v < V; ++v) sums[v][c] = fma(x[v], y, sums[v][c]);
    }
  }
}

template <int V>
TARGET inline __attribute__((always_inline)) void clear(Lanes (&sums)[V][4]) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sums[v][c] = spread(0.0f);
  }
}
