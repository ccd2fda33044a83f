"""sampled_norm in Triton: the statistics of every position, all sums by columns, the sampled ones.

Every part reads in order; x is read once for the statistics, and once more with dy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropinf.triton_kernels.chunks import chunk_length, weighted

# Not tuned on a GPU; docs/gpu.md has what an H200 took.
BLOCK_P = 4  # positions of a program that makes statistics, and columns at a time
BLOCK_I = 256
BLOCK_T = 16
BLOCK_C = 128  # columns of a program
BLOCK_R = 256
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["T", "I", "x_stride_b", "x_stride_t"])
def norm_statistics_kernel(
    x_ptr,  # [B, T, I]
    statistics_ptr,  # [3, B * T]: x normalised is (x - mean) * scale + shift
    num_positions,
    T,
    I,
    x_stride_b,
    x_stride_t,
    eps,
    RMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    num_blocks = tl.cdiv(T, BLOCK_P)
    b = (tl.program_id(0) // num_blocks).to(tl.int64)
    t = (tl.program_id(0) % num_blocks * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    there = t < T
    x_ptrs = x_ptr + b * x_stride_b + t * x_stride_t
    column = tl.arange(0, BLOCK_I)
    size = I.to(tl.float32)
    mean = tl.zeros([BLOCK_P], tl.float32)
    if not RMS:
        sums = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
        for i in range(0, I, BLOCK_I):
            inside = there[:, None] & (i + column < I)[None, :]
            x = tl.load(x_ptrs[:, None] + (i + column)[None, :], mask=inside, other=0.0)
            sums += x.to(tl.float32)
        mean = tl.sum(sums, 1) / size
    # The mean is rounded, as much as x is where x is far from 0: the shift mends that.
    rests = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    for i in range(0, I, BLOCK_I):
        inside = there[:, None] & (i + column < I)[None, :]
        x = tl.load(x_ptrs[:, None] + (i + column)[None, :], mask=inside, other=0.0)
        centred = tl.where(inside, x.to(tl.float32) - mean[:, None], 0.0)
        rests += centred
        squares += centred * centred
    rest = tl.zeros([BLOCK_P], tl.float32) if RMS else tl.sum(rests, 1) / size
    square = tl.sum(squares, 1) / size - rest * rest + eps
    scale = tl.rsqrt(tl.where(there, square, 1.0))
    to = statistics_ptr + b * T + t
    tl.store(to, mean, mask=there)
    tl.store(to + num_positions, scale, mask=there)
    tl.store(to + 2 * num_positions, -rest * scale, mask=there)


@triton.jit(
    do_not_specialize=[
        "T",
        "length",
        "num_chunks",
        "x_stride_b",
        "dy_stride_b",
    ]
)
def norm_sums_kernel(
    x_ptr,  # [B, T, I]
    dy_ptr,  # [B, T, I]
    statistics_ptr,  # [3, B * T]
    sums_ptr,  # [num_chunks, B, 2 I]
    num_positions,
    num_sums,  # of a chunk: B * 2 I
    T,
    I,
    length,  # positions of a chunk
    num_chunks,
    x_stride_b,
    x_stride_t,
    dy_stride_b,
    dy_stride_t,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_blocks = tl.cdiv(I, BLOCK_C)
    program = tl.program_id(0)
    chunk = program // num_blocks % num_chunks
    b = (program // num_blocks // num_chunks).to(tl.int64)
    column = program % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = column < I
    start = chunk * length
    stop = tl.minimum(start + length, T)
    products = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    totals = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for t in range(start, stop, BLOCK_T):
        position = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        in_t = position < stop
        of = statistics_ptr + b * T + position
        mean = tl.load(of, mask=in_t, other=0.0)
        scale = tl.load(of + num_positions, mask=in_t, other=0.0)
        shift = tl.load(of + 2 * num_positions, mask=in_t, other=0.0)
        inside = in_t[:, None] & in_row[None, :]
        x_at = b * x_stride_b + position[:, None] * x_stride_t + column[None, :]
        dy_at = b * dy_stride_b + position[:, None] * dy_stride_t + column[None, :]
        x = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + dy_at, mask=inside, other=0.0).to(tl.float32)
        products += dy * ((x - mean[:, None]) * scale[:, None] + shift[:, None])
        totals += dy
    sums_ptr += tl.cast(chunk, tl.int64) * num_sums + b * 2 * I
    tl.store(sums_ptr + column, tl.sum(products, 0), mask=in_row)
    tl.store(sums_ptr + I + column, tl.sum(totals, 0), mask=in_row)


@triton.jit(
    do_not_specialize=["num_chunks", "num_entries", "r", "s", "I", "out_stride_b", "out_stride_k"]
)
def norm_pick_kernel(
    sums_ptr,  # [num_chunks, B, 2 I]
    index_ptr,  # [r, s] int32
    weights_ptr,  # [r, s] float32 of summands; None for ones, or where s = 1
    entry_weights_ptr,  # [r]; None for ones, or where s > 1
    out_ptr,  # [B, r]
    num_chunks,
    num_sums,  # of a chunk
    num_entries,  # B * r
    r,
    s,
    I,
    out_stride_b,
    out_stride_k,
    BLOCK_R: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = at < num_entries
    b, k = at // r, at % r
    total = tl.zeros([BLOCK_R], tl.float32)
    for j in range(s):
        there = inside
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + k * s + j, mask=inside, other=0.0)
            there &= weight != 0
        i = tl.load(index_ptr + k * s + j, mask=there, other=0)
        good = there & (i >= 0) & (i < 2 * I)
        # A kernel cannot raise without a synchronisation: an index out of range shows as NaN.
        sum = tl.where(there & ~good, float("nan"), 0.0)
        for chunk in range(num_chunks):
            part = sums_ptr + tl.cast(chunk, tl.int64) * num_sums + b * 2 * I + i
            sum += tl.load(part, mask=good, other=0.0)
        if weights_ptr is not None:
            sum *= weight
        total += sum
    if entry_weights_ptr is not None:
        total = weighted(total, entry_weights_ptr, k, inside)
    tl.store(out_ptr + b * out_stride_b + k * out_stride_k, total, mask=inside)


def sampled_norm(
    x: Tensor,
    dy: Tensor,
    index: Tensor,
    weights: Tensor | None,
    rms: bool,
    eps: float,
    out: Tensor,
) -> Tensor:
    """out[b, k] = sum_j weights[k, j] * sums[b, index[k, j]]; see reference.sampled_norm.

    x and dy [B, T, I] with stride 1 in I; index and weights contiguous, both [r] or both [r, s]. A
    weight of 0 leaves its sum out. An entry with an index out of range among the others is NaN.
    """
    (B, T, I), r = x.shape, index.shape[0]
    if B * r == 0:
        return out
    s = index.shape[1:].numel()
    of_entries, of_summands = (weights, None) if s == 1 else (None, weights)
    num_chunks = triton.cdiv(T, chunk_length(T))
    sizes = 3 * B * T, num_chunks * B * 2 * I
    statistics, sums = (out.new_empty(n, dtype=torch.float32) for n in sizes)
    with torch.cuda.device_of(out):
        if sums.numel():
            norm_statistics_kernel[(triton.cdiv(T, BLOCK_P) * B,)](
                x,
                statistics,
                B * T,
                T,
                I,
                x.stride(0),
                x.stride(1),
                eps,
                RMS=rms,
                BLOCK_P=BLOCK_P,
                BLOCK_I=BLOCK_I,
                **OPTIONS,
            )
            norm_sums_kernel[(triton.cdiv(I, BLOCK_C) * num_chunks * B,)](
                x,
                dy,
                statistics,
                sums,
                B * T,
                B * 2 * I,
                T,
                I,
                chunk_length(T),
                num_chunks,
                x.stride(0),
                x.stride(1),
                dy.stride(0),
                dy.stride(1),
                BLOCK_T=BLOCK_T,
                BLOCK_C=BLOCK_C,
                **OPTIONS,
            )
        norm_pick_kernel[(triton.cdiv(B * r, BLOCK_R),)](
            sums,
            index,
            of_summands,
            of_entries,
            out,
            num_chunks,
            B * 2 * I,
            B * r,
            r,
            s,
            I,
            out.stride(0),
            out.stride(1),
            BLOCK_R=BLOCK_R,
            **OPTIONS,
        )
    return out
