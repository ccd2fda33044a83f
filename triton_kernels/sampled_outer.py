"""sampled_outer in Triton, for r up to about 512 coordinates of a layer (predicted).

Each coordinate gathers its two columns through L1, so the traffic grows with r: past about 512 the
rows that are staged in shared memory, which Triton cannot gather from, are worth more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropinf.triton_kernels.chunks import (
    add_chunks,
    chunk_length,
    partial_sums,
    products,
    weighted,
)

# Not tuned on a GPU (docs/gpu.md has what an H200 took).
# Coordinates are sorted by o, so neighbouring lanes share sectors of dy.
BLOCK_T = 16
BLOCK_R = 64
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit(
    do_not_specialize=[
        "T",
        "I",
        "O",
        "width",
        "r",
        "s",
        "length",
        "num_chunks",
        "x_stride_b",
        "x_stride_t",
        "dy_stride_b",
        "dy_stride_t",
        "out_stride_c",
        "out_stride_b",
        "out_stride_k",
    ]
)
def sampled_outer_kernel(
    x_ptr,  # [B, T, I]
    dy_ptr,  # [B, T, O]
    o_ptr,  # [r, s] int32
    i_ptr,  # [r, s] int32
    weights_ptr,  # [r, s] float32 of summands; None for ones, or where s = 1
    entry_weights_ptr,  # [r]; None for ones, where s > 1, or where there are more chunks
    out_ptr,  # [num_chunks, B, r]
    T,
    I,
    O,
    width,  # I, or I + 1 where column I is the bias
    r,
    s,
    length,  # positions of a chunk
    num_chunks,
    x_stride_b,
    x_stride_t,
    dy_stride_b,
    dy_stride_t,
    out_stride_c,
    out_stride_b,
    out_stride_k,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # Blocks of coordinates are next to each other: they read the same rows of x and dy.
    num_blocks = tl.cdiv(r, BLOCK_R)
    program = tl.program_id(0)
    chunk = program // num_blocks % num_chunks
    b = (program // num_blocks // num_chunks).to(tl.int64)
    k = program % num_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r = k < r
    start = chunk * length
    stop = tl.minimum(start + length, T)

    sums = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    bad = tl.zeros([BLOCK_R], tl.int32)
    for j in range(s):
        there = in_r
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + k * s + j, mask=in_r, other=0.0)
            there &= weight != 0
        o = tl.load(o_ptr + k * s + j, mask=there, other=0)
        i = tl.load(i_ptr + k * s + j, mask=there, other=0)
        in_dy = there & (o >= 0) & (o < O)
        in_x = there & (i >= 0) & (i < I)
        bad = tl.where(there & ~(in_dy & (i >= 0) & (i < width)), 1, bad)
        for t in range(start, stop, BLOCK_T):
            position = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
            in_t = position < stop
            x_at = b * x_stride_b + position[:, None] * x_stride_t + i[None, :]
            dy_at = b * dy_stride_b + position[:, None] * dy_stride_t + o[None, :]
            # The bias is what is not in x.
            in_x_t, in_dy_t = in_t[:, None] & in_x[None, :], in_t[:, None] & in_dy[None, :]
            terms = products(x_ptr + x_at, in_x_t, dy_ptr + dy_at, in_dy_t)
            if weights_ptr is not None:
                terms *= weight[None, :]
            sums += terms
    # A kernel cannot raise without a synchronisation: an index out of range shows as NaN.
    entries = tl.where(bad != 0, float("nan"), tl.sum(sums, 0))
    if entry_weights_ptr is not None:
        entries = weighted(entries, entry_weights_ptr, k, in_r)
    out_ptr += tl.cast(chunk, tl.int64) * out_stride_c + b * out_stride_b
    tl.store(out_ptr + k.to(tl.int64) * out_stride_k, entries, mask=in_r)


def sampled_outer(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    weights: Tensor | None,
    bias: bool,
    order: Sequence[Tensor],
    out: Tensor,
) -> Tensor:
    """out[b, k] = sum_j weights[k, j] * sum_t dy[b, t, o_idx[k, j]] * x[b, t, i_idx[k, j]].

    x [B, T, I] and dy [B, T, O] with stride 1 in I and O; o_idx, i_idx and weights contiguous, all
    [r] or all [r, s]. A weight of 0 leaves its coordinate out. An entry with an index out of range
    among the others is NaN. `order` is for kernels that stage rows.
    """
    (B, T, I), O, r = x.shape, dy.shape[2], o_idx.shape[0]
    if B * r == 0:
        return out
    s = o_idx.shape[1:].numel()
    of_entries, of_summands = (weights, None) if s == 1 else (None, weights)
    parts, num_chunks = partial_sums(T, out)
    with torch.cuda.device_of(out):
        sampled_outer_kernel[(triton.cdiv(r, BLOCK_R) * num_chunks * B,)](
            x,
            dy,
            o_idx,
            i_idx,
            of_summands,
            of_entries if num_chunks == 1 else None,
            parts,
            T,
            I,
            O,
            I + bias,
            r,
            s,
            chunk_length(T),
            num_chunks,
            x.stride(0),
            x.stride(1),
            dy.stride(0),
            dy.stride(1),
            *parts.stride(),
            BLOCK_T=BLOCK_T,
            BLOCK_R=BLOCK_R,
            **OPTIONS,
        )
        if num_chunks > 1:
            add_chunks(parts, of_entries, out)
    return out
