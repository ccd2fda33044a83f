// Row-major tables into the elements of cholesky_kernels.h and back, once for each capability: see
// tile_kernels.h, which comes before this.

TARGET inline void store_part(float* p, Lanes a, int64_t count) {
  if (count >= kLanes) {
    store(p, a);
    return;
  }
  float values[kLanes];
  store(values, a);
  for (int64_t i = 0; i < count; ++i) p[i] = values[i];
}

// Where the rows of a lane lie.
template <typename Float>
struct Table {
  Float* data;
  int64_t stride, rows, columns;
};

// The fewest rows and columns of the eight tables.
template <typename Float>
inline void fewest(const Table<Float>* tables, int64_t* rows, int64_t* columns) {
  *rows = tables[0].rows;
  *columns = tables[0].columns;
  for (int64_t l = 1; l < kLanes; ++l) {
    *rows = std::min(*rows, tables[l].rows);
    *columns = std::min(*columns, tables[l].columns);
  }
}

// Up to `count` of eight columns, `step` apart.
TARGET inline void put(const Lanes* a, int64_t count, float* to, int64_t step) {
#pragma GCC unroll 8
  for (int c = 0; c < kLanes; ++c) {
    if (c < count) store(to + c * step, a[c]);
  }
}

// Row-major tables into elements: rows [begin, height), and columns [0, N) or, of a lower triangle,
// those up to the diagonal. What a table does not have is zeros. Above the diagonal, up to the next
// multiple of 8, is anything.
template <bool together>
TARGET void pack(const Table<const float>* tables, int64_t begin, int64_t height, int64_t N,
                 bool lower, float* S, int64_t ld) {
  constexpr int64_t R = kRows<together>, E = kStep<together>;
  int64_t fewest_rows = 0, fewest_columns = 0;
  if (together) fewest(tables, &fewest_rows, &fewest_columns);
  for (int64_t i = begin; i < height; i += R) {
    const int64_t end = lower ? std::min(N, i + R) : N;
    for (int64_t j = 0; j < end; j += kLanes) {
      Lanes a[kLanes];
      if (together && i < fewest_rows && j + kLanes <= fewest_columns) {
#pragma GCC unroll 8
        for (int l = 0; l < kLanes; ++l) {
          a[l] = load(tables[l].data + i * tables[l].stride + j);
        }
        transpose(a);
        put(a, N - j, S + (j * ld + i) * E, ld * E);
        continue;
      }
#pragma GCC unroll 8
      for (int l = 0; l < kLanes; ++l) {
        const Table<const float>& table = tables[together ? l : 0];
        const int64_t row = together ? i : i + l;
        a[l] = row < table.rows ? load_part(table.data + row * table.stride + j, table.columns - j)
                                : spread(0.0f);
      }
      transpose(a);
      put(a, N - j, S + (j * ld + i) * E, ld * E);
    }
  }
}

// The way back; of a lower triangle, with zeros above the diagonal.
template <bool together>
TARGET void unpack(const float* S, int64_t ld, bool lower, const Table<float>* tables,
                   int64_t begin, int64_t height, int64_t N) {
  constexpr int64_t R = kRows<together>, E = kStep<together>;
  int64_t fewest_rows = 0, fewest_columns = 0;
  if (together) fewest(tables, &fewest_rows, &fewest_columns);
  for (int64_t i = begin; i < height; i += R) {
    for (int64_t j = 0; j < N; j += kLanes) {
      Lanes a[kLanes];
      const int64_t count = std::min(N, lower ? i + R : N) - j;
#pragma GCC unroll 8
      for (int c = 0; c < kLanes; ++c) {
        a[c] = c < count ? load(S + ((j + c) * ld + i) * E) : spread(0.0f);
      }
      transpose(a);
      if (together && i < fewest_rows && j + kLanes <= fewest_columns) {
#pragma GCC unroll 8
        for (int l = 0; l < kLanes; ++l) {
          store(tables[l].data + i * tables[l].stride + j, a[l]);
        }
        continue;
      }
#pragma GCC unroll 8
      for (int l = 0; l < kLanes; ++l) {
        const Table<float>& table = tables[together ? l : 0];
        const int64_t row = together ? i : i + l;
        if (row >= table.rows) continue;
        if (lower && !together && j + kLanes > row) {
          a[l] = keep(a[l], row + 1 - j);
        }
        store_part(table.data + row * table.stride + j, a[l], table.columns - j);
      }
    }
  }
}
