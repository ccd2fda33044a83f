// A tile of positions of one operand of sampled_outer, transposed in registers into a scratch of
// one cache line a column; and the dots of two tiles' lines.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/lanes.h"

namespace dropinf {

constexpr int64_t kTile = 16;   // positions of a tile: one cache line of floats a column
constexpr int64_t kGroup = 16;  // columns transposed together: one cache line of a float32 row
constexpr size_t kAhead = 8;    // pieces; fetched ahead where they are single columns
constexpr int64_t kDots = 8;    // coordinates reduced together

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

namespace portable {

constexpr int64_t kStreams = kTile;  // positions transposed together: a cache line of the tile

// Transposes kStreams positions of kGroup columns; those from `count` on are zeros, and are not
// asked for in a whole tile.
template <bool kWhole, typename E>
inline void transpose_group(const E* from, int64_t stride, int64_t count, float* tile) {
  for (int64_t c = 0; c < kGroup; ++c) {
    for (int64_t p = 0; p < kStreams; ++p) {
      tile[c * kTile + p] = kWhole || p < count ? to_float(from[p * stride + c]) : 0.0f;
    }
  }
}

// sums[q] += the dot of two rows of the tiles.
inline void dots(const float* x_tile, const float* dy_tile, const uint32_t* x_where,
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

}  // namespace portable

#if DROPINF_AVX2

namespace avx2 {

constexpr int64_t kStreams = 8;  // 16 streams from memory are a third slower

// Each 128-bit half of the registers is a 4x4 block: 4 columns, and positions 0 to 3 or 4 to 7.
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

// 16-bit elements are widened last. Each half of the registers is an 8x8 block: columns 0 to 7 or 8
// to 15.
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

AVX2 inline __m256 dot_lanes(const float* x, const float* dy) {
  const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(dy));
  return _mm256_fmadd_ps(_mm256_loadu_ps(x + 8), _mm256_loadu_ps(dy + 8), low);
}

AVX2 inline void dots(const float* x_tile, const float* dy_tile, const uint32_t* x_where,
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

}  // namespace avx2

#endif  // DROPINF_AVX2

}  // namespace dropinf
