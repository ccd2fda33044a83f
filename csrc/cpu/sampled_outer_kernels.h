// sampled_outer's loops over positions and columns, once for each capability: see
// sampled_outer_tile.h.

// sums[q] += sum over `count` positions, in order.
template <typename E>
TARGET void scalar(const void* x_data, int64_t x_stride_t, const void* dy_data, int64_t dy_stride_t,
                   int64_t count, const SampledOuterArgs& args, int64_t n, float* sums) {
  const E* x = static_cast<const E*>(x_data);
  const E* dy = static_cast<const E*>(dy_data);
  const int32_t* o_idx = args.o_idx;
  const int32_t* i_idx = args.i_idx;
  const int64_t I = args.I;
  int64_t t = 0;
  for (; t + 4 <= count; t += 4, x += 4 * x_stride_t, dy += 4 * dy_stride_t) {
    for (int64_t q = 0; q < n; ++q) {
      const E* d = dy + o_idx[q];
      float sum = sums[q];
      if (i_idx[q] < I) {
        const E* v = x + i_idx[q];
        sum = fma(load1(d), load1(v), sum);
        sum = fma(load1(d + dy_stride_t), load1(v + x_stride_t), sum);
        sum = fma(load1(d + 2 * dy_stride_t), load1(v + 2 * x_stride_t), sum);
        sum = fma(load1(d + 3 * dy_stride_t), load1(v + 3 * x_stride_t), sum);
      } else {
        for (int64_t j = 0; j < 4; ++j) sum += load1(d + j * dy_stride_t);
      }
      sums[q] = sum;
    }
  }
  for (; t < count; ++t, x += x_stride_t, dy += dy_stride_t) {
    for (int64_t q = 0; q < n; ++q) {
      const float v = i_idx[q] < I ? load1(x + i_idx[q]) : 1.0f;
      sums[q] = fma(load1(dy + o_idx[q]), v, sums[q]);
    }
  }
}

// Writes kStreams positions of the tile: rows[p, c] of the used columns c to tile[row of c][p], 0
// for p from `count` on.
template <bool kWhole, typename E>
TARGET void transpose_rows(const E* data, int64_t stride, int64_t count, const Columns& columns,
                           float* tile) {
  const size_t num_pieces = columns.pieces.size();
  for (size_t k = 0; k < num_pieces; ++k) {
    const Piece piece = columns.pieces[k];
    const E* from = data + piece.column;
    if (piece.rows == kGroup) {
      transpose_group<kWhole>(from, stride, count, tile);
    } else {
      if (kWhole && k + kAhead < num_pieces) {
        const E* next = data + columns.pieces[k + kAhead].column;
        for (int64_t p = 0; p < kStreams; ++p) __builtin_prefetch(next + p * stride);
      }
      for (int64_t p = 0; p < kStreams; ++p) {
        tile[p] = kWhole || p < count ? load1(from + p * stride) : 0.0f;
      }
    }
    tile += piece.rows * kTile;
  }
}

template <typename E>
TARGET void transpose_tile(const void* rows, int64_t stride, int64_t count, const Columns& columns,
                           float* tile) {
  const E* data = static_cast<const E*>(rows);
  for (int64_t p = 0; p < kTile; p += kStreams) {
    if (count - p >= kStreams) {
      transpose_rows<true>(data + p * stride, stride, kStreams, columns, tile + p);
    } else {
      transpose_rows<false>(data + p * stride, stride, count - p, columns, tile + p);
    }
  }
}
