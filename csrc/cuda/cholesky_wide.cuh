// Layers that one block's shared memory does not hold: kBlock columns a step, of all layers in the
// same two launches. What is left of a matrix lies in the factors' memory.
//
//     panel_kernel    rows below the step's block on the diagonal, solved with its factor
//     update_kernel   every tile further right, less the products of those rows; the block that has
//                     the next tile on the diagonal factorises it, while others still multiply
//
// A first update without products factorises the first tile. Layers are sorted, so that those with
// a step left are the first ones. A layer's own last launch, a single tile, fills it with NaN if
// one of its pivots was bad; until then its sums go on with whatever that pivot left.
//
// Solutions: one launch, in which a block has kRows right-hand sides of a layer and goes down its
// factor and up again; a tile is read while the one before is multiplied. The products' sums start
// from zero and are then subtracted: sums that start from what they are subtracted from have three
// times the residual.
//
// Measured for 50 layers on an H200: 255 µs at r = 512 and 1243 at 1024 (torch 876 and 3215), with
// 16 right-hand sides 422 and 1924. Predicted for it (132 SMs at 1.75 GHz, 67 TFLOP/s, 4.3 TB/s). A
// tile is 64³ multiply-adds: 2048 cycles of an SM at its peak, 3400 at the 60% expected here (256
// of the loop's 287 instructions multiply; the rest is for loads that nothing hides). A tile on the
// diagonal takes 8.5 µs (load 1000 cycles, products 2500, factor 11000), rows of a panel 3.6 µs
// (load 1500, 56 sums of 60 cycles and 8 corners of 150), 4.5 where there are many, a launch 2 µs.
//
//     r                                             512                1024
//     tiles a layer, over all updates               84                  680
//     updates: arithmetic, µs                       62                  500
//       late ones, which wait for the factor, µs   +20                  +20
//     panels, µs                                    25                   68
//     15 and 31 launches, first tile, µs            37                   69
//     together, µs                                 145                  660
//     DRAM (the tiles' reads and writes), µs       (in the L2)          260, behind the arithmetic
//     16 right-hand sides, µs                       75                  230
//
// of which the last are 2 x 36 (136) tiles of 1150 cycles, 664 of them products, and 2 x 8 (16)
// triangles of 2800, on 50 SMs. torch's batched factorization, cuSOLVER's potrfBatched, was
// measured elsewhere at 1261 µs for 64 layers of 512, 985 for 50: 6.8 times as long.

#pragma once

#include <algorithm>

#include "cholesky.h"
#include "cuda/cholesky_wide_factor.cuh"
#include "cuda/cholesky_wide_solve.cuh"

namespace dropinf {
namespace cuda {

// Factorises and solves as `args` says, for these layers, of which the first is the widest.
inline cudaError_t cholesky_wide(const CholeskyArgs& args, const Layer* layers, int64_t num_layers,
                                 cudaStream_t stream) {
  wide::Layers all{};
  all.shift = args.shift;
  all.info = args.info;
  all.rows = args.rows;
  all.solved = args.solved;
  all.m = args.m;
  all.rows_stride = args.rows_stride;
  all.solved_stride = args.solved_stride;
  for (int64_t k = 0; k < num_layers; k += all.count) {
    all.count = static_cast<int>(std::min<int64_t>(num_layers - k, wide::kMaxLayers));
    std::copy_n(layers + k, all.count, all.layers);
    all.matrices = args.matrices;
    if (args.info) {
      all.factors = args.factors;
      const cudaError_t error = wide::factor(all, stream);
      if (error != cudaSuccess) return error;
      all.matrices = args.factors;
    }
    if (args.m == 0) continue;
    const cudaError_t error = wide::solve(all, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace dropinf
