// Cholesky factors and solves, once for each capability: included inside `namespace avx2` and
// `namespace portable` with TARGET defined as the attribute of their functions. No include guard.
//
// A matrix is a table of elements by columns (see tile_kernels.h), element (i, j) at S[(j * ld + i)
// * kStep<together>]. The tiles below are the same code for both forms: V registers of rows times 4
// columns.
//
// l(i, j) = (a(i, j) - sum of block 0 - sum of block 1 - ...) / l(j, j), each block a sum from zero
// over kPanel columns k in order of l(i, k) * l(j, k), the last one up to j. That order depends on
// the place alone, never on the tile, the group or the padding. Sums from zero round less than
// one long subtraction from a large a(j, j).

#include "cpu/tile_kernels.h"
// After the tiles.
#include "cpu/table_kernels.h"

// to -= the product of one block, where 4 columns of `to` are to_step apart.
template <bool together, int V>
TARGET void update_tile(const float* a, int64_t a_step, const float* b, int64_t b_step,
                        int64_t b_next, int64_t count, float* to, int64_t to_step) {
  Lanes sums[V][4];
  clear(sums);
  accumulate<together>(a, a_step, b, b_step, b_next, count, sums);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* p = to + c * to_step + v * kLanes;
      store(p, sub(load(p), sums[v][c]));
    }
  }
}

// Columns j to j + 3 of V registers of rows x, whose block begins at column `first`.
template <bool together, int V>
TARGET void solve_columns(const float* S, int64_t ld, const float* inverses, int64_t first,
                          int64_t j, float* x, int64_t x_step) {
  constexpr int64_t E = kStep<together>;
  Lanes sums[V][4];
  clear(sums);
  accumulate<together>(x + first * x_step, x_step, S + (first * ld + j) * E, ld * E, E, j - first,
                       sums);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Lanes inverse = operand<together>(inverses + (j + c) * E);
    float* p = x + (j + c) * x_step;
    Lanes t[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      t[v] = mul(sub(load(p + v * kLanes), sums[v][c]), inverse);
      store(p + v * kLanes, t[v]);
    }
#pragma GCC unroll 4
    for (int d = c + 1; d < 4; ++d) {
      const Lanes l = operand<together>(S + ((j + c) * ld + j + d) * E);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[v][d] = fma(t[v], l, sums[v][d]);
    }
  }
}

// The same of the other system, from the last column of the block back.
template <bool together, int V>
TARGET void solve_columns_back(const float* S, int64_t ld, const float* inverses, int64_t last,
                               int64_t j, float* x, int64_t x_step) {
  constexpr int64_t E = kStep<together>;
  Lanes sums[V][4];
  clear(sums);
  accumulate<together>(x + (j + 4) * x_step, x_step, S + (j * ld + j + 4) * E, E, ld * E,
                       last - j - 4, sums);
#pragma GCC unroll 4
  for (int c = 3; c >= 0; --c) {
    const Lanes inverse = operand<together>(inverses + (j + c) * E);
    float* p = x + (j + c) * x_step;
    Lanes t[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      t[v] = mul(sub(load(p + v * kLanes), sums[v][c]), inverse);
      store(p + v * kLanes, t[v]);
    }
#pragma GCC unroll 4
    for (int d = 0; d < c; ++d) {
      const Lanes l = operand<together>(S + ((j + d) * ld + j + c) * E);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[v][d] = fma(t[v], l, sums[v][d]);
    }
  }
}

// f(V, i) for tiles of V registers that cover rows [begin, end).
template <bool together, typename F>
TARGET inline __attribute__((always_inline)) void tiles(int64_t begin, int64_t end, F f) {
  constexpr int64_t R = kRows<together>;
  for (; begin + 3 * R <= end; begin += 3 * R) f(std::integral_constant<int, 3>{}, begin);
  if (begin + 2 * R <= end) {
    f(std::integral_constant<int, 2>{}, begin);
  } else if (begin < end) {
    f(std::integral_constant<int, 1>{}, begin);
  }
}

// f(begin, end) over rows [begin, end), a few tiles at a time where threads share them.
template <bool together, typename F>
inline void share_rows(const Share* share, int64_t begin, int64_t end, const F& f) {
  if (!share) return f(begin, end);
  const int64_t rows = 6 * kRows<together>;
  (*share)((end - begin + rows - 1) / rows, [&](int64_t first, int64_t last) {
    f(begin + first * rows, std::min(end, begin + last * rows));
  });
}

// Writes down the first bad pivot of each lane.
inline void note_pivots(int good, int64_t j, int32_t* info) {
  for (int64_t l = 0; l < kLanes; ++l) {
    if (!(good >> l & 1) && info[l] == 0) info[l] = static_cast<int32_t>(j + 1);
  }
}

