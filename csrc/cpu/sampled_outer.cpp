// sampled_outer on the CPU. Two ways to sum a chunk of positions, chosen by sizes alone:
//
// scalar   every coordinate loads its x and dy at every position; for few coordinates.
// tiled    tiles of 16 positions of the used columns of x and dy are transposed, in registers, into
//          a scratch of one cache line a column; a coordinate is then a dot of two lines.

#include <algorithm>
#include <new>
#include <numeric>
#include <vector>

#include "cpu/avx2.h"
#include "launchers.h"

namespace dropinf {
namespace {

constexpr int64_t kTile = 16;       // positions of a tile: one cache line of floats a column
constexpr int64_t kGroup = 16;      // columns transposed together: one cache line of a float32 row
constexpr int64_t kMinUsed = 6;     // used columns that make a group worth transposing whole
constexpr size_t kAhead = 8;        // pieces; fetched ahead where they are single columns
constexpr int64_t kMaxChunks = 16;  // of one example, and
constexpr int64_t kMinChunk = 64;   // positions of the smallest; whole tiles
constexpr int64_t kDots = 8;        // coordinates reduced together

// ns on one core of a 2-core AMD EPYC Zen 4, 2026-11. Only their ratios choose the path.
constexpr double kScalarNs = 0.65;   // a coordinate at a position, float32
constexpr double kScalar16Ns = 1.2;  // the same, 16-bit elements
constexpr double kTileNs = 100;      // a tile, and in a tile
constexpr double kDotNs = 1.3;       // a coordinate
constexpr double kSingleNs = 4;      // a column copied on its own
constexpr double kGroupedNs = 1.8;   // a column of a transposed group

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// A column to copy into the tile, or kGroup columns to transpose.
struct Piece {
  int64_t column;
  int64_t rows;  // 1 or kGroup, of the tile
};

// The columns of one operand that some coordinate uses, and their rows in the transposed tile.
struct Columns {
  std::vector<Piece> pieces;    // rising, for the sake of the hardware's prefetching
  std::vector<uint32_t> where;  // [n, padded with 0] offset of each coordinate's row in the tile
  int64_t rows = 0;             // of the tile, with the row of ones
};

Columns find_columns(const int32_t* idx, int64_t n, int64_t width, bool ones) {
  Columns columns;
  std::vector<uint32_t> row(width + ones);
  for (int64_t q = 0; q < n; ++q) row[idx[q]] = 1;
  for (int64_t begin = 0; begin < width; begin += kGroup) {
    const int64_t end = std::min(begin + kGroup, width);
    // The last group starts early rather than read past the end of a row.
    const int64_t first = end - kGroup;
    if (first >= 0 && std::accumulate(&row[begin], &row[end], int64_t{0}) >= kMinUsed) {
      for (int64_t c = begin; c < end; ++c) row[c] = (columns.rows + c - first) * kTile;
      columns.pieces.push_back({first, kGroup});
      columns.rows += kGroup;
      continue;
    }
    for (int64_t c = begin; c < end; ++c) {
      if (!row[c]) continue;
      row[c] = columns.rows * kTile;
      columns.pieces.push_back({c, 1});
      columns.rows += 1;
    }
  }
  if (ones) row[width] = columns.rows++ * kTile;
  columns.where.resize(round_up(n, kDots));
  for (int64_t q = 0; q < n; ++q) columns.where[q] = row[idx[q]];
  return columns;
}

// sums[q] += sum over `count` positions, in order.
template <typename E>
void scalar_portable(const void* x_data, int64_t x_stride_t, const void* dy_data,
                     int64_t dy_stride_t, int64_t count, const SampledOuterArgs& args, int64_t n,
                     float* sums) {
  const E* x = static_cast<const E*>(x_data);
  const E* dy = static_cast<const E*>(dy_data);
  for (int64_t t = 0; t < count; ++t, x += x_stride_t, dy += dy_stride_t) {
    for (int64_t q = 0; q < n; ++q) {
      const int64_t i = args.i_idx[q];
      sums[q] += to_float(dy[args.o_idx[q]]) * (i < args.I ? to_float(x[i]) : 1.0f);
    }
  }
}

// Writes the tile: rows[p, c] of the used columns c to tile[row of c][p], 0 for p from `count` on.
template <typename E>
void transpose_portable(const void* rows, int64_t stride, int64_t count, const Columns& columns,
                        float* tile) {
  const E* data = static_cast<const E*>(rows);
  for (const Piece& piece : columns.pieces) {
    for (const E* from = data + piece.column; from < data + piece.column + piece.rows; ++from) {
      for (int64_t p = 0; p < kTile; ++p) tile[p] = p < count ? to_float(from[p * stride]) : 0.0f;
      tile += kTile;
    }
  }
}

// sums[q] += the dot of two rows of the tiles.
void dots_portable(const float* x_tile, const float* dy_tile, const uint32_t* x_where,
                   const uint32_t* dy_where, int64_t n, float* sums) {
  for (int64_t q = 0; q < n; ++q) {
    const float* x = x_tile + x_where[q];
    const float* dy = dy_tile + dy_where[q];
    float lanes[4] = {};
    for (int64_t p = 0; p < kTile; p += 4) {
      for (int64_t j = 0; j < 4; ++j) lanes[j] += x[p + j] * dy[p + j];
    }
    sums[q] += (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  }
}

#if DROPINF_AVX2

template <typename E>
AVX2 void scalar_avx2(const void* x_data, int64_t x_stride_t, const void* dy_data,
                      int64_t dy_stride_t, int64_t count, const SampledOuterArgs& args, int64_t n,
                      float* sums) {
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
        sum = __builtin_fmaf(load1(d), load1(v), sum);
        sum = __builtin_fmaf(load1(d + dy_stride_t), load1(v + x_stride_t), sum);
        sum = __builtin_fmaf(load1(d + 2 * dy_stride_t), load1(v + 2 * x_stride_t), sum);
        sum = __builtin_fmaf(load1(d + 3 * dy_stride_t), load1(v + 3 * x_stride_t), sum);
      } else {
        for (int64_t j = 0; j < 4; ++j) sum += load1(d + j * dy_stride_t);
      }
      sums[q] = sum;
    }
  }
  for (; t < count; ++t, x += x_stride_t, dy += dy_stride_t) {
    for (int64_t q = 0; q < n; ++q) {
      const float v = i_idx[q] < I ? load1(x + i_idx[q]) : 1.0f;
      sums[q] = __builtin_fmaf(load1(dy + o_idx[q]), v, sums[q]);
    }
  }
}

