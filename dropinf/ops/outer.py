"""Sampled entries of each example's weight gradient, from a layer's input and output gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dropinf.ops import bank_schedule, column_schedule
from dropinf.ops.checks import (
    check_activations,
    check_coordinates,
    check_same,
    checked_weights,
    output_of,
    unit_stride,
)
from dropinf.ops.dispatch import add_op, kernel
from dropinf.ops.outer_ways import Order
from dropinf.ops.selftest import Case, Inputs


def sampled_outer(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    *,
    weights: Tensor | None = None,
    bias: bool = False,
    order: Order | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled entries of each example's weight gradient.

    out[b, k] = weights[k] * sum_t dy[b, t, o_idx[k]] * x[b, t, i_idx[k]]

    Equal to einsum("bto,bti->boi", dy, x)[:, o_idx, i_idx] * weights, without the [B, O, I] tensor.
    With [r, s] coordinates an entry is a sum of s of them, each with a weight of its own:

    out[b, k] = sum_j weights[k, j] * sum_t dy[b, t, o_idx[k, j]] * x[b, t, i_idx[k, j]]

        rows = dropinf.ops.sampled_outer(x, dy, o_idx, i_idx)  # [B, r]

    Args:
        x: [B, T, I] layer input, float32, bfloat16 or float16 (float64 on `reference`).
        dy: [B, T, O] gradient of the summed loss at the layer's output, dtype of x.
        o_idx, i_idx: [r] int32, fastest when sorted by (o, i); or [r, s].
        weights: float32 of the shape of o_idx (or float64 for float64 inputs); None is ones. With
            [r] the finished sum is multiplied, last. A weight of exactly 0 leaves its coordinate
            out, also where that is not finite, as for entries of fewer than s; its index must
            still be in range.
        bias: let i_idx = I name the layer's bias, a virtual input column of ones.
        order: of these coordinates, from `bank_schedule.staged_order` or, in elements of two
            bytes, `column_schedule.column_order`. Backends other than cuda ignore it; it
            changes rounding nowhere but on cuda.
        out: [B, r] floating point to write into; any strides, so a slice of a packed row will do.
        backend: a name from `dropinf.backends()`; None takes the first available.

    Returns:
        [B, r] float32 (float64 for float64 inputs): `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an input requires grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "sampled_outer"
    check_activations(op, x, dy)
    check_coordinates(op, o_idx, i_idx, x.device, summed=True)
    weights = checked_weights(op, weights, o_idx.shape, x.dtype, x.device)
    if order is not None:
        _check_order(op, order, o_idx, x)
    out = output_of(op, out, (x.shape[0], o_idx.shape[0]), x.dtype, x.device)
    call = kernel(op, backend, x.device, (x.dtype,), out.dtype)
    call(
        unit_stride(x),
        unit_stride(dy),
        o_idx.contiguous(),
        i_idx.contiguous(),
        weights,
        bias,
        () if order is None else order.tensors,
        out,
    )
    return out


def _check_order(op: str, order: Order, o_idx: Tensor, x: Tensor) -> None:
    r, s = o_idx.shape if o_idx.dim() == 2 else (len(o_idx), 1)
    wanted = (r, s, x.element_size(), x.device)
    given = (order.num_entries, order.s, order.element_size, order.packed.device)
    if given != wanted:
        described = [
            "[{}, {}] coordinates in {}-byte elements on {}".format(*t) for t in (wanted, given)
        ]
        raise ValueError(f"{op}: order must be for {described[0]}, got one for {described[1]}")


def _outer_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = Inputs(dtype, device)
    B, T, I, O, r, s = 2, 37, 41, 19, 67, 3
    x, dy = new.numbers(B, T, I), new.numbers(B, T, O)
    o_idx, i_idx = new.indices(O, r), new.indices(I + 1, r)
    yield (x, dy, o_idx, i_idx, new.weights(r), True, ()), (new.out(B, r),)
    o_idx, i_idx = new.indices(O, r, s), new.indices(I, r, s)
    yield (x, dy, o_idx, i_idx, new.weights(r, s), False, ()), (new.out(B, r),)
    yield (x[:, :8], dy[:, :8], o_idx, i_idx, None, False, ()), (new.out(B, r),)
    # What the staged kernels turn on: chunks of several buffers; few coordinates a thread, more, or
    # most; passes, a bias and rows that are not aligned; sums.
    for B, T, I, O, r, bias, limits in (
        (1, 150, 96, 64, 150, False, {}),
        (1, 20, 96, 64, 2600, False, {}),
        (1, 20, 96, 64, 5800, False, {}),
        (2, 90, 41, 64, 150, True, {"max_slots": 128}),
    ):
        x, dy = new.numbers(B, T, I), new.numbers(B, T, O)
        at = new.indices(O * (I + bias), r).sort().values
        o_idx, i_idx = at // (I + bias), at % (I + bias)
        order = _staged(x, dy, o_idx, i_idx, bias=bias, **limits)
        yield (x, dy, o_idx, i_idx, new.weights(r), bias, order), (new.out(B, r),)
    o_idx, i_idx = new.indices(O, r, s), new.indices(I, r, s)
    x, dy = x[:, :40], dy[:, :40]
    order = _staged(x, dy, o_idx, i_idx)
    yield (x, dy, o_idx, i_idx, new.weights(r, s), False, order), (new.out(B, r),)
    # The columns kernel: rows of which four elements are read at once, and others with a bias;
    # chunks whose last buffer is not full.
    for T, I, O, r, bias in ((203, 96, 64, 2600, False), (20, 41, 63, 600, True)):
        x, dy = new.numbers(1, T, I), new.numbers(1, T, O)
        o_idx, i_idx = new.indices(O, r), new.indices(I + bias, r)
        columns = _columns(x, dy, o_idx, i_idx, bias)
        yield (x, dy, o_idx, i_idx, new.weights(r), bias, columns), (new.out(1, r),)
    B, T, I, O, r, s = 2, 37, 41, 63, 300, 3
    x, dy = new.numbers(B, T, I), new.numbers(B, T, O)
    o_idx, i_idx = new.indices(O, r, s), new.indices(I + 1, r, s)
    columns = _columns(x, dy, o_idx, i_idx, True)
    yield (x, dy, o_idx, i_idx, new.weights(r, s), True, columns), (new.out(B, r),)


def _staged(
    x: Tensor, dy: Tensor, o_idx: Tensor, i_idx: Tensor, **options: Any
) -> Sequence[Tensor]:
    """The order that backend cuda takes and others ignore; none where it cannot be made."""
    if not bank_schedule.AVAILABLE or x.dtype == torch.float64:
        return ()
    I, O = x.shape[2], dy.shape[2]
    order = bank_schedule.staged_order(o_idx, i_idx, I, O, x.element_size(), **options)
    assert order is not None
    return order.tensors


def _columns(x: Tensor, dy: Tensor, o_idx: Tensor, i_idx: Tensor, bias: bool) -> Sequence[Tensor]:
    """Likewise the order of columns, which elements of two bytes have."""
    if not bank_schedule.AVAILABLE or x.element_size() != 2:
        return ()
    I, O = x.shape[2], dy.shape[2]
    order = column_schedule.column_order(o_idx, i_idx, I, O, bias=bias)
    assert order is not None
    return order.tensors


def factored_outer(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor | None,
    i_idx: Tensor | None,
    *,
    weights: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A grid of entries of each example's weight gradient, as one product of gathered columns.

    out[b, p * b' + q] = weights[p * b' + q] * sum_t dy[b, t, o_idx[p]] * x[b, t, i_idx[q]]

    Equal to `einsum("bto,bti->boi", dy, x)[:, o_idx][:, :, i_idx].flatten(1) * weights`, without
    the [B, O, I] tensor. The columns are gathered by torch, and the product is its `bmm`.

        rows = dropinf.ops.factored_outer(x, dy, torch.tensor([0, 4]), None)  # [B, 2 I]

    Args:
        x: [B, T, I] layer input, float32, bfloat16, float16 or float64.
        dy: [B, T, O] gradient of the summed loss at the layer's output, dtype of x.
        o_idx: [a] int64 columns of dy; None for all, which are then not copied (unless they are of
            half precision).
        i_idx: [b'] int64 columns of x, or None likewise.
        weights: [a * b'], as in `sampled_outer`.
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
    check_activations(op, x, dy)
    sides = []
    for name, index, columns in (("o_idx", o_idx, dy), ("i_idx", i_idx, x)):
        if index is None:
            sides.append(columns.shape[2])
            continue
        check_same(op, name, index, torch.int64, x.device)
        if index.dim() != 1:
            raise ValueError(f"{op}: {name} must have one dimension, got {tuple(index.shape)}")
        sides.append(len(index))
    r = sides[0] * sides[1]
    weights = checked_weights(op, weights, (r,), x.dtype, x.device)
    out = output_of(op, out, (x.shape[0], r), x.dtype, x.device)
    call = kernel(op, backend, x.device, (x.dtype,), out.dtype)
    call(x, dy, o_idx, i_idx, weights, out)
    return out


def _factored_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = Inputs(dtype, device)
    x, dy = new.numbers(2, 37, 41), new.numbers(2, 37, 19)
    o_idx, i_idx = (new.indices(n, 7, dtype=torch.int64) for n in (19, 41))
    yield (x, dy, o_idx, i_idx, new.weights(49)), (new.out(2, 49),)
    yield (x, dy, None, i_idx, None), (new.out(2, 19 * 7),)


add_op("sampled_outer", ["cuda", "triton", "cpu"], _outer_cases)
# A matrix product, for which torch's is best.
add_op("factored_outer", [], _factored_cases)
