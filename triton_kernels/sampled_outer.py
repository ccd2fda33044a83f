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

from dropinf.triton_kernels.chunks import add_chunks, chunk_length, partial_sums, products

# Not measured on a GPU. Coordinates are sorted by o, so neighbouring lanes share sectors of dy.
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
        "scale",
    ]
)
def sampled_outer_kernel(
    x_ptr,  # [B, T, I]
    dy_ptr,  # [B, T, O]
    o_ptr,  # [r, s] int32
    i_ptr,  # [r, s] int32
    sign_ptr,  # [r, s] int8, or None for signs of +1
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
    scale,
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
        o = tl.load(o_ptr + k * s + j, mask=in_r, other=0)
        i = tl.load(i_ptr + k * s + j, mask=in_r, other=0)
        in_dy = in_r & (o >= 0) & (o < O)
        in_x = in_r & (i >= 0) & (i < I)
        bad = tl.where(in_dy & (i >= 0) & (i < width), bad, 1)
        if sign_ptr is not None:
            sign = tl.load(sign_ptr + k * s + j, mask=in_r, other=0).to(tl.float32)
            bad = tl.where((sign >= -1) & (sign <= 1), bad, 1)
            in_dy &= sign != 0
            in_x &= sign != 0
        for t in range(start, stop, BLOCK_T):
            position = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
            in_t = position < stop
            x_at = b * x_stride_b + position[:, None] * x_stride_t + i[None, :]
            dy_at = b * dy_stride_b + position[:, None] * dy_stride_t + o[None, :]
            # The bias is what is not in x.
            in_x_t, in_dy_t = in_t[:, None] & in_x[None, :], in_t[:, None] & in_dy[None, :]
            terms = products(x_ptr + x_at, in_x_t, dy_ptr + dy_at, in_dy_t)
            if sign_ptr is not None:
                terms *= sign[None, :]
            sums += terms
    # A kernel cannot raise without a synchronisation: an index out of range shows as NaN.
    entries = tl.where(bad != 0, float("nan"), tl.sum(sums, 0) * scale)
    out_ptr += tl.cast(chunk, tl.int64) * out_stride_c + b * out_stride_b
    tl.store(out_ptr + k.to(tl.int64) * out_stride_k, entries, mask=in_r)


def sampled_outer(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    sign: Tensor | None,
    bias: bool,
    scale: float,
    order: Sequence[Tensor],
    out: Tensor,
) -> Tensor:
    """out[b, k] = scale * sum_j sign[k, j] * sum_t dy[b, t, o_idx[k, j]] * x[b, t, i_idx[k, j]].

    x [B, T, I] and dy [B, T, O] with stride 1 in I and O; o_idx and i_idx contiguous. An entry
    with an index out of range, or a sign that is none of -1, 0 and 1, is NaN. A sign of 0 leaves
    its coordinate out. `order` is for kernels that stage rows.
    """
    (B, T, I), O, r = x.shape, dy.shape[2], o_idx.shape[0]
    if B * r == 0:
        return out
    parts, num_chunks = partial_sums(T, out)
    with torch.cuda.device_of(out):
        sampled_outer_kernel[(triton.cdiv(r, BLOCK_R) * num_chunks * B,)](
            x,
            dy,
            o_idx,
            i_idx,
            sign,
            parts,
            T,
            I,
            O,
            I + bias,
            r,
            1 if sign is None else sign.shape[1],
            chunk_length(T),
            num_chunks,
            x.stride(0),
            x.stride(1),
            dy.stride(0),
            dy.stride(1),
            *parts.stride(),
            scale if num_chunks == 1 else 1.0,
            BLOCK_T=BLOCK_T,
            BLOCK_R=BLOCK_R,
            **OPTIONS,
        )
        if num_chunks > 1:
            add_chunks(parts, scale, out)
    return out