// Transposes 8 positions of kGroup columns; the positions from `count` on are zeros, and are not
// asked for in a whole tile. Each 128-bit half of the registers is a 4x4 block: 4 columns, and
// positions 0 to 3 or 4 to 7.
template <bool kWhole>
AVX2 inline void transpose_group(const float* from, int64_t stride, int64_t count, float* tile) {
  for (int64_t c = 0; c < kGroup; c += 4, from += 4, tile += 4 * kTile) {
    __m128 rows[8];
    for (int64_t p = 0; p < 8; ++p) {
      rows[p] = kWhole || p < count ? _mm_loadu_ps(from + p * stride) : _mm_setzero_ps();
    }
    __m256 v[4];
    for (int64_t p = 0; p < 4; ++p) {
      v[p] = _mm256_insertf128_ps(_mm256_castps128_ps256(rows[p]), rows[p + 4], 1);
    }
    const __m256 a0 = _mm256_unpacklo_ps(v[0], v[1]), a1 = _mm256_unpackhi_ps(v[0], v[1]);
    const __m256 a2 = _mm256_unpacklo_ps(v[2], v[3]), a3 = _mm256_unpackhi_ps(v[2], v[3]);
    _mm256_store_ps(tile, _mm256_shuffle_ps(a0, a2, 0x44));
    _mm256_store_ps(tile + kTile, _mm256_shuffle_ps(a0, a2, 0xee));
    _mm256_store_ps(tile + 2 * kTile, _mm256_shuffle_ps(a1, a3, 0x44));
    _mm256_store_ps(tile + 3 * kTile, _mm256_shuffle_ps(a1, a3, 0xee));
  }
}

