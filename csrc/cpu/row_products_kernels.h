// Products of queries with rows, once for each capability.
//
// A product is a sum over segments, in order, of the scale of the segment's layer times a sum over
// its columns, in eight lanes; then over the lanes. That order depends on the layers alone.

// The first `count` elements, then zeros; reads nothing behind them.
template <typename E>
TARGET inline Lanes load_first(const E* p, int64_t count) {
  if constexpr (std::is_same_v<E, float>) {
    return load_part(p, count);
  } else {
    E part[kLanes] = {};
    std::copy_n(p, count, part);
    return load(part);
  }
}

TARGET inline float sum_of(Lanes a) {
  float v[kLanes];
  store(v, a);
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Fetches 64 elements; what is not there does no harm.
template <typename E>
TARGET inline void fetch_64(const E* p) {
#if defined(__GNUC__)
#pragma GCC unroll 4
  for (size_t line = 0; line < sizeof(E); ++line) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + 64 * line, 0, 2);
  }
#endif
}

// totals[q][k] += scales[k] * (row k · query q) over `count` columns, for kRowGroup rows and Q
// queries, and fetches the elements `ahead`, unless that is 0.
template <int Q, typename E>
TARGET inline __attribute__((always_inline)) void segment_tile(
    const E* const* rows, const float* scales, const float* queries, int64_t queries_stride,
    int64_t count, int64_t ahead, Lanes (*totals)[kRowGroup]) {
  Lanes sums[Q][kRowGroup];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 4
    for (int k = 0; k < kRowGroup; ++k) sums[q][k] = spread(0.0f);
  }
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    if (ahead && j % 64 == 0) {
#pragma GCC unroll 4
      for (int k = 0; k < kRowGroup; ++k) fetch_64(rows[k] + ahead + j);
    }
    Lanes x[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) x[q] = load(queries + q * queries_stride + j);
#pragma GCC unroll 4
    for (int k = 0; k < kRowGroup; ++k) {
      const Lanes y = load(rows[k] + j);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) sums[q][k] = fma(x[q], y, sums[q][k]);
    }
  }
  if (j < count) {
    for (int k = 0; k < kRowGroup; ++k) {
      const Lanes y = load_first(rows[k] + j, count - j);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        sums[q][k] = fma(load_part(queries + q * queries_stride + j, count - j), y, sums[q][k]);
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 4
    for (int k = 0; k < kRowGroup; ++k) {
      totals[q][k] = fma(spread(scales[k]), sums[q][k], totals[q][k]);
    }
  }
}

// Products of queries [q_begin, q_end), at most kQueryGroup, with rows i to i + kRowGroup - 1.
// Where there are fewer the last one is read again. The caller goes on to row `end`.
template <typename E>
TARGET inline void group_products(const RowProductsArgs& args, int64_t i, int64_t end,
                                  int64_t q_begin, int64_t q_end) {
  const int64_t num_queries = q_end - q_begin, num_rows = std::min(kRowGroup, args.c - i);
  const float* const queries = args.queries + q_begin * args.queries_stride;
  const E* first[kRowGroup];
  const float* all_scales[kRowGroup];
  for (int64_t k = 0; k < kRowGroup; ++k) {
    const int64_t row = i + std::min(k, num_rows - 1);
    first[k] = static_cast<const E*>(args.rows) + row * args.rows_stride;
    all_scales[k] = args.scales ? args.scales + row * args.scales_stride : nullptr;
  }
  const int64_t ahead = kRowsAhead * args.rows_stride;
  const bool fetch = i + kRowsAhead < end && ahead * static_cast<int64_t>(sizeof(E)) <= kBytesAhead;
  Lanes totals[kQueryGroup][kRowGroup];
  for (int64_t q = 0; q < num_queries; ++q) {
    for (int64_t k = 0; k < kRowGroup; ++k) totals[q][k] = spread(0.0f);
  }
  for (int64_t l = 0; l < args.L; ++l) {
    float scales[kRowGroup];
    for (int64_t k = 0; k < kRowGroup; ++k) scales[k] = all_scales[k] ? all_scales[k][l] : 1.0f;
    for (int64_t j = args.offsets[l]; j < args.offsets[l + 1]; j += kSegment) {
      const int64_t count = std::min(kSegment, args.offsets[l + 1] - j);
      const E* rows[kRowGroup];
      for (int64_t k = 0; k < kRowGroup; ++k) rows[k] = first[k] + j;
      for (int64_t q = 0; q < num_queries; q += 3) {
        const float* x = queries + q * args.queries_stride + j;
        if (num_queries - q >= 3) {
          segment_tile<3>(rows, scales, x, args.queries_stride, count, q == 0 && fetch ? ahead : 0,
                          totals + q);
        } else if (num_queries - q == 2) {
          segment_tile<2>(rows, scales, x, args.queries_stride, count, q == 0 && fetch ? ahead : 0,
                          totals + q);
        } else {
          segment_tile<1>(rows, scales, x, args.queries_stride, count, q == 0 && fetch ? ahead : 0,
                          totals + q);
        }
      }
    }
  }
  for (int64_t q = 0; q < num_queries; ++q) {
    float* const out = args.out + (q_begin + q) * args.out_stride + i;
    for (int64_t k = 0; k < num_rows; ++k) out[k] = sum_of(totals[q][k]);
  }
}

template <typename E>
TARGET inline void decode(const RowProductsArgs& args, int64_t begin, int64_t end, int64_t first,
                          int64_t last, float* to) {
  const int64_t* const bounds = args.offsets;
  const int64_t first_layer = std::upper_bound(bounds, bounds + args.L, first) - bounds - 1;
  for (int64_t i = begin; i < end; ++i, to += last - first) {
    const E* row = static_cast<const E*>(args.rows) + i * args.rows_stride;
    for (int64_t l = first_layer; l < args.L && bounds[l] < last; ++l) {
      const int64_t from = std::max(first, bounds[l]), until = std::min(last, bounds[l + 1]);
      const float scale = args.scales ? args.scales[i * args.scales_stride + l] : 1.0f;
      int64_t j = from;
      for (; j + kLanes <= until; j += kLanes) {
        store(to + j - first, mul(spread(scale), load(row + j)));
      }
      for (; j < until; ++j) to[j - first] = scale * load1(row + j);
    }
  }
}
