"""Groups of layers fitted by all ranks together: rows are shared out, then layers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

from dropinf.compression import LayerPlan
from dropinf.rows import RowStore, Together
from dropinf.solvers.group import Group, Layer
from dropinf.solvers.primal import Primal


def fitted_together(
    ranks: Together | None,
    store: RowStore,
    groups: Sequence[Group],
    dampings: Mapping[LayerPlan, float],
) -> Iterator[Group]:
    """The groups, each once it is fitted; by one process where `ranks` is None.

    In the r x r form each rank sums F_l over its share of the rows. A rank has some of the layers,
    for which it adds up all ranks' sums, in their order, and factorises them. In the n x n form
    each rank has a layer at a time, alone.
    """
    if ranks is None:
        for group in groups:
            group.fit(store, _of(group, dampings))
            yield group
        return
    for group in groups:
        if isinstance(group, Primal):
            _fit_primal(ranks, store, group, _of(group, dampings))
            yield group
    others = [group for group in groups if not isinstance(group, Primal)]
    for first in range(0, len(others), ranks.size):
        some = others[first : first + ranks.size]
        mine = some[ranks.rank] if ranks.rank < len(some) else None
        if mine is not None:
            mine.fit(store, _of(mine, dampings))
        said = ranks.meet("layers", None if mine is None else _saved(mine.layers))
        for rank, group in enumerate(some):
            group.layers = _loaded(said[rank])
            if group is not mine:
                group.factors = group.empty()
            ranks.give(group.factors, rank)
            yield group


def _fit_primal(ranks: Together, store: RowStore, group: Primal, dampings: Sequence[float]) -> None:
    F = group.empty()
    largest = ranks.meet("peaks", group.gram(ranks.share_of(store), F))
    peaks = [max(of_layer) for of_layer in zip(*largest, strict=True)]
    bounds = _shared_out(group.blocks, ranks.size)
    before = [0, *accumulate(block.r**2 for block in group.blocks)]
    numbers = [before[bound] for bound in bounds]
    ranks.add(F, numbers)
    at = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
    own = Primal(group.blocks[at], group.setting)
    if own.blocks:
        of_rank = F[numbers[ranks.rank] : numbers[ranks.rank + 1]]
        own.factorise(store, of_rank, peaks[at], dampings[at])
    left = [group.blocks.index(block) for block in own.left]
    said = ranks.meet("layers", [_saved(own.layers), left])
    ranks.spread(F, numbers)
    group.layers = [layer for layers, _ in said for layer in _loaded(layers)]
    group.left = [group.blocks[l] for _, left in said for l in left]
    group.factors = F


def _shared_out(blocks: Sequence[LayerPlan], size: int) -> list[int]:
    """Where each rank's layers begin, and their end: each rank has about as much to factorise."""
    costs = [block.r**3 for block in blocks]
    until = [0, *accumulate(costs)]
    middles = [first + cost / 2 for first, cost in zip(until, costs, strict=False)]
    shares = (until[-1] * rank / size for rank in range(size))
    return [*(bisect_left(middles, share) for share in shares), len(blocks)]


def _of(group: Group, dampings: Mapping[LayerPlan, float]) -> list[float]:
    return [dampings[block] for block in group.blocks]


def _saved(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    return [asdict(layer) for layer in layers]


def _loaded(layers: Sequence[dict[str, Any]]) -> list[Layer]:
    return [Layer(**{**said, "failed_pivots": tuple(said["failed_pivots"])}) for said in layers]