// The four pivots from j on, together.
TARGET inline void pivots_together(float* S, int64_t ld, float* inverses, int64_t first, int64_t j,
                                   int32_t* info) {
  constexpr int64_t E = kLanes;
  Lanes sums[4][4];
  clear(sums);
  accumulate<true, 4, true>(S + (first * ld + j) * E, ld * E, S + (first * ld + j) * E, ld * E, E,
                            j - first, sums);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    float* p = S + ((j + c) * ld + j) * E;
    const Lanes pivot = sub(load(p + c * E), sums[c][c]);
    const int good = positive(pivot);
    if (good != 0xff) note_pivots(good, j + c, info);
    const Lanes l = root(pivot), inverse = div(spread(1.0f), l);
    store(p + c * E, l);
    store(inverses + (j + c) * E, inverse);
    Lanes t[4];
#pragma GCC unroll 4
    for (int v = c + 1; v < 4; ++v) {
      t[v] = mul(sub(load(p + v * E), sums[v][c]), inverse);
      store(p + v * E, t[v]);
#pragma GCC unroll 4
      for (int d = c + 1; d <= v; ++d) sums[v][d] = fma(t[v], t[d], sums[v][d]);
    }
  }
}

// The four pivots from j on, and the rest of the register of rows that holds them.
TARGET inline void pivots_alone(float* S, int64_t ld, float* inverses, int64_t first, int64_t j,
                                int32_t* info) {
  const int64_t i = j / kLanes * kLanes;
  Lanes sums[1][4];
  clear(sums);
  accumulate<false>(S + first * ld + i, ld, S + first * ld + j, ld, 1, j - first, sums);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    float* column = S + (j + c) * ld;
    const Lanes t = sub(load(column + i), sums[0][c]);
    store(column + i, t);
    const float pivot = column[j + c];
    if (!(pivot > 0.0f) && info[0] == 0) info[0] = static_cast<int32_t>(j + c + 1);
    const float l = std::sqrt(pivot), inverse = 1.0f / l;
    const Lanes scaled = mul(t, spread(inverse));
    store(column + i, scaled);
    column[j + c] = l;
    inverses[j + c] = inverse;
#pragma GCC unroll 4
    for (int d = c + 1; d < 4; ++d) {
      sums[0][d] = fma(scaled, spread(column[j + d]), sums[0][d]);
    }
  }
}

// The lower factor in place of the matrix [N, N], N a multiple of 4, or of 8 if it is alone.
template <bool together>
TARGET void factorise(float* S, int64_t ld, int64_t N, float* inverses, int32_t* info,
                      const Share* share) {
  constexpr int64_t E = kStep<together>;
  for (int64_t first = 0; first < N; first += kPanel) {
    const int64_t last = std::min(first + kPanel, N);
    const auto update = [&](int64_t begin, int64_t end) TARGET {
      for (int64_t k = 0; k < first; k += kPanel) {
        tiles<together>(begin, end, [&](auto V, int64_t i) TARGET {
          const int64_t columns = std::min(last, i + V * kRows<together>);
          for (int64_t j = first; j < columns; j += 4) {
            update_tile<together, V>(S + (k * ld + i) * E, ld * E, S + (k * ld + j) * E, ld * E, E,
                                     kPanel, S + (j * ld + i) * E, ld * E);
          }
        });
      }
    };
    if (first > 0) share_rows<together>(share, first, N, update);
    for (int64_t j = first; j < last; j += 4) {
      int64_t i = j + 4;
      if constexpr (together) {
        pivots_together(S, ld, inverses, first, j, info);
      } else {
        pivots_alone(S, ld, inverses, first, j, info);
        if (info[0]) return;
        i = j / kLanes * kLanes + kLanes;
      }
      tiles<together>(i, last, [&](auto V, int64_t i) TARGET {
        solve_columns<together, V>(S, ld, inverses, first, j, S + i * E, ld * E);
      });
    }
    const auto below = [&](int64_t begin, int64_t end) TARGET {
      tiles<together>(begin, end, [&](auto V, int64_t i) TARGET {
        for (int64_t j = first; j < last; j += 4) {
          solve_columns<together, V>(S, ld, inverses, first, j, S + i * E, ld * E);
        }
      });
    };
    share_rows<together>(share, last, N, below);
  }
}

// X = X (L Lᵀ)⁻¹ for `count` registers of rows.
template <bool together>
TARGET void solve(const float* S, int64_t ld, int64_t N, const float* inverses, float* X,
                  int64_t ldx, int64_t count) {
  constexpr int64_t E = kStep<together>;
  const int64_t step = ldx * E;
  tiles<together>(0, count * kRows<together>, [&](auto V, int64_t i) TARGET {
    float* x = X + i * E;
    for (int64_t first = 0; first < N; first += kPanel) {
      const int64_t last = std::min(first + kPanel, N);
      for (int64_t k = 0; k < first; k += kPanel) {
        for (int64_t j = first; j < last; j += 4) {
          update_tile<together, V>(x + k * step, step, S + (k * ld + j) * E, ld * E, E, kPanel,
                                   x + j * step, step);
        }
      }
      for (int64_t j = first; j < last; j += 4) {
        solve_columns<together, V>(S, ld, inverses, first, j, x, step);
      }
    }
    for (int64_t first = (N - 1) / kPanel * kPanel; first >= 0; first -= kPanel) {
      const int64_t last = std::min(first + kPanel, N);
      for (int64_t k = last; k < N; k += kPanel) {
        for (int64_t j = first; j < last; j += 4) {
          update_tile<together, V>(x + k * step, step, S + (j * ld + k) * E, E, ld * E,
                                   std::min(kPanel, N - k), x + j * step, step);
        }
      }
      for (int64_t j = last - 4; j >= first; j -= 4) {
        solve_columns_back<together, V>(S, ld, inverses, last, j, x, step);
      }
    }
  });
}