// The same for 16-bit elements, widened last. Each half of the registers is an 8x8 block: columns 0
// to 7 or 8 to 15.
template <bool kWhole, typename E>
AVX2 inline void transpose_group(const E* from, int64_t stride, int64_t count, float* tile) {
  __m256i v[8], w[8];
  for (int64_t p = 0; p < 8; ++p) {
    const auto* row = reinterpret_cast<const __m256i*>(from + p * stride);
    v[p] = kWhole || p < count ? _mm256_loadu_si256(row) : _mm256_setzero_si256();
  }
  for (int64_t j = 0; j < 4; ++j) {  // w[j]: positions 2j and 2j + 1; columns 0 to 3, then 4 to 7
    w[j] = _mm256_unpacklo_epi16(v[2 * j], v[2 * j + 1]);
    w[4 + j] = _mm256_unpackhi_epi16(v[2 * j], v[2 * j + 1]);
  }
  for (int64_t j = 0; j < 4; ++j) {  // v[2j], v[2j + 1]: positions 0 to 3, 4 to 7
    const int64_t k = j / 2 * 4;
    const bool low = j % 2 == 0;
    v[2 * j] = low ? _mm256_unpacklo_epi32(w[k], w[k + 1]) : _mm256_unpackhi_epi32(w[k], w[k + 1]);
    v[2 * j + 1] =
        low ? _mm256_unpacklo_epi32(w[k + 2], w[k + 3]) : _mm256_unpackhi_epi32(w[k + 2], w[k + 3]);
  }
  for (int64_t j = 0; j < 4; ++j) {  // columns 2j and 2j + 1, all positions
    w[2 * j] = _mm256_unpacklo_epi64(v[2 * j], v[2 * j + 1]);
    w[2 * j + 1] = _mm256_unpackhi_epi64(v[2 * j], v[2 * j + 1]);
  }
  for (int64_t c = 0; c < 8; ++c) {
    _mm256_store_ps(tile + c * kTile, widen(_mm256_castsi256_si128(w[c]), E{}));
    _mm256_store_ps(tile + (c + 8) * kTile, widen(_mm256_extracti128_si256(w[c], 1), E{}));
  }
}

template <bool kWhole, typename E>
AVX2 void transpose_rows(const E* data, int64_t stride, int64_t count, const Columns& columns,
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
        for (int64_t p = 0; p < 8; ++p) __builtin_prefetch(next + p * stride);
      }
      for (int64_t p = 0; p < 8; ++p) {
        tile[p] = kWhole || p < count ? load1(from + p * stride) : 0.0f;
      }
    }
    tile += piece.rows * kTile;
  }
}

// 8 rows at a time over the whole width: 16 streams from memory are a third slower than 8.
template <typename E>
AVX2 void transpose_avx2(const void* rows, int64_t stride, int64_t count, const Columns& columns,
                         float* tile) {
  const E* data = static_cast<const E*>(rows);
  for (int64_t p = 0; p < kTile; p += 8) {
    if (count - p >= 8) {
      transpose_rows<true>(data + p * stride, stride, 8, columns, tile + p);
    } else {
      transpose_rows<false>(data + p * stride, stride, count - p, columns, tile + p);
    }
  }
}

AVX2 inline __m256 dot_lanes(const float* x, const float* dy) {
  const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(dy));
  return _mm256_fmadd_ps(_mm256_loadu_ps(x + 8), _mm256_loadu_ps(dy + 8), low);
}

