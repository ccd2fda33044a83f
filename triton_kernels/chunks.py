"""A long sum over positions in chunks: how it is cut, and how the parts are added up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not tuned on a GPU (docs/gpu.md has what an H200 took).
# Of T alone, never of the batch or of the device: the bits of a row depend
# on how its sum is cut.
CHUNK_T = 64  # positions, for T up to CHUNK_T * MAX_CHUNKS; then a multiple of it
MAX_CHUNKS = 64  # bounds the scratch at this many outputs

BLOCK = 256
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def chunk_length(T: int) -> int:
    """Positions a program sums: all chunks of T positions but the last are this long."""
    return CHUNK_T * max(1, triton.cdiv(T, CHUNK_T * MAX_CHUNKS))


def partial_sums(T: int, out: Tensor, weighted: bool = False) -> tuple[Tensor, int]:
    """Where the chunks' sums go, [num_chunks, B, r] float32, and num_chunks.

    One chunk needs no scratch, unless it is to be weighted after: then that is a view of `out`.
    """
    num_chunks = max(1, triton.cdiv(T, chunk_length(T)))
    if num_chunks == 1 and not weighted:
        return out.unsqueeze(0), 1
    return out.new_empty((num_chunks, *out.shape), dtype=torch.float32), num_chunks


@triton.jit
def products(x_ptrs, in_x, dy_ptrs, in_dy):
    """x * dy in float32 of a tile [M, N]; x is 1 outside of `in_x`, dy is 0 outside of `in_dy`.

    Loads are flat, so that neighbouring lanes read neighbouring columns. Of [M, N], where no two
    addresses are known to be neighbours, they read rows with Triton 3.6, columns with 3.9.
    """
    flat: tl.constexpr = [x_ptrs.numel]
    x = tl.load(tl.reshape(x_ptrs, flat), mask=tl.reshape(in_x, flat), other=1.0)
    dy = tl.load(tl.reshape(dy_ptrs, flat), mask=tl.reshape(in_dy, flat), other=0.0)
    return tl.reshape(x.to(tl.float32) * dy.to(tl.float32), x_ptrs.shape)


@triton.jit
def weighted(sums, weights_ptr, k, in_r):
    """Finished sums times the weights at k, 0 where the weight is, whatever the sum."""
    weight = tl.load(weights_ptr + k, mask=in_r, other=0.0)
    return tl.where(weight == 0, 0.0, sums * weight)


@triton.jit(do_not_specialize=["num_chunks", "num_elements", "r", "out_stride_b", "out_stride_k"])
def add_chunks_kernel(
    parts_ptr,  # [num_chunks, B, r] float32
    weights_ptr,  # [r] float32, or None for ones
    out_ptr,  # [B, r]
    num_chunks,
    num_elements,  # B * r
    r,
    out_stride_b,
    out_stride_k,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    for chunk in range(num_chunks):
        part = tl.cast(chunk, tl.int64) * num_elements + at
        total += tl.load(parts_ptr + part, mask=inside, other=0.0)
    if weights_ptr is not None:
        total = weighted(total, weights_ptr, at % r, inside)
    to = at // r * out_stride_b + at % r * out_stride_k
    tl.store(out_ptr + to, total, mask=inside)


def add_chunks(parts: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """out = weights * parts.sum(0), in the order of the chunks."""
    num_chunks, B, r = parts.shape
    add_chunks_kernel[(triton.cdiv(B * r, BLOCK),)](
        parts,
        weights,
        out,
        num_chunks,
        B * r,
        r,
        out.stride(0),
        out.stride(1),
        BLOCK=BLOCK,
        **OPTIONS,
    )
