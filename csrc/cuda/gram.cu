// gram on CUDA: 64 x 64 tiles of the lower triangles, a block each, in one launch for many layers.
// Small layers that lie side by side share a tile, whose products of two layers are dropped.
//
// The rows are cut into at most kMaxChunks chunks by their number alone; a chunk is summed row by
// row, and the chunks' sums are added in order. So the bits of an entry depend on nothing but its
// columns, whether one block takes all chunks or, where tiles are few, each chunk has a block and
// its sums go through scratch.
//
// L=200, r=1024, n=10,000: 136 tiles a layer, 2.2e12 flop, 33 ms at the 67 TFLOP/s of an H100; the
// rows, 8 GB, would take 2 ms at 4.3 TB/s, and each is read 8 times or more, mostly from the L2
// cache. Measured on an H200: 27 TFLOP/s, 40% of that rate (16 layers, n=4096: 2.7 ms). TF32 would
// be faster and is not exact enough for the factors.

#include "cuda/common.cuh"
#include "cuda/gram.cuh"
#include "cuda/layer_table.cuh"

namespace dropinf {
namespace cuda {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;  // rows in shared memory at a time
constexpr int kThreads = 128;
constexpr int kHeight = 8, kWidth = 4;  // of the part of the tile that a thread sums
constexpr int kAcross = kTile / kWidth;
constexpr int kLoads = kDepth * kTile / kThreads;
constexpr int kMaxChunks = 32;
constexpr int64_t kMinChunk = 512;
constexpr int64_t kFewTiles = 256;  // two for each SM

static_assert(kThreads * kHeight * kWidth == kTile * kTile && kThreads % kTile == 0);

struct Layer {
  int64_t column, matrix;  // where it starts in the rows and in the output
  int32_t width;
  int32_t first;  // its first tile, which is that of the layers it shares a tile with, too
};

struct Gram : LayerTable<Layer, kMostLayers<Layer>> {
  const float* rows;
  float* out;
  float* scratch;  // [chunks, tiles, kHeight * kWidth, kThreads], or null: one block, all chunks
  int64_t n, rows_stride, chunk;
  int num_tiles;
  float scale;
  bool accumulate;
};

// Tile `index` of layer `last`, or the tile of layers `first` to `last`: rows from `i` and columns
// from `j` of a strip of `width` columns from `column`.
struct Tile {
  int first, last;
  int64_t column, width, i, j;
};

__device__ Tile tile_of(const Gram& all, int index) {
  const Layer* const layers = all.layers;
  Tile tile;
  tile.first = tile.last = all.last_from(index);
  while (tile.first > 0 && layers[tile.first - 1].first == layers[tile.last].first) --tile.first;
  const Layer& last = layers[tile.last];
  tile.column = layers[tile.first].column;
  tile.width = last.column + last.width - tile.column;
  int64_t row = 0, left = index - last.first;
  while (left > row) left -= ++row;
  tile.i = row * kTile;
  tile.j = left * kTile;
  return tile;
}

// This thread's part of kDepth rows from `t`, in columns from `begin`; zeros from `end` on.
__device__ void load_rows(const Gram& all, const Tile& tile, int64_t begin, int64_t t, int64_t end,
                          float (&values)[kLoads]) {
  const int64_t column = begin + threadIdx.x % kTile;
  const int64_t row = t + threadIdx.x / kTile;
  const float* from = all.rows + row * all.rows_stride + tile.column + column;
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    const int64_t step = k * (kThreads / kTile);
    const bool there = column < tile.width && row + step < end;
    values[k] = there ? from[step * all.rows_stride] : 0.0f;
  }
}

__device__ void store_rows(const float (&values)[kLoads], float* stage) {
#pragma unroll
  for (int k = 0; k < kLoads; ++k) stage[k * kThreads + threadIdx.x] = values[k];
}

using Sums = float[kHeight][kWidth];

// sums += products of the staged rows.
__device__ void multiply(const float* left, const float* right, Sums& sums) {
  const float* a = left + threadIdx.x / kAcross * kHeight;
  const float* b = right + threadIdx.x % kAcross * kWidth;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    float x[kHeight], y[kWidth];
    load_4(a + k * kTile, x);
    load_4(a + k * kTile + 4, x + 4);
    load_4(b + k * kTile, y);
#pragma unroll
    for (int i = 0; i < kHeight; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[i][j] += x[i] * y[j];
    }
  }
}