AVX2 void dots_avx2(const float* x_tile, const float* dy_tile, const uint32_t* x_where,
                    const uint32_t* dy_where, int64_t n, float* sums) {
  for (int64_t q = 0; q < n; q += kDots) {
    __m256 v[8];
    for (int64_t j = 0; j < 8; ++j) {
      v[j] = dot_lanes(x_tile + x_where[q + j], dy_tile + dy_where[q + j]);
    }
    for (int64_t j = 0; j < 4; ++j) {  // two lanes of each left in either half
      v[j] = _mm256_add_ps(_mm256_blend_ps(v[2 * j], v[2 * j + 1], 0xcc),
                           _mm256_shuffle_ps(v[2 * j], v[2 * j + 1], 0x4e));
    }
    for (int64_t j = 0; j < 2; ++j) {  // one lane of each in either half
      v[j] = _mm256_add_ps(_mm256_shuffle_ps(v[2 * j], v[2 * j + 1], 0x88),
                           _mm256_shuffle_ps(v[2 * j], v[2 * j + 1], 0xdd));
    }
    const __m256 sum =
        _mm256_add_ps(_mm256_blend_ps(v[0], v[1], 0xf0), _mm256_permute2f128_ps(v[0], v[1], 0x21));
    _mm256_storeu_ps(sums + q, _mm256_add_ps(_mm256_loadu_ps(sums + q), sum));
  }
}

#endif  // DROPINF_AVX2

// The functions of one capability and dtype.
struct Kernels {
  decltype(&scalar_portable<float>) scalar;
  decltype(&transpose_portable<float>) transpose;
  decltype(&dots_portable) dots;
};

template <typename E>
Kernels kernels_of() {
#if DROPINF_AVX2
  if (use_avx2()) return {scalar_avx2<E>, transpose_avx2<E>, dots_avx2};
#endif
  return {scalar_portable<E>, transpose_portable<E>, dots_portable};
}

Kernels kernels_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return kernels_of<BFloat16>();
    case DType::kFloat16:
      return kernels_of<Float16>();
    default:
      return kernels_of<float>();
  }
}

struct FreeScratch {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

std::unique_ptr<float[], FreeScratch> scratch(int64_t size) {
  return std::unique_ptr<float[], FreeScratch>(
      static_cast<float*>(::operator new[](size * sizeof(float), std::align_val_t{64})));
}

const void* advance(const void* data, DType dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * (dtype == DType::kFloat32 ? 4 : 2);
}

class Call final : public SampledOuter {
 public:
  explicit Call(const SampledOuterArgs& args)
      : args_(args), n_(args.r * args.s), kernels_(kernels_of(args.dtype)) {
    const int64_t T = args.T;
    chunk_ = round_up(std::max(kMinChunk, (T + kMaxChunks - 1) / kMaxChunks), kTile);
    num_chunks = std::max<int64_t>(1, (T + chunk_ - 1) / chunk_);
    sums_size = round_up(n_, kTile);
    const int64_t positions = std::min(T, chunk_);
    const auto columns_ns = [&](int64_t width) {
      return std::min(kSingleNs * n_, kGroupedNs * width);
    };
    const double scalar_ns =
        (args.dtype == DType::kFloat32 ? kScalarNs : kScalar16Ns) * n_ * positions;
    const double tiled_ns = (kTileNs + kDotNs * n_ + columns_ns(args.I) + columns_ns(args.O)) *
                            ((positions + kTile - 1) / kTile);
    tiled_ = tiled_ns < scalar_ns;
    chunk_ns = std::min(scalar_ns, tiled_ns);
    if (!tiled_) return;
    x_columns_ = find_columns(args.i_idx, n_, args.I, args.bias);
    dy_columns_ = find_columns(args.o_idx, n_, args.O, false);
    dy_tile_ = x_columns_.rows * kTile;
    tile_size_ = dy_tile_ + dy_columns_.rows * kTile;
  }

  void rows(int64_t b_begin, int64_t b_end) const override {
    auto tile = scratch(tile_size_);
    auto sums = scratch(num_chunks > 1 ? 2 * sums_size : sums_size);
    float* part = sums.get() + sums_size;
    for (int64_t b = b_begin; b < b_end; ++b) {
      chunk(b, 0, tile.get(), sums.get());
      for (int64_t c = 1; c < num_chunks; ++c) {
        chunk(b, c, tile.get(), part);
        for (int64_t q = 0; q < n_; ++q) sums[q] += part[q];
      }
      write(b, 0, args_.r, sums.get());
    }
  }