// Right-hand sides at a time, which bounds the scratch.
template <bool together>
constexpr int64_t kChunk = together ? 24 : 48;

template <bool together>
TARGET void run_group(const CholeskyGroup& group, const Share* share) {
  constexpr int64_t R = kRows<together>, E = kStep<together>;
  const bool factorising = group.factor[0];
  int64_t largest = 0, smallest = group.n[0];
  Table<const float> from[kLanes];
  Table<float> to[kLanes];
  float shift[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) {
    const bool there = l < group.count;
    const int64_t n = there ? group.n[l] : 0;
    largest = std::max(largest, n);
    smallest = std::min(smallest, n);
    from[l] = {there ? group.matrix[l] : nullptr, n, n, n};
    to[l] = {there ? group.factor[l] : nullptr, n, n, n};
    shift[l] = there ? group.shift[l] : 0.0f;
  }
  if (largest == 0) return;
  const int64_t N = round_up(largest, together ? 4 : kLanes);
  // An odd number of cache lines from column to column, so that columns fall into all cache sets.
  const int64_t ld = together ? N + 2 : (N / 16 | 1) * 16 + (N % 32 > 16 ? 32 : 0);
  alignas(64) float small[4096];  // for eight 20 x 20 matrices allocating would cost a tenth
  const int64_t size = (ld + 1) * N * E;
  Floats scratch = size > 4096 ? make_floats(size) : nullptr;
  float *const S = scratch ? scratch.get() : small, *const inverses = S + ld * N * E;
  int32_t info[kLanes]{};
  share_rows<together>(share, 0, N, [&](int64_t begin, int64_t end) TARGET {
    pack<together>(from, begin, end, N, true, S, ld);
  });
  for (int64_t i = 0; i < N; ++i) {
    float* p = S + (i * ld + i) * E;
    if (together && factorising && i < smallest) {
      store(p, add(load(p), load(shift)));  // element by element, the next loads would wait
      continue;
    }
    for (int64_t l = 0; l < E; ++l) {
      if (l >= group.count || i >= group.n[l]) {
        p[l] = 1.0f;
      } else if (factorising) {
        p[l] += shift[l];
      }
      if (!factorising) inverses[i * E + l] = 1.0f / p[l];
    }
  }
  if (factorising) {
    factorise<together>(S, ld, N, inverses, info, share);
    share_rows<together>(share, 0, N, [&](int64_t begin, int64_t end) TARGET {
      unpack<together>(S, ld, true, to, begin, end, N);
    });
    for (int64_t l = 0; l < group.count; ++l) {
      *group.info[l] = info[l];
      if (info[l]) std::fill_n(group.factor[l], group.n[l] * group.n[l], kNaN);
    }
  }
  if (group.m == 0) return;
  const int64_t chunk = std::min(round_up(group.m, R), kChunk<together>);
  const auto solve_chunks = [&](int64_t begin, int64_t end) TARGET {
    Floats space = make_floats(chunk * N * E);
    float* const X = space.get();
    for (int64_t first = begin * chunk; first < std::min(end * chunk, group.m); first += chunk) {
      const int64_t count = std::min(chunk, group.m - first);
      Table<const float> rows[kLanes]{};
      Table<float> solved[kLanes]{};
      for (int64_t l = 0; l < group.count; ++l) {
        const int64_t n = group.n[l];
        rows[l] = {group.rows[l] + first * group.rows_stride, group.rows_stride, count, n};
        solved[l] = {group.solved[l] + first * group.solved_stride, group.solved_stride, count, n};
      }
      pack<together>(rows, 0, count, N, false, X, chunk);
      solve<together>(S, ld, N, inverses, X, chunk, (count + R - 1) / R);
      unpack<together>(X, chunk, false, solved, 0, count, N);
      for (int64_t l = 0; l < group.count; ++l) {
        if (!info[l]) continue;
        for (int64_t i = 0; i < count; ++i) {
          std::fill_n(solved[l].data + i * group.solved_stride, group.n[l], kNaN);
        }
      }
    }
  };
  const int64_t num_chunks = (group.m + chunk - 1) / chunk;
  share&& num_chunks > 1 ? (*share)(num_chunks, solve_chunks) : solve_chunks(0, num_chunks);
}
