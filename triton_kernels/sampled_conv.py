"""sampled_conv in Triton: as sampled_outer, with positions that are next to each other in memory.

Each coordinate walks along its two planes of x and dy, so no copy of x for the taps is made; planes
that several coordinates share come from L1 or L2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropinf.triton_kernels.chunks import add_chunks, chunk_length, partial_sums, products

# Not tuned on a GPU (docs/gpu.md has what an H200 took).
# Neighbouring lanes read neighbouring positions.
BLOCK_R = 16
BLOCK_T = 64
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

INTEGERS = [
    "T",
    "O",
    "I",
    "width",
    "r",
    "length",
    "num_chunks",
    "C_of_group",
    "O_of_group",
    *(f"{name}_{j}" for name in ("size", "size_out") for j in range(3)),
    *(f"{name}_{j}" for name in ("kernel", "stride", "padding", "dilation") for j in range(3)),
    *(f"{name}_stride_{j}" for name in ("x", "dy") for j in ("b", "c", 0, 1, 2)),
    "out_stride_c",
    "out_stride_b",
    "out_stride_k",
]


@triton.jit(do_not_specialize=INTEGERS)
def sampled_conv_kernel(
    x_ptr,  # [B, C, size_0, size_1, size_2]
    dy_ptr,  # [B, O, size_out_0, size_out_1, size_out_2]
    o_ptr,  # [r] int32
    i_ptr,  # [r] int32
    out_ptr,  # [num_chunks, B, r]
    T,  # positions of dy
    O,
    I,
    width,  # I, or I + 1 where column I is the bias
    r,
    length,  # positions of a chunk
    num_chunks,
    C_of_group,
    O_of_group,
    size_0,
    size_1,
    size_2,
    size_out_0,
    size_out_1,
    size_out_2,
    kernel_0,
    kernel_1,
    kernel_2,
    stride_0,
    stride_1,
    stride_2,
    padding_0,
    padding_1,
    padding_2,
    dilation_0,
    dilation_1,
    dilation_2,
    x_stride_b,
    x_stride_c,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    dy_stride_b,
    dy_stride_c,
    dy_stride_0,
    dy_stride_1,
    dy_stride_2,
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
    i = tl.load(i_ptr + k, mask=in_r, other=0)
    good = (o >= 0) & (o < O) & (i >= 0) & (i < width)
    is_bias = good & (i == I)

    # The tap of each coordinate: where it reads for position 0.
    channel = o // O_of_group * C_of_group + i // (kernel_0 * kernel_1 * kernel_2)
    q_0 = i // (kernel_1 * kernel_2) % kernel_0 * dilation_0 - padding_0
    q_1 = i // kernel_2 % kernel_1 * dilation_1 - padding_1
    q_2 = i % kernel_2 * dilation_2 - padding_2
    x_ptr += b * x_stride_b
    dy_ptr += b * dy_stride_b
    x_channel = channel.to(tl.int64)[:, None] * x_stride_c
    dy_channel = o.to(tl.int64)[:, None] * dy_stride_c

    sums = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    for t in range(start, stop, BLOCK_T):
        position = t + tl.arange(0, BLOCK_T)
        in_t = position < stop
        p_0 = position // size_out_2 // size_out_1
        p_1 = position // size_out_2 % size_out_1
        p_2 = position % size_out_2
        at_0 = q_0[:, None] + (p_0 * stride_0)[None, :]
        at_1 = q_1[:, None] + (p_1 * stride_1)[None, :]
        at_2 = q_2[:, None] + (p_2 * stride_2)[None, :]
        in_x = (at_0 >= 0) & (at_0 < size_0) & (at_1 >= 0) & (at_1 < size_1)
        in_x &= (at_2 >= 0) & (at_2 < size_2) & (is_bias == 0)[:, None]
        used = good[:, None] & in_t[None, :]
        x_at = x_channel + at_0.to(tl.int64) * x_stride_0
        x_at += at_1.to(tl.int64) * x_stride_1 + at_2.to(tl.int64) * x_stride_2
        dy_at = p_0.to(tl.int64) * dy_stride_0 + p_1.to(tl.int64) * dy_stride_1
        dy_at += p_2.to(tl.int64) * dy_stride_2
        dy_ptrs = dy_ptr + dy_channel + dy_at[None, :]
        terms = products(x_ptr + x_at, used & in_x, dy_ptrs, used)
        # What is not in x is the bias, or padding: 0 times what is not finite is NaN.
        zeros = tl.where(tl.abs(terms) < float("inf"), 0.0, float("nan"))
        sums += tl.where(in_x | is_bias[:, None], terms, zeros)
    # A kernel cannot raise without a synchronisation: an index out of range shows as NaN.
    entries = tl.where(good, tl.sum(sums, 1), float("nan"))
    out_ptr += tl.cast(chunk, tl.int64) * out_stride_c + b * out_stride_b
    tl.store(out_ptr + k.to(tl.int64) * out_stride_k, entries, mask=in_r)


def sampled_conv(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    weights: Tensor | None,
    out: Tensor,
) -> Tensor:
    """out[b, k] = weights[k] * sum_p dy[b, o, p] * x[b, g * C / groups + c, p s + q d - padding],

    where o = o_idx[k], g is its group, (c, q) = unravel(i_idx[k]), and x is 0 outside its sizes.
    x [B, C, *S] and dy [B, O, *S'] of any strides. An entry with an index out of range is NaN,
    unless its weight is 0.
    """
    (B, C, *size), O, r = x.shape, dy.shape[1], o_idx.shape[0]
    if B * r == 0:
        return out
    missing = 3 - len(size)

    def three(values: Sequence[int], filler: int) -> list[int]:
        return [filler] * missing + list(values)

    T, I = dy[0, 0].numel() if O else 0, C // groups * math.prod(kernel_size)
    # With the weights in this kernel, fewer of its blocks fit an SM.
    parts, num_chunks = partial_sums(T, out, weighted=weights is not None)
    with torch.cuda.device_of(out):
        sampled_conv_kernel[(triton.cdiv(r, BLOCK_R) * num_chunks * B,)](
            x,
            dy,
            o_idx,
            i_idx,
            parts,
            T,
            O,
            I,
            I + bias,
            r,
            chunk_length(T),
            num_chunks,
            C // groups,
            max(1, O // groups),
            *three(size, 1),
            *three(dy.shape[2:], 1),
            *three(kernel_size, 1),
            *three(stride, 1),
            *three(padding, 0),
            *three(dilation, 1),
            *x.stride()[:2],
            *three(x.stride()[2:], 0),
            *dy.stride()[:2],
            *three(dy.stride()[2:], 0),
            *parts.stride(),
            BLOCK_T=BLOCK_T,
            BLOCK_R=BLOCK_R,
            **OPTIONS,
        )
        if num_chunks > 1 or weights is not None:
            add_chunks(parts, weights, out)
    return out