  void chunks(int64_t c_begin, int64_t c_end, float* sums) const override {
    auto tile = scratch(tile_size_);
    for (int64_t c = c_begin; c < c_end; ++c, sums += sums_size) {
      chunk(c / num_chunks, c % num_chunks, tile.get(), sums);
    }
  }

  void finish(int64_t b, int64_t k_begin, int64_t k_end, float* sums) const override {
    for (int64_t c = 1; c < num_chunks; ++c) {
      const float* part = sums + c * sums_size;
      for (int64_t q = k_begin * args_.s; q < k_end * args_.s; ++q) sums[q] += part[q];
    }
    write(b, k_begin, k_end, sums);
  }

 private:
  // sums = the sums of one chunk of one example.
  void chunk(int64_t b, int64_t c, float* tile, float* sums) const {
    std::fill_n(sums, sums_size, 0.0f);
    const int64_t begin = c * chunk_, end = std::min(begin + chunk_, args_.T);
    const int64_t x_step = args_.x_stride_t, dy_step = args_.dy_stride_t;
    const void* x = advance(args_.x, args_.dtype, b * args_.x_stride_b + begin * x_step);
    const void* dy = advance(args_.dy, args_.dtype, b * args_.dy_stride_b + begin * dy_step);
    if (!tiled_) {
      kernels_.scalar(x, x_step, dy, dy_step, end - begin, args_, n_, sums);
      return;
    }
    float* dy_tile = tile + dy_tile_;
    for (int64_t t = begin; t < end; t += kTile) {
      kernels_.transpose(x, x_step, end - t, x_columns_, tile);
      kernels_.transpose(dy, dy_step, end - t, dy_columns_, dy_tile);
      if (args_.bias) std::fill_n(dy_tile - kTile, kTile, 1.0f);
      kernels_.dots(tile, dy_tile, x_columns_.where.data(), dy_columns_.where.data(),
                    round_up(n_, kDots), sums);
      x = advance(x, args_.dtype, kTile * x_step);
      dy = advance(dy, args_.dtype, kTile * dy_step);
    }
  }

  // out[b, k_begin:k_end] from the sums of all positions.
  void write(int64_t b, int64_t k_begin, int64_t k_end, const float* sums) const {
    float* out = args_.out + b * args_.out_stride_b;
    if (!args_.sign && args_.out_stride_k == 1) {
      for (int64_t k = k_begin; k < k_end; ++k) out[k] = args_.scale * sums[k];
      return;
    }
    for (int64_t k = k_begin; k < k_end; ++k) {
      float sum = sums[k * args_.s];
      if (args_.sign) {
        const int8_t* sign = args_.sign + k * args_.s;
        sum = sign[0] == 0 ? 0.0f : sign[0] * sum;
        for (int64_t j = 1; j < args_.s; ++j) {
          sum += sign[j] == 0 ? 0.0f : sign[j] * sums[k * args_.s + j];
        }
      }
      out[k * args_.out_stride_k] = args_.scale * sum;
    }
  }

  SampledOuterArgs args_;
  int64_t n_;      // coordinates, r * s
  int64_t chunk_;  // positions of a chunk, whole tiles
  bool tiled_;
  Columns x_columns_, dy_columns_;
  int64_t dy_tile_ = 0, tile_size_ = 0;  // where dy's tile starts, and the floats of both
  Kernels kernels_;
};

}  // namespace

bool indices_in_range(const int32_t* idx, int64_t n, int64_t size) {
  int32_t least = 0, largest = -1;
  for (int64_t q = 0; q < n; ++q) {
    least = std::min(least, idx[q]);
    largest = std::max(largest, idx[q]);
  }
  return least >= 0 && largest < size;
}

bool signs_in_range(const int8_t* sign, int64_t n) {
  int8_t least = 0, largest = 0;
  for (int64_t q = 0; q < n; ++q) {
    least = std::min(least, sign[q]);
    largest = std::max(largest, sign[q]);
  }
  return least >= -1 && largest <= 1;
}

std::unique_ptr<const SampledOuter> SampledOuter::make(const SampledOuterArgs& args) {
  return std::make_unique<const Call>(args);
}

}  // namespace dropinf
