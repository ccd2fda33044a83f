"""Products with every layer's F_l that never form it: passes over a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dropinf.compression import LayerPlan
from dropinf.rows import PART_BYTES, RowStore, valid_rows
from dropinf.solvers.room import span, within


def parts(
    store: RowStore, columns: slice = slice(None), part_bytes: int | None = None
) -> Iterator[Tensor]:
    """The columns of the valid rows in float64, as parts [c, w] of about `part_bytes`.

    c is not much above w, so the products [m, c] of m queries take no more memory than they do.
    """
    for rows in valid_rows(store, [columns], torch.float64, part_bytes):
        yield from rows.split(max(256, rows.shape[1]))


def product_bytes(width: int, part_bytes: int | None) -> int:
    """Of one query's products [c] with a part of `parts`, twice: they are scaled."""
    rows = (PART_BYTES if part_bytes is None else part_bytes) // (8 * width)
    return 2 * 8 * max(1, min(rows, max(256, width)))


def columns_of(
    store: RowStore, block: LayerPlan, n: int, part_bytes: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """(columns, G [n, w] float64 of those) over a layer, w as wide as `part_bytes` allow."""
    width = max(1, (PART_BYTES if part_bytes is None else part_bytes) // (8 * n))
    for start in range(block.offset, block.offset + block.r, width):
        columns = slice(start, min(start + width, block.offset + block.r))
        num_bytes = 8 * n * (columns.stop - columns.start)
        yield columns, next(valid_rows(store, [columns], torch.float64, num_bytes))


def multiply(
    store: RowStore,
    n: int,
    vectors: Sequence[tuple[LayerPlan, Tensor]],
    part_bytes: int | None = None,
) -> list[Tensor]:
    """F_l v = G_lᵀ (G_l v) / n for each layer's vectors [k, r_l] float64, in one pass."""
    results = [torch.zeros_like(v) for _, v in vectors]
    columns = span([block for block, _ in vectors]) if vectors else slice(None)
    for rows in parts(store, columns, part_bytes):
        for (block, v), result in zip(vectors, results, strict=True):
            G = rows[:, within(block, columns)]
            result.addmm_(v @ G.T, G, alpha=1 / n)
    return results


def solvable(
    op: str, blocks: Sequence[LayerPlan], λs: Sequence[float], diagonal: Tensor, n: int
) -> list[tuple[LayerPlan, float]]:
    """(layer, λ_l) of the layers to solve; without those that are zero and not damped.

    Raises:
        ValueError: λ_l = 0 where F_l is seen to be singular: n < r_l, or a coordinate is zero in
            every row.
    """
    layers = []
    for block, λ in zip(blocks, λs, strict=True):
        squares = diagonal[block.entries]
        if λ == 0 and squares.any() and (n < block.r or not squares.all()):
            raise ValueError(
                f"{op}: layer {block.name!r} (n={n}, r={block.r}) is singular at damping=0; "
                "raise the damping"
            )
        if λ > 0 or squares.any():
            layers.append((block, λ))
    return layers
