"""gram in Triton: one launch for each run of neighbouring layers of equal r.

Triton takes no arrays by value, and a table of the layers on the device would have to be copied
there first: a synchronisation, or a copy that another stream or a CUDA graph may overtake. Layers
of one size are an arithmetic progression, which needs no table, and most plans give nearly all
layers the same r; where sizes alternate, it is a launch a layer.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not tuned on a GPU (docs/gpu.md has what an H200 took).
# A tile is BLOCK_R x BLOCK_R, of r alone: it is part of what fixes the bits.
MAX_BLOCK_R = 64
MIN_BLOCK_R = 16  # the least that tl.dot takes
BLOCK_N = 16
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["n", "r", "first_column", "first_entry", "rows_stride_n", "scale"])
def gram_kernel(
    rows_ptr,  # [n, R] float32
    out_ptr,  # [Σ r_l²] float32
    n,
    r,
    first_column,  # of the run's first layer
    first_entry,
    rows_stride_n,
    scale,
    accumulate,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(r, BLOCK_R)
    program = tl.program_id(0)
    layer = (program // (tiles * tiles)).to(tl.int64)
    row = program // tiles % tiles * BLOCK_R
    column = program % tiles * BLOCK_R
    if (row < column) & (accumulate != 0):
        return
    i = row + tl.arange(0, BLOCK_R)
    j = column + tl.arange(0, BLOCK_R)
    in_i, in_j = i < r, j < r
    rows_ptr += first_column + layer * r

    sums = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
    if row >= column:
        for start in range(0, n, BLOCK_N):
            at = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            in_n = at < n
            left_at = at[None, :] * rows_stride_n + i[:, None]
            right_at = at[:, None] * rows_stride_n + j[None, :]
            left = tl.load(rows_ptr + left_at, mask=in_n[None, :] & in_i[:, None], other=0.0)
            right = tl.load(rows_ptr + right_at, mask=in_n[:, None] & in_j[None, :], other=0.0)
            sums = tl.dot(left, right, sums, input_precision="ieee")

    size = tl.cast(r, tl.int64)
    to = out_ptr + first_entry + layer * size * size + i.to(tl.int64)[:, None] * size + j[None, :]
    inside = in_i[:, None] & in_j[None, :]
    lower = i[:, None] >= j[None, :]
    entries = tl.where(lower, sums * scale, 0.0)
    if accumulate != 0:
        inside &= lower
        entries += tl.load(to, mask=inside, other=0.0)
    tl.store(to, entries, mask=inside)


def gram(rows: Tensor, offsets: Tensor, scale: float, accumulate: bool, out: Tensor) -> Tensor:
    """out's matrix l (+)= scale * rows_lᵀ rows_l, lower triangle; zeros above.

    rows [n, R] float32 with stride 1 in R; offsets [L + 1] int64 on the CPU.
    """
    column, entry = 0, 0
    with torch.cuda.device_of(out):
        for r, run in itertools.groupby(offsets.diff().tolist()):
            num_layers = len(list(run))
            if r > 0:
                block = min(MAX_BLOCK_R, max(MIN_BLOCK_R, triton.next_power_of_2(r)))
                gram_kernel[(num_layers * triton.cdiv(r, block) ** 2,)](
                    rows,
                    out,
                    rows.shape[0],
                    r,
                    column,
                    entry,
                    rows.stride(0),
                    scale,
                    int(accumulate),
                    BLOCK_R=block,
                    BLOCK_N=BLOCK_N,
                    **OPTIONS,
                )
            column += num_layers * r
            entry += num_layers * r * r
    return out
