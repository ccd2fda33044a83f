"""Dropout keeps sampled coordinates of each layer; Full keeps all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dropinf.compression.allocation import Allocation, Layer, check_budget, entries_of
from dropinf.compression.parts import Part, by_parameter, draw


@dataclass(frozen=True)
class Dropout:
    """Keep coordinates drawn uniformly without replacement (arXiv 2509.15651, section 3.1).

    Exactly one of the first three is given:

    Args:
        r: coordinates of each layer.
        rate: fraction of each layer's coordinates, in (0, 1].
        total: coordinates of all layers together, at least one each.
        seed: of the draw, 0 to 2^64 - 1.
        allocation: how `total` is shared out: "size" in proportion to the layer's size, "sqrt" to
            its square root, "equal" alike.

    A layer with fewer coordinates than asked for keeps all it has.
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
        kept = []
        for l, ((_, shapes), r) in enumerate(zip(layers, entries_of(self, layers), strict=True)):
            P = sum(map(math.prod, shapes))
            drawn = by_parameter(draw(P, r, self.seed, l), shapes)
            kept.append([Part(index, first, math.sqrt(P / r)) for index, first in drawn])
        return kept


@dataclass(frozen=True)
class Full:
    """Keep every coordinate: the exact method, for small models and tests."""

    def keep(self, layers: Sequence[Layer]) -> list[list[Part]]:
        """Of each layer (name, shapes): the part of each parameter, all of it."""
        return [
            [
                Part(index, first, 1.0)
                for index, first in by_parameter(
                    np.arange(sum(map(math.prod, shapes)), dtype=np.int64), shapes
                )
            ]
            for _, shapes in layers
        ]
