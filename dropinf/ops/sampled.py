"""Sampled entries of each example's weight gradient, from a layer's input and output gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dropinf.ops.bank_schedule import StagedOrder
from dropinf.ops.checks import (
    check_coordinates,
    check_floating,
    check_same,
    describe,
    output_of,
    unit_stride,
)
from dropinf.ops.dispatch import kernel


def sampled_outer(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    *,
    sign: Tensor | None = None,
    bias: bool = False,
    scale: float = 1.0,
    order: StagedOrder | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled entries of each example's weight gradient.

    out[b, k] = scale * sum_t dy[b, t, o_idx[k]] * x[b, t, i_idx[k]]

    Equal to einsum("bto,bti->boi", dy, x)[:, o_idx, i_idx] * scale, without the [B, O, I] tensor.

    Args:
        x: [B, T, I] layer input, float32, bfloat16 or float16 (float64 on `reference`).
        dy: [B, T, O] gradient of the summed loss at the layer's output, dtype of x.
        o_idx, i_idx: [r] int32, fastest when sorted by (o, i); or [r, s] with `sign`.
        sign: [r, s] int8 of +1 and -1: entry k is the signed sum of its s coordinates. 0 leaves a
            coordinate out, for entries of fewer than s; its index must still be in range.
        bias: let i_idx = I name the layer's bias, a virtual input column of ones.
        scale: factor of every entry.
        order: of these coordinates, from `bank_schedule.staged_order`. Backends other than cuda
            ignore it; it changes rounding nowhere but on cuda.
        out: [B, r] floating point to write into; any strides, so a slice of a packed row will do.
        backend: a name from `dropinf.backends()`; None takes the first available.

    Returns:
        [B, r] float32 (float64 for float64 inputs): `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, a sign is none, or an input requires grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "sampled_outer"
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be [B, T, I], got {tuple(x.shape)}")
    B, T = x.shape[:2]
    if dy.dim() != 3 or dy.shape[:2] != x.shape[:2]:
        raise ValueError(f"{op}: dy must be [B={B}, T={T}, O], got {tuple(dy.shape)}")
    check_floating(op, "x", x)
    check_same(op, "dy", dy, x.dtype, x.device)
    wanted = ("[r] without sign", 1) if sign is None else ("[r, s] with sign", 2)
    check_coordinates(op, o_idx, i_idx, x.device, *wanted)
    if sign is not None:
        check_same(op, "sign", sign, torch.int8, x.device)
        if sign.shape != o_idx.shape:
            raise ValueError(
                f"{op}: sign must have o_idx's shape {tuple(o_idx.shape)}, got {tuple(sign.shape)}"
            )
        sign = sign.contiguous()
    if order is not None:
        _check_order(op, order, o_idx.shape[0], x)
    out = output_of(op, out, (B, o_idx.shape[0]), x.dtype, x.device)
    call = kernel(op, backend, x.device, (x.dtype,), out.dtype)
    call(
        unit_stride(x),
        unit_stride(dy),
        o_idx.contiguous(),
        i_idx.contiguous(),
        sign,
        bias,
        scale,
        () if order is None else order[:3],
        out,
    )
    return out


def factored_outer(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor | None,
    i_idx: Tensor | None,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A grid of entries of each example's weight gradient, as one product of gathered columns.

    out[b, p * b' + q] = scale * sum_t dy[b, t, o_idx[p]] * x[b, t, i_idx[q]]

    Equal to (einsum("bto,bti->boi", dy, x) * scale)[:, o_idx][:, :, i_idx].flatten(1), without the
    [B, O, I] tensor. The columns are gathered by torch, and the product is its `bmm`.

    Args:
        x: [B, T, I] layer input, float32, bfloat16, float16 or float64.
        dy: [B, T, O] gradient of the summed loss at the layer's output, dtype of x.
        o_idx: [a] int64 columns of dy; None for all, which are then not copied (unless they are of
            half precision).
        i_idx: [b'] int64 columns of x, or None likewise.
        scale: factor of every entry.
        out: [B, a * b'] floating point to write into; any strides.
        backend: `reference`, or None.

    Returns:
        [B, a * b'] float32 (float64 for float64 inputs): `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an input requires grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "factored_outer"
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be [B, T, I], got {tuple(x.shape)}")
    B, T = x.shape[:2]
    if dy.dim() != 3 or dy.shape[:2] != x.shape[:2]:
        raise ValueError(f"{op}: dy must be [B={B}, T={T}, O], got {tuple(dy.shape)}")
    check_floating(op, "x", x)
    check_same(op, "dy", dy, x.dtype, x.device)
    sides = []
    for name, index, columns in (("o_idx", o_idx, dy), ("i_idx", i_idx, x)):
        if index is None:
            sides.append(columns.shape[2])
            continue
        check_same(op, name, index, torch.int64, x.device)
        if index.dim() != 1:
            raise ValueError(f"{op}: {name} must have one dimension, got {tuple(index.shape)}")
        sides.append(len(index))
    out = output_of(op, out, (B, sides[0] * sides[1]), x.dtype, x.device)
    call = kernel(op, backend, x.device, (x.dtype,), out.dtype)
    call(x, dy, o_idx, i_idx, scale, out)
    return out


def sampled_embedding(
    ids: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled entries of each example's embedding gradient.

    out[b, k] = scale * sum over t with ids[b, t] == i_idx[k] of dy[b, t, o_idx[k]]

    Equal to sampled_outer(one_hot(ids), dy, o_idx, i_idx, scale=scale), without the one-hot
    tensor: a lookup is a linear layer without a bias whose input is one-hot.

    Args:
        ids: [B, T] int64 or int32 looked-up indices; a negative one contributes nothing.
        dy: [B, T, O] gradient of the summed loss at the lookup's output, O the embedding's width.
        o_idx: [r] int32 columns.
        i_idx: [r] int32 sorted rows of the embedding table, from 0; how many it has is not known
            here, so a row that no id names is 0 and no error.
        scale, out, backend: as in `sampled_outer`.

    Returns:
        [B, r] float32 (float64 for float64 inputs): `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, i_idx is not sorted, or an input requires
            grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "sampled_embedding"
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: ids must be [B, T] int64 or int32, got {describe(ids)}")
    B, T = ids.shape
    if dy.dim() != 3 or dy.shape[:2] != ids.shape:
        raise ValueError(f"{op}: dy must be [B={B}, T={T}, O], got {tuple(dy.shape)}")
    check_floating(op, "dy", dy)
    check_same(op, "ids", ids, ids.dtype, dy.device)
    check_coordinates(op, o_idx, i_idx, dy.device, "[r]", 1)
    out = output_of(op, out, (B, o_idx.shape[0]), dy.dtype, dy.device)
    call = kernel(op, backend, dy.device, (dy.dtype,), out.dtype)
    call(
        ids.long().contiguous(),
        unit_stride(dy),
        o_idx.contiguous(),
        i_idx.contiguous(),
        scale,
        out,
    )
    return out


def sampled_conv(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    scale: float = 1.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled entries of each example's convolution-weight gradient.

    out[b, k] = scale * sum_p dy[b, o, p] * x[b, g * C / groups + c, p * stride + q * dilation
    - padding], where o = o_idx[k], g = o // (O / groups) is its group, (c, q) = unravel(i_idx[k])
    in (C / groups, *kernel_size), and x counts as zeros outside its sizes: times a dy that is not
    finite they are NaN.

    So o_idx * I + i_idx, with I = C / groups * prod(kernel_size), is the position in the flattened
    weight [O, C / groups, *kernel_size]. For a transposed convolution, whose weight is
    [C, O / groups, *kernel_size], exchange the two: its dy is `x` here and its x is `dy`.

    Args:
        x: [B, C, *S] layer input, 1 to 3 spatial dimensions, float32, bfloat16 or float16 (float64
            on `reference`).
        dy: [B, O, *S'] gradient of the summed loss at the layer's output, dtype of x.
        o_idx, i_idx: [r] int32, fastest when sorted by (o, i).
        kernel_size, stride, padding, dilation: one int for each spatial dimension. Padding is that
            of the low side; S' implies the high side's, and may be anything.
        groups: of the channels, as in torch.
        bias: let i_idx = I name the layer's bias, a virtual input of ones.
        scale, out, backend: as in `sampled_outer`.

    Returns:
        [B, r] float32 (float64 for float64 inputs): `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an input requires grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "sampled_conv"
    n = x.dim() - 2
    if not 1 <= n <= 3:
        raise ValueError(
            f"{op}: x must be [B, C, *S] with 1 to 3 spatial dimensions, got {tuple(x.shape)}"
        )
    B, C = x.shape[:2]
    if dy.dim() != x.dim() or dy.shape[0] != B:
        raise ValueError(
            f"{op}: dy must be [B={B}, O, *S'] with {n} spatial dimensions as x has, "
            f"got {tuple(dy.shape)}"
        )
    check_floating(op, "x", x)
    check_same(op, "dy", dy, x.dtype, x.device)
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        ints = isinstance(values, Sequence) and all(isinstance(v, int) for v in values)
        if not ints or len(values) != n or min(values) < least:
            raise ValueError(
                f"{op}: {name} must be {n} ints of at least {least}, one for each spatial "
                f"dimension, got {values}"
            )
    O = dy.shape[1]
    if groups < 1 or C % groups or O % groups:
        raise ValueError(f"{op}: groups must divide C={C} and O={O}, got {groups}")
    check_coordinates(op, o_idx, i_idx, x.device, "[r]", 1)
    out = output_of(op, out, (B, o_idx.shape[0]), x.dtype, x.device)
    call = kernel(op, backend, x.device, (x.dtype,), out.dtype)
    call(
        x,
        dy,
        o_idx.contiguous(),
        i_idx.contiguous(),
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        bias,
        scale,
        out,
    )
    return out


def _check_order(op: str, order: StagedOrder, r: int, x: Tensor) -> None:
    wanted = (r, x.element_size(), x.device)
    given = (order.num_entries, order.element_size, order.packed.device)
    if given != wanted:
        described = ["{} entries of {}-byte elements on {}".format(*t) for t in (wanted, given)]
        raise ValueError(f"{op}: order must be for {described[0]}, got one for {described[1]}")
