"""Passes over the rows of a store, in parts that bound the memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dropinf.store import RowStore

_PART_BYTES = 1 << 26  # of one part, unless a caller asks for another size


def valid_rows(
    store: RowStore,
    columns: slice = slice(None),
    dtype: torch.dtype | None = None,
    part_bytes: int = _PART_BYTES,
) -> Iterator[Tensor]:
    """The valid rows in order, as parts [c, columns] of about `part_bytes`.

    Of a store whose rows are wide, a part joins many of `store.chunks()`: products with a part of
    few rows would be bound by memory.

    Raises:
        ValueError: a valid row is not finite.
    """
    first = next(store.chunks(), None)
    if first is None:
        return
    dtype = first[1].dtype if dtype is None else dtype
    width = first[1][:1, columns].shape[1]
    num_rows = max(1, min(len(store), part_bytes // max(1, width * dtype.itemsize)))
    part, filled = None, 0
    for start, chunk in store.chunks():
        valid = store.valid[start : start + len(chunk)]
        rows = chunk[:, columns]
        finite = rows.isfinite().all(1)
        if not finite[valid].all():
            at = start + int((~finite & valid).nonzero()[0])
            raise ValueError(
                f"row {at} of the store is not finite; collect it again, or mark it in store.valid"
            )
        rows = rows if valid.all() else rows[valid]
        if part is None and (len(rows) >= num_rows or start + len(chunk) == len(store)):
            yield rows.to(dtype)  # no copy, where nothing has to be joined
            continue
        while len(rows):
            if part is None:
                part, filled = rows.new_empty(num_rows, width, dtype=dtype), 0
            taken = min(num_rows - filled, len(rows))
            part[filled : filled + taken] = rows[:taken]
            filled, rows = filled + taken, rows[taken:]
            if filled == num_rows:
                yield part
                part = None
    if part is not None:
        yield part[:filled]


def mean_squares(store: RowStore, n: int) -> Tensor:
    """[R] float64: the diagonal of F over all layers, n the number of valid rows."""
    total = torch.zeros(store.plan.width, dtype=torch.float64)
    for rows in valid_rows(store):
        total += rows.double().square().sum(0)
    return total / n


def products(solved: Tensor, store: RowStore) -> Tensor:
    """[m, R] -> [m, n]: products with every row of the store, valid or not."""
    result = solved.new_empty(len(solved), len(store))
    for start, chunk in store.chunks():
        torch.mm(solved, chunk.to(solved).T, out=result[:, start : start + len(chunk)])
    return result
