"""sampled_embedding in Triton: every position is compared with every coordinate.

That is B * T * r comparisons of integers, which a GPU does faster than it would build the lists of
positions of each token (predicted), and it needs no atomics; dy is read only where they agree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropinf.triton_kernels.chunks import add_chunks, chunk_length, partial_sums

# Not tuned on a GPU; docs/gpu.md has what an H200 took.
BLOCK_T = 16
BLOCK_R = 64
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit(
    do_not_specialize=[
        "T",
        "O",
        "r",
        "length",
        "num_chunks",
        "dy_stride_b",
        "dy_stride_t",
        "out_stride_c",
        "out_stride_b",
        "out_stride_k",
    ]
)
def sampled_embedding_kernel(
    ids_ptr,  # [B, T] int64
    dy_ptr,  # [B, T, O]
    o_ptr,  # [r] int32
    i_ptr,  # [r] int32
    out_ptr,  # [num_chunks, B, r]
    T,
    O,
    r,
    length,  # positions of a chunk
    num_chunks,
    dy_stride_b,
    dy_stride_t,
    out_stride_c,
    out_stride_b,
    out_stride_k,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    num_blocks = tl.cdiv(r, BLOCK_R)
    program = tl.program_id(0)
    chunk = program // num_blocks % num_chunks
    b = (program // num_blocks // num_chunks).to(tl.int64)
    k = program % num_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r = k < r
    start = chunk * length
    stop = tl.minimum(start + length, T)
    o = tl.load(o_ptr + k, mask=in_r, other=0)
    i = tl.load(i_ptr + k, mask=in_r, other=-1)
    good = (o >= 0) & (o < O) & (i >= 0)

    sums = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for t in range(start, stop, BLOCK_T):
        position = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        token = tl.load(ids_ptr + b * T + position, mask=position < stop, other=-1)
        meet = (token[:, None] == i[None, :]) & good[None, :]
        dy_at = b * dy_stride_b + position[:, None] * dy_stride_t + o[None, :]
        sums += tl.load(dy_ptr + dy_at, mask=meet, other=0.0).to(tl.float32)
    # A kernel cannot raise without a synchronisation: an index out of range shows as NaN.
    entries = tl.where(good, tl.sum(sums, 0), float("nan"))
    out_ptr += tl.cast(chunk, tl.int64) * out_stride_c + b * out_stride_b
    tl.store(out_ptr + k.to(tl.int64) * out_stride_k, entries, mask=in_r)


def sampled_embedding(
    ids: Tensor, dy: Tensor, o_idx: Tensor, i_idx: Tensor, weights: Tensor | None, out: Tensor
) -> Tensor:
    """out[b, k] = weights[k] * sum over t with ids[b, t] == i_idx[k] of dy[b, t, o_idx[k]].

    ids [B, T] int64 contiguous, dy [B, T, O] with stride 1 in O; i_idx in any order. An entry with
    o_idx out of range or a negative token is NaN, unless its weight is 0.
    """
    (B, T, O), r = dy.shape, o_idx.shape[0]
    if B * r == 0:
        return out
    # With the weights in this kernel, fewer of its blocks fit an SM.
    parts, num_chunks = partial_sums(T, out, weighted=weights is not None)
    with torch.cuda.device_of(out):
        sampled_embedding_kernel[(triton.cdiv(r, BLOCK_R) * num_chunks * B,)](
            ids,
            dy,
            o_idx,
            i_idx,
            parts,
            T,
            O,
            r,
            chunk_length(T),
            num_chunks,
            dy.stride(0),
            dy.stride(1),
            *parts.stride(),
            BLOCK_T=BLOCK_T,
            BLOCK_R=BLOCK_R,
            **OPTIONS,
        )
        if num_chunks > 1 or weights is not None:
            add_chunks(parts, weights, out)
    return out
