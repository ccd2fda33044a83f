// Gram matrices, once for each capability: see tile_kernels.h.

#include "cpu/tile_kernels.h"

// sums[c][j] += sum_t rows[t, i + c] * rows[t, j], for 4 columns i + c and V registers of columns
// j.
template <int V>
TARGET void gram_tile(const float* rows, int64_t ld, int64_t count, int64_t i, int64_t j,
                      float* sums, int64_t sums_step) {
  Lanes tile[V][4];
  clear(tile);
  accumulate<false>(rows + j, ld, rows + i, ld, 1, count, tile);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* p = sums + c * sums_step + j + v * kLanes;
      store(p, add(load(p), tile[v][c]));
    }
  }
}

// Rows [begin, end) of one layer's matrix, begin a multiple of 8: a block of kDepth rows of `args`
// at a time is copied side by side, multiplied, and added to the sums in order.
TARGET inline void gram_rows(const GramArgs& args, int64_t offset, int64_t n, int64_t begin,
                             int64_t end, float* out) {
  // Odd numbers of cache lines, so that columns fall into all cache sets.
  const int64_t height = round_up(end - begin, 4);
  const int64_t width = round_up(end, kLanes), ld = round_up(width, 16) + (width % 32 ? 0 : 16);
  Floats space = make_floats(ld * (kDepth + height));
  float *const block = space.get(), *const sums = block + ld * kDepth;
  std::fill_n(sums, ld * height, 0.0f);
  for (int64_t t = 0; t < args.n; t += kDepth) {
    const int64_t count = std::min(kDepth, args.n - t);
    for (int64_t k = 0; k < count; ++k) {
      const float* row = args.rows + (t + k) * args.rows_stride + offset;
      for (int64_t j = 0; j < width; j += kLanes) {
        store(block + k * ld + j, load_part(row + j, end - j));
      }
    }
    for (int64_t j = 0; j < end; j += 3 * kLanes) {
      const int64_t registers = std::min<int64_t>(3, (width - j) / kLanes);
      const auto tile = registers == 3   ? gram_tile<3>
                        : registers == 2 ? gram_tile<2>
                                         : gram_tile<1>;
      for (int64_t i = std::max(begin, j / 4 * 4); i < end; i += 4) {
        tile(block, ld, count, i, j, sums + (i - begin) * ld, ld);
      }
    }
  }
  for (int64_t i = begin; i < end; ++i) {
    const float* from = sums + (i - begin) * ld;
    float* to = out + i * n;
    if (args.accumulate) {
      for (int64_t j = 0; j <= i; ++j) to[j] += args.scale * from[j];
    } else {
      for (int64_t j = 0; j <= i; ++j) to[j] = args.scale * from[j];
      std::fill(to + i + 1, to + n, 0.0f);
    }
  }
}
