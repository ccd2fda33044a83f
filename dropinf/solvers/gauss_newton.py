"""Products with every layer's F_l that never form it: passes over a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dropinf.compression import LayerPlan
from dropinf.rows import RowStore, valid_rows


def parts(store: RowStore) -> Iterator[Tensor]:
    """The valid rows in float64, as parts [c, R].

    c is not much above R, so the products [m, c] of m queries take no more memory than they do.
    """
    for rows in valid_rows(store, dtype=torch.float64):
        yield from rows.split(max(256, store.plan.width))


def multiply(store: RowStore, n: int, vectors: Sequence[tuple[LayerPlan, Tensor]]) -> list[Tensor]:
    """F_l v = G_lᵀ (G_l v) / n for each layer's vectors [k, r_l] float64, in one pass."""
    results = [torch.zeros_like(v) for _, v in vectors]
    for rows in parts(store):
        for (block, v), result in zip(vectors, results, strict=True):
            G = rows[:, block.entries]
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
