"""Passes over the rows of a store, in parts that bound the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dropinf import ops
from dropinf.rows.packing import finite_rows
from dropinf.rows.store import RowStore

PART_BYTES = 1 << 26  # of one part, unless a caller asks for another size
_PROBED = 32  # rows that show whether products hold in float32
_LOST = 1e-4  # the share of a product that may be rounding


def valid_rows(
    store: RowStore,
    columns: Sequence[slice] = (slice(None),),
    dtype: torch.dtype | None = None,
    part_bytes: int | None = None,
) -> Iterator[Tensor]:
    """The valid rows in order, their `columns` side by side, as parts of about `part_bytes`
    (None is PART_BYTES).

    Of a store whose rows are wide, a part joins many of `store.chunks()`: products with a part of
    few rows would be bound by memory.

    Raises:
        ValueError: a valid row is not finite.
    """
    part_bytes = PART_BYTES if part_bytes is None else part_bytes
    width = sum(len(range(store.plan.width)[at]) for at in columns)
    part, filled = None, 0
    wanted = store.read_dtype if dtype is None else dtype
    num_rows = max(1, part_bytes // max(1, width * wanted.itemsize))
    for start, rows in store.chunks(columns, num_rows):  # copies of more would be beyond the part
        valid = store.valid[start : start + len(rows)]
        whole, bad = valid.all(), ~finite_rows(rows)
        if not whole:
            bad &= valid.to(bad.device)
        if bad.any():
            at = store.begins + start + int(bad.nonzero()[0])
            raise ValueError(
                f"row {at} of the store is not finite; collect it again, or mark it in store.valid"
            )
        rows = rows if whole else rows[valid]
        last = start + len(valid) == len(store)
        if part is None and len(rows) and (len(rows) == num_rows or last):
            yield rows.to(wanted)  # nothing to join
            continue
        while len(rows):
            if part is None:
                size = min(num_rows, len(store))
                part, filled = rows.new_empty(size, rows.shape[1], dtype=wanted), 0
            taken = min(len(part) - filled, len(rows))
            part[filled : filled + taken] = rows[:taken]
            filled, rows = filled + taken, rows[taken:]
            if filled == len(part):
                yield part
                part = None
    if part is not None:
        yield part[:filled]


def mean_squares(store: RowStore, n: int, part_bytes: int | None = None) -> Tensor:
    """[R] float64: the diagonal of F over all layers, n the number of valid rows.

    In parts of about `part_bytes`, of some columns where a whole row is more than that.
    """
    total = torch.zeros(store.plan.width, dtype=torch.float64, device=store.device)
    if part_bytes is None:  # on a CPU no product gains by more than a cache
        part_bytes = 1 << 22 if store.device.type == "cpu" else PART_BYTES
    width = max(1, part_bytes // 8)
    for start in range(0, len(total), width):
        columns = slice(start, min(start + width, len(total)))
        for rows in valid_rows(store, [columns], part_bytes=part_bytes):
            step = max(1, rows.shape[1] // 8)  # of the columns, as float64 copies are larger
            sums = total[columns].split(step)
            for some, values in zip(sums, rows.split(step, 1), strict=True):
                some += values.double().square().sum(0)
    return total.div_(n)


def solved_for(
    queries: Tensor,
    store: RowStore,
    solve: Callable[[Tensor], Tensor],
    part_bytes: int | None = None,
) -> Tensor:
    """solve(queries) [m, R]; in float64 where products with the store's rows would lose digits.

    With little damping λ the part of a query that the rows do not span is large in its solution,
    1/λ of it, and its products with the rows cancel: in float32 to less than their rounding. Some
    rows of the store, read about `part_bytes` at a time (None is PART_BYTES), show whether that,
    or the solution itself, is more than float32 holds.
    """
    solved = solve(queries)
    if solved.dtype == torch.float64 or _float32_holds(queries, solved, store, part_bytes):
        return solved
    del solved
    return solve(queries.double())


def _float32_holds(
    queries: Tensor, solved: Tensor, store: RowStore, part_bytes: int | None
) -> bool:
    part_bytes = PART_BYTES if part_bytes is None else part_bytes
    m, R = solved.shape
    few = max(1, part_bytes // (8 * R))
    asked = torch.cat([finite_rows(q) & q.any(1) for q in queries.split(few)])
    if not torch.cat([finite_rows(x) for x in solved.split(few)])[asked].all():
        return False
    valid = torch.arange(len(store))
    if not store.valid.all():
        valid = valid[store.valid]
    probed = valid[:: max(1, len(valid) // _PROBED)][:_PROBED]
    device = solved.device
    exact = torch.zeros(m, len(probed), dtype=torch.float64, device=device)
    squares, norms = torch.zeros_like(exact), exact.new_zeros(len(probed))
    step = max(1, part_bytes // (64 * max(m, len(probed))))
    for at, positions in zip(torch.arange(len(probed)).split(few), probed.split(few), strict=True):
        rows, at = store.at(positions).to(device), at.to(device)
        for x, g in zip(solved.split(step, 1), rows.split(step, 1), strict=True):
            x, g = x.double(), g.double().nan_to_num_(0)
            exact[:, at] += x @ g.T
            norms[at] += g.square().sum(1)
            squares[:, at] += x.square() @ g.square().T
    # Roundings of as many terms add up like a random walk; and below 2^-149 a solution is zero.
    least = 2.0**-149 * norms.sum().sqrt()
    rounding = torch.finfo(torch.float32).eps * squares.sum(1).sqrt() + least
    return bool((rounding <= _LOST * exact.norm(dim=1))[asked].all())


def products(solved: Tensor, store: RowStore) -> Tensor:
    """[m, R] -> [m, n]: products with every row of the store, valid or not."""
    result = solved.new_empty(len(solved), len(store))
    for start, numbers, scales in kept_beside(store, solved):
        out = result[:, start : start + len(numbers)]
        ops.row_products(solved, numbers, scales=scales, offsets=store.bounds, out=out)
        del numbers, scales
    return result


def device_of(queries: RowStore, store: RowStore) -> torch.device:
    """Where products of both are computed: on the GPU where rows of the queries or of the store
    are, or else on the CPU."""
    return store.device if queries.device.type == "cpu" else queries.device


def kept_beside(store: RowStore, solved: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Chunks as they are kept, on the device of `solved`: (position of the first, numbers, scales).

    For `ops.row_products` with `solved`; float64 rows are no wider than that. Who lets go of one
    before asking for the next has one in memory, not two.
    """
    for start, (numbers, scales) in store.kept():
        wider = numbers.dtype == torch.float64 != solved.dtype
        numbers = numbers.to(solved.device, solved.dtype if wider else numbers.dtype)
        yield start, numbers, None if scales is None else scales.to(solved.device)
        del numbers, scales


def mark_invalid(scores: Tensor, queries: RowStore, store: RowStore) -> Tensor:
    """The scores [..., m, n] themselves, NaN where the query or the training row is invalid."""
    scores[..., ~queries.valid, :] = torch.nan
    scores[..., ~store.valid] = torch.nan
    return scores


def merged(columns: Sequence[slice]) -> list[slice]:
    """Slices that follow each other, made one where they touch."""
    result: list[slice] = []
    for part in columns:
        if result and result[-1].stop == part.start:
            result[-1] = slice(result[-1].start, part.stop)
        else:
            result.append(part)
    return result


def put(rows: Tensor, columns: Sequence[slice], values: Tensor) -> None:
    """Write what `take` took."""
    start = 0
    for part in columns:
        width = part.stop - part.start
        rows[:, part] = values[:, start : start + width]
        start += width
