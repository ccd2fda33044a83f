// sampled_outer on the CPU. Two ways to sum a chunk of positions, chosen by sizes alone:
//
// scalar   every coordinate loads its x and dy at every position; for few coordinates.
// tiled    tiles of 16 positions of the used columns of x and dy are transposed, in registers, into
//          a scratch of one cache line a column; a coordinate is then a dot of two lines.

#include "sampled_outer.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/sampled_outer_tile.h"

namespace dropinf {
namespace {

constexpr int64_t kMinUsed = 6;     // used columns that make a group worth transposing whole
constexpr int64_t kMaxChunks = 16;  // of one example, and
constexpr int64_t kMinChunk = 64;   // positions of the smallest; whole tiles

// ns on one core of a 2-core AMD EPYC Zen 4, 2026-11. Only their ratios choose the path.
constexpr double kScalarNs = 0.65;   // a coordinate at a position, float32
constexpr double kScalar16Ns = 1.2;  // the same, 16-bit elements
constexpr double kTileNs = 100;      // a tile, and in a tile
constexpr double kDotNs = 1.3;       // a coordinate
constexpr double kSingleNs = 4;      // a column copied on its own
constexpr double kGroupedNs = 1.8;   // a column of a transposed group

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

}  // namespace

#define KERNELS "cpu/sampled_outer_kernels.h"
#include "cpu/each_capability.h"

namespace {

// The functions of one capability and dtype.
struct Kernels {
  decltype(&portable::scalar<float>) scalar;
  decltype(&portable::transpose_tile<float>) transpose;
  decltype(&portable::dots) dots;
};

template <typename E>
Kernels kernels_of() {
  return {CAPABLE(scalar<E>), CAPABLE(transpose_tile<E>), CAPABLE(dots)};
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
    auto tile = make_floats(tile_size_);
    auto sums = make_floats(num_chunks > 1 ? 2 * sums_size : sums_size);
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
    auto tile = make_floats(tile_size_);
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
    const int64_t s = args_.s;
    const float* weights = args_.weights;
    if (s == 1 && args_.out_stride_k == 1) {
      if (!weights) {
        std::copy(sums + k_begin, sums + k_end, out + k_begin);
        return;
      }
      for (int64_t k = k_begin; k < k_end; ++k) out[k] = weighted(weights[k], sums[k]);
      return;
    }
    for (int64_t k = k_begin; k < k_end; ++k) {
      float sum = 0.0f;
      for (int64_t q = k * s; q < (k + 1) * s; ++q) {
        sum += weights ? weighted(weights[q], sums[q]) : sums[q];
      }
      out[k * args_.out_stride_k] = sum;
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

std::unique_ptr<const SampledOuter> SampledOuter::make(const SampledOuterArgs& args) {
  return std::make_unique<const Call>(args);
}

}  // namespace dropinf
