"""Products of queries with rows, as a store keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dropinf.ops.checks import (
    check_no_grad,
    check_same,
    check_writable,
    checked_offsets,
    describe,
    unit_stride,
)
from dropinf.ops.dispatch import add_op, kernel
from dropinf.ops.selftest import Case, Inputs

_ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def row_products(
    queries: Tensor,
    rows: Tensor,
    *,
    scales: Tensor | None = None,
    offsets: Sequence[int] | Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Products of queries with rows that are kept in few bits, with a scale a row and layer.

    out[q, i] = Σ_l scales[i, l] * (queries[q, layer l] · rows[i, layer l])

        scores = dropinf.ops.row_products(queries, rows.bfloat16())  # [m, c]

    Args:
        queries: [m, R] float32 or float64.
        rows: [c, R] float32, bfloat16, float16 or int8; or float64, as the queries.
        scales: [c, L] float32; None is 1 for each.
        offsets: [L + 1] rising column bounds of the layers; scales need them.
        out: [m, c] to write into, dtype of the queries; any row stride, so that columns of a wider
            tensor will do.
        backend: a name from `dropinf.backends()`; None takes the first available.

    Returns:
        [m, c] in the queries' dtype: `out`, if it was given. Sums are of that dtype, and do not
        depend on the number of threads.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an input requires grad.
        BackendError: the named backend cannot take this call.
    """
    op = "row_products"
    queries, rows, scales, offsets = check_products(op, queries, rows, scales, offsets)
    shape, dtype, device = (len(queries), len(rows)), queries.dtype, queries.device
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    check_same(op, "out", out, dtype, device)
    if out.shape != shape or unit_stride(out) is not out:
        raise ValueError(
            f"{op}: out must be {shape} with stride 1 in c, got {tuple(out.shape)} with strides "
            f"{out.stride()}"
        )
    check_writable(op, "out", out)
    kernel(op, backend, device, (dtype,), dtype)(queries, rows, scales, offsets, out)
    return out


def check_products(
    op: str,
    queries: Tensor,
    rows: Tensor,
    scales: Tensor | None,
    offsets: Sequence[int] | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments of `row_products` as its kernels take them."""
    if queries.dim() != 2 or queries.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: queries must be [m, R] float32 or float64, got {describe(queries)}"
        )
    check_no_grad(op, "queries", queries)
    R = queries.shape[1]
    check_no_grad(op, "rows", rows)
    if rows.dtype not in (*_ROW_DTYPES, queries.dtype) or rows.device != queries.device:
        raise ValueError(
            f"{op}: rows must be float32, bfloat16, float16, int8 or {queries.dtype}, as the "
            f"queries, on {queries.device}, got {describe(rows)}"
        )
    if rows.dim() != 2 or rows.shape[1] != R:
        raise ValueError(f"{op}: rows must be [c, R={R}], got {tuple(rows.shape)}")
    queries, rows = unit_stride(queries), unit_stride(rows)
    if scales is None:
        return queries, rows, None, None
    if offsets is None:
        raise ValueError(f"{op}: scales need offsets, the column bounds of the layers")
    offsets, _, width = checked_offsets(op, offsets)
    check_same(op, "scales", scales, torch.float32, queries.device)
    shape = rows.shape[0], offsets.numel() - 1
    if scales.shape != shape or width != R:
        raise ValueError(
            f"{op}: scales must be [c={shape[0]}, L={shape[1]}] and offsets end with R={R}, got "
            f"{tuple(scales.shape)} and {width}"
        )
    return queries, rows, unit_stride(scales), offsets


def _cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = Inputs(dtype, device)
    R, c = 1100, 21
    offsets = torch.tensor([0, 3, 3, 70, R])
    kept = new.indices(255, c, R, dtype=torch.int16) - 127
    for m in (5, 30):  # few queries, and many
        queries = new.numbers(m, R)
        rows = new.numbers(c, R)
        yield (queries, rows, None, None), (new.out(m, c),)
        yield (queries, rows.bfloat16(), None, None), (new.out(m, c),)
        scales = 2.0 ** new.indices(3, c, 4)
        yield (queries, rows.half(), scales, offsets), (new.out(m, c),)
        yield (queries, kept.to(torch.int8), scales, offsets), (new.out(m, c),)


add_op("row_products", ["cpu"], _cases, dtypes=(torch.float32,))