// sums = the products of the chunk of rows from `begin`; the next rows are read while some are
// multiplied.
__device__ void sum_chunk(const Gram& all, const Tile& tile, int64_t begin, Sums& sums) {
  const int64_t end = all.chunk < all.n - begin ? begin + all.chunk : all.n;
  float* const shared = shared_memory<float>();
  const bool diagonal = tile.i == tile.j;
  float left[kLoads], right[kLoads];
  const auto load = [&](int64_t t) {
    load_rows(all, tile, tile.i, t, end, left);
    if (!diagonal) load_rows(all, tile, tile.j, t, end, right);
  };
#pragma unroll
  for (int i = 0; i < kHeight; ++i) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums[i][j] = 0.0f;
  }
  load(begin);
  for (int64_t t = begin; t < end; t += kDepth) {
    // Two stages in turn: who writes this one has passed the barrier after its last use.
    float* const stage = shared + (t / kDepth % 2) * 2 * kDepth * kTile;
    float* const other = diagonal ? stage : stage + kDepth * kTile;
    store_rows(left, stage);
    if (!diagonal) store_rows(right, other);
    __syncthreads();
    if (t + kDepth < end) load(t + kDepth);
    multiply(stage, other, sums);
  }
}

// Writes the sums of the entries that are on or below a diagonal, and the zeros above.
__device__ void write_tile(const Gram& all, const Tile& tile, const Sums& sums) {
  const int64_t i0 = tile.i + threadIdx.x / kAcross * kHeight;
  const int64_t j0 = tile.j + threadIdx.x % kAcross * kWidth;
  for (int l = tile.first; l <= tile.last; ++l) {
    const Layer& layer = all.layers[l];
    const int64_t start = layer.column - tile.column, width = layer.width;
    if (i0 + kHeight <= start || i0 >= start + width) continue;
    float* const matrix = all.out + layer.matrix;
#pragma unroll
    for (int i = 0; i < kHeight; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int64_t row = i0 + i - start, column = j0 + j - start;
        if (row < 0 || row >= width || column < 0 || column >= width) continue;
        float* const to = matrix + row * width + column;
        if (all.accumulate) {
          if (column <= row) *to += all.scale * sums[i][j];
        } else {
          *to = column <= row ? all.scale * sums[i][j] : 0.0f;
        }
      }
    }
  }
  if (all.accumulate || tile.i == tile.j) return;
  const Layer& layer = all.layers[tile.first];
  for (int entry = threadIdx.x; entry < kTile * kTile; entry += kThreads) {
    const int64_t row = tile.j + entry / kTile, column = tile.i + entry % kTile;
    if (column < layer.width) all.out[layer.matrix + row * layer.width + column] = 0.0f;
  }
}

__device__ float* scratch_of(const Gram& all, int64_t chunk) {
  return all.scratch + (chunk * all.num_tiles + blockIdx.x) * (kTile * kTile) + threadIdx.x;
}

__device__ void add(const Sums& sums, Sums& total) {
#pragma unroll
  for (int i = 0; i < kHeight; ++i) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) total[i][j] += sums[i][j];
  }
}

__global__ void __launch_bounds__(kThreads, 3) gram_kernel(const Gram all) {
  const Tile tile = tile_of(all, static_cast<int>(blockIdx.x));
  Sums total{};
  for (int64_t t = 0; t < all.n; t += all.chunk) {
    Sums sums;
    sum_chunk(all, tile, t, sums);
    add(sums, total);
  }
  write_tile(all, tile, total);
}

