"""Errors where squares of rows or scores are beyond what their dtype can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dropinf.compression import LayerPlan, Plan
from dropinf.rows import RowStore, mean_squares, ranks_together, valid_rows
from dropinf.solvers.room import Room


def check_squares(op: str, block: LayerPlan, squares: Tensor, store: RowStore) -> None:
    """Raise if sums of squares of a layer's rows, in float64, are too large or too small for it."""
    if store.read_dtype != torch.float64:
        return  # float64 has the square of any float32
    if not squares.isfinite().all():
        raise ValueError(
            f"{op}: the squares of layer {block.name!r} are too large for float64; scale the loss "
            "down"
        )
    info = torch.finfo(torch.float64)
    if squares.max() >= info.smallest_normal / info.eps:
        return
    if any(bool(rows.any()) for rows in valid_rows(store, [block.entries])):
        raise ValueError(
            f"{op}: the squares of layer {block.name!r} are too small for float64; scale the loss "
            "up"
        )


def diagonal_of(room: Room, store: RowStore, n: int) -> Tensor:
    """[R] float64: the diagonal of F over all layers, n the number of valid rows.

    Raises:
        ValueError: a layer's squares are beyond float64, or there is no room for a second [R].
    """
    room.need(f"a row of width R={store.plan.width}", 32 * store.plan.width)
    ranks = ranks_together()
    own = store if ranks is None else ranks.share_of(store)
    diagonal = mean_squares(own, n, room.part_bytes)
    if ranks is not None:
        ranks.add(diagonal, bounds := ranks.bounds_of(len(diagonal)))
        ranks.spread(diagonal, bounds)
    for block in store.plan.blocks:
        check_squares(room.op, block, diagonal[block.entries], store)
    return diagonal


def check_scores(
    op: str, plan: Plan, found: Tensor, valid: Sequence[Tensor], at: Callable[..., Sequence[Tensor]]
) -> None:
    """Raise if a score [..., m, n] that `valid` masks leave is not finite, and name its layer.

    `at(*position)` is what the score at a position is the product of: solved [R] and a row [R].
    """
    if found.sum().isfinite():  # then all are; it is one read of them, where isfinite makes copies
        return
    beyond = ~found.isfinite()
    for mask in valid:
        if beyond.any():
            beyond &= mask.to(beyond.device)
    if not beyond.any():
        return
    solved, row = at(*beyond.nonzero()[0].tolist())
    terms = solved.double() * row.to(solved.device).double()
    sizes = torch.stack([terms[block.entries].sum().abs() for block in plan.blocks])
    worst = plan.blocks[int(sizes.nan_to_num(torch.inf).argmax())]
    raise ValueError(
        f"{op}: a score is beyond the range of {found.dtype}, by layer {worst.name!r}; scale the "
        "loss so that its rows are nearer to 1, or collect in float64"
    )
