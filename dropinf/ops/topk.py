"""The largest scores of each query, merged part by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dropinf.ops.checks import check_same, check_writable
from dropinf.ops.dispatch import KERNELS, add_op, kernel
from dropinf.ops.products import check_products
from dropinf.ops.selftest import Case, Inputs

# Bounds the temporaries of score_topk: this many scores at a time, or as many as it keeps.
_MAX_SCORES = 1 << 22

# Of the kernels for GPUs; the others take any k.
_MERGE_MAX_K = 1024


def score_topk(
    queries: Tensor,
    rows: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    first: int = 0,
    factors: Tensor | None = None,
    valid: Tensor | None = None,
    scales: Tensor | None = None,
    offsets: Sequence[int] | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the scores of some rows into each query's largest k so far, in place.

    scores[q, i] = row_products(queries, rows)[q, i] * factors[i], of row number first + i

    Start with values of -inf and indices of -1, and call it for all parts of a store in any order:
    the result is that of one call. The scores are formed some rows at a time, never as [m, n].

        values = torch.full((len(queries), 3), -torch.inf)
        indices = torch.full((len(queries), 3), -1)
        dropinf.ops.score_topk(queries, rows, values, indices)  # into what was given

    Args:
        queries, rows, scales, offsets: as `row_products` takes them.
        values: [m, k] largest scores so far, in descending order, dtype of the queries.
        indices: [m, k] int64 row numbers of the values; -1, with a value of -inf, where there is
            none yet.
        first: row number of rows[0].
        factors: [c], dtype of the queries; None is 1 for each.
        valid: [c] bool; rows with False never enter. None takes all.
        backend: a name from `dropinf.backends()`; None takes the first available.

    Returns:
        values and indices. NaN counts as largest, as in torch.topk; of equal scores the lower row
        number comes first; a score of -inf never enters.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an input requires grad, or k is too large
            for the named backend.
        BackendError: the named backend cannot take this call.
    """
    op = "score_topk"
    queries, rows, scales, offsets = check_products(op, queries, rows, scales, offsets)
    (m, _), dtype, device = queries.shape, queries.dtype, queries.device
    check_same(op, "values", values, dtype, device)
    check_same(op, "indices", indices, torch.int64, device)
    if values.dim() != 2 or values.shape[0] != m or indices.shape != values.shape:
        raise ValueError(
            f"{op}: values and indices must both be [m={m}, k], "
            f"got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    for name, tensor in (("values", values), ("indices", indices)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} is written in place and must be contiguous, "
                f"got strides {tensor.stride()}"
            )
        check_writable(op, name, tensor)
    c, k = rows.shape[0], values.shape[1]
    for name, tensor, wanted in (("factors", factors, dtype), ("valid", valid, torch.bool)):
        if tensor is not None:
            check_same(op, name, tensor, wanted, device)
            if tensor.shape != (c,):
                raise ValueError(f"{op}: {name} must be [c={c}], got {tuple(tensor.shape)}")
    if first < 0:
        raise ValueError(f"{op}: first must be at least 0, got {first}")
    if backend is None and k > _MERGE_MAX_K and device.type != "cpu":
        backend = "reference"
    merge = kernel(op, backend, device, (dtype,), dtype)
    of_products = backend if backend in KERNELS["row_products"] else None
    multiply = kernel("row_products", of_products, device, (dtype,), dtype)
    if m * k == 0:
        return values, indices
    step = max(k, _MAX_SCORES // m)
    for start in range(0, c, step):
        part = slice(start, start + step)
        rows_here = rows[part]
        scores = values.new_empty(m, rows_here.shape[0])
        scales_here = None if scales is None else scales[part]
        multiply(queries, rows_here, scales_here, offsets, scores)
        if factors is not None:
            scores *= factors[part]
        if valid is not None:
            scores.masked_fill_(~valid[part], -torch.inf)
        merge(scores, first + start, values, indices)
    return values, indices


def _cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = Inputs(dtype, device)
    m, k = 3, 7
    values = torch.full((m, k), -torch.inf, dtype=dtype, device=device)
    indices = torch.full((m, k), -1, device=device)
    yield (new.numbers(m, 300), 5), (values, indices)  # ties: 17 numbers for 300 scores
    yield (new.numbers(m, 4), 305), (values, indices)
    # So many scores of few queries are shared by several blocks of a GPU, which all have some of
    # the largest.
    for m in (1, 2):
        scores = new.indices(1 << 20, m, 20_000, dtype=dtype)
        yield (scores, 400), (values[:m], indices[:m])


add_op("score_topk", ["cuda", "triton", "cpu"], _cases, dtypes=(torch.float32,))