// A block a tile and chunk.
__global__ void __launch_bounds__(kThreads, 3) gram_chunk_kernel(const Gram all) {
  const Tile tile = tile_of(all, static_cast<int>(blockIdx.x));
  const int64_t t = blockIdx.y * all.chunk;
  Sums sums;
  sum_chunk(all, tile, t, sums);
  float* const to = scratch_of(all, blockIdx.y);
#pragma unroll
  for (int i = 0; i < kHeight; ++i) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) to[(i * kWidth + j) * kThreads] = sums[i][j];
  }
}

__global__ void __launch_bounds__(kThreads, 3) gram_finish_kernel(const Gram all) {
  Sums total{};
  for (int64_t chunk = 0; chunk * all.chunk < all.n; ++chunk) {
    const float* const from = scratch_of(all, chunk);
    Sums sums;
#pragma unroll
    for (int i = 0; i < kHeight; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[i][j] = from[(i * kWidth + j) * kThreads];
    }
    add(sums, total);
  }
  write_tile(all, tile_of(all, static_cast<int>(blockIdx.x)), total);
}

// Appends layers from `l` on, until there is no room; returns the first that is left.
int64_t append(const GramArgs& args, int64_t l, int64_t* matrix, Gram* all) {
  all->count = all->num_tiles = 0;
  int64_t shared_from = 0;  // the first column of the tile that the last layer is in
  for (; l < args.L && !all->full(); ++l) {
    const int64_t column = args.offsets[l], width = args.offsets[l + 1] - column;
    if (width == 0) continue;
    const bool shares = all->count > 0 && column + width - shared_from <= kTile;
    all->add({column, *matrix, static_cast<int32_t>(width), all->num_tiles - shares});
    if (!shares) {
      const int64_t across = ceil_div<int64_t>(width, kTile);
      all->num_tiles += static_cast<int>(across * (across + 1) / 2);
      shared_from = column;
    }
    *matrix += width * width;
  }
  return l;
}

int64_t chunk_of(int64_t n) {
  const int64_t least = ceil_div<int64_t>(n, kMaxChunks);
  return round_up(least > kMinChunk ? least : kMinChunk, kDepth);
}

}  // namespace

int64_t gram_scratch(const GramArgs& args) {
  const int64_t num_chunks = ceil_div(args.n, chunk_of(args.n));
  if (num_chunks <= 1) return 0;
  Gram all{};
  int64_t matrix = 0, num_tiles = 0;
  for (int64_t l = 0; l < args.L;) {
    l = append(args, l, &matrix, &all);
    num_tiles += all.num_tiles;
  }
  return num_tiles < kFewTiles ? num_chunks * num_tiles * kTile * kTile : 0;
}

cudaError_t gram(const GramArgs& args, float* scratch, cudaStream_t stream) {
  Gram all{};
  all.rows = args.rows;
  all.out = args.out;
  all.scratch = scratch;
  all.n = args.n;
  all.rows_stride = args.rows_stride;
  all.chunk = chunk_of(args.n);
  all.scale = args.scale;
  all.accumulate = args.accumulate;
  constexpr int64_t kSharedBytes = 4 * kDepth * kTile * sizeof(float);
  int64_t matrix = 0;
  for (int64_t l = 0; l < args.L;) {
    l = append(args, l, &matrix, &all);
    if (all.count == 0) break;
    const auto tiles = static_cast<unsigned>(all.num_tiles);
    if (!scratch) {
      const cudaError_t error =
          launch(gram_kernel, dim3(tiles), kThreads, kSharedBytes, stream, all);
      if (error != cudaSuccess) return error;
      continue;
    }
    const auto chunks = static_cast<unsigned>(ceil_div(args.n, all.chunk));
    cudaError_t error =
        launch(gram_chunk_kernel, dim3(tiles, chunks), kThreads, kSharedBytes, stream, all);
    if (error != cudaSuccess) return error;
    error = launch(gram_finish_kernel, dim3(tiles), kThreads, 0, stream, all);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace dropinf
