"""FactoredDropout keeps a grid of sampled rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dropinf.compression.allocation import Allocation, Layer, allocate, check_budget, entries_of
from dropinf.compression.as_written import AsWritten
from dropinf.compression.parts import Part, by_parameter, draw


@dataclass(frozen=True, repr=False)
class FactoredDropout(AsWritten):
    """Keep a grid of sampled rows x sampled columns of each weight.

    Cheaper than `Dropout` at small r, since one small product gives the whole grid, and it keeps
    less of the signal, since its coordinates are not independent. Rows and columns are drawn
    uniformly without replacement (the mask of arXiv 2505.18976's factorised compressions). Of a
    parameter [O, ...] columns are the positions of the flattened rest; parameters of one dimension
    (biases, norms) keep plain coordinates. A layer's entries are shared out over its parameters in
    proportion to their size, at least one each; where there are fewer, the layer keeps plain
    coordinates.

        plan = dropinf.Plan.make(model, dropinf.FactoredDropout(r=256))

    Args:
        r, rate, total, seed, allocation: as in `Dropout`. A grid has the largest number of entries
            not above what falls to its weight, with sides as equal as the shape allows, give or
            take a factor of two; `plan.describe()` says how many that leaves out.
    """

    r: int | None = None
    rate: float | None = None
    total: int | None = None
    seed: int = 0
    allocation: Allocation = "size"

    def __post_init__(self) -> None:
        check_budget(self)

    def keep(self, layers: Sequence[Layer]) -> list[list[Part]]:
        """Of each layer (name, shapes): the part of each parameter."""
        kept, number = [], 0
        for (name, shapes), r in zip(layers, entries_of(self, layers), strict=True):
            parts: list[Part] = []
            if r < len(shapes):
                P = sum(map(math.prod, shapes))
                drawn = by_parameter(draw(P, r, self.seed, number), shapes)
                parts = [Part(index, first, math.sqrt(P / r)) for index, first in drawn]
            else:
                first = 0
                own = [(name, [shape]) for shape in shapes]
                for shape, share in zip(shapes, allocate(name, r, own, "size"), strict=True):
                    index = _grid(shape, share, self.seed, number + 2 * len(parts))
                    parts.append(Part(index, first, math.sqrt(math.prod(shape) / len(index))))
                    first += len(index)
            kept.append(parts)
            number += 2 * len(shapes)  # two draws of a grid
        return kept


def _grid(shape: tuple[int, ...], r: int, seed: int, number: int) -> np.ndarray:
    """Positions of at most r coordinates of a parameter: a grid if it has two dimensions."""
    if len(shape) < 2:
        return draw(math.prod(shape), r, seed, number)
    O, I = shape[0], math.prod(shape[1:])
    a, b = grid_sides(O, I, r)
    rows, columns = draw(O, a, seed, number), draw(I, b, seed, number + 1)
    return (rows[:, None] * I + columns).flatten()


def grid_sides(O: int, I: int, r: int) -> tuple[int, int]:
    """(a, b): sides of the largest grid a b ≤ r in O x I, of those about as square as can be."""
    ideal = min(O, max(math.sqrt(r), r / I))
    lowest, highest = math.ceil(ideal / math.sqrt(2)), math.floor(ideal * math.sqrt(2))
    sides = [(a, min(I, r // a)) for a in range(max(1, lowest), min(O, r, highest) + 1)]
    return max(sides, key=lambda side: (side[0] * side[1], -abs(side[0] - ideal)))
