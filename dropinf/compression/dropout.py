"""Dropout keeps sampled coordinates of each layer; Full keeps all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dropinf.compression.allocation import (
    Allocation,
    Layer,
    LayerEnergies,
    check_budget,
    entries_of,
)
from dropinf.compression.as_written import AsWritten
from dropinf.compression.energy import Energies
from dropinf.compression.parts import Part, by_parameter, draw_layer


@dataclass(frozen=True, repr=False)
class Dropout(AsWritten):
    """Keep coordinates drawn without replacement: uniformly (arXiv 2509.15651, section 3.1), or by
    energy.

        plan = dropinf.Plan.make(model, dropinf.Dropout(r=1024, energies=energies))

    Exactly one of the first three is given:

    Args:
        r: coordinates of each layer.
        rate: fraction of each layer's coordinates, in (0, 1].
        total: coordinates of all layers together, at least one each.
        seed: of the draw, 0 to 2^64 - 1.
        allocation: how `total` is shared out: "size" in proportion to the layer's size, "sqrt" to
            its square root, "equal" alike; "energy", which shares out r or rate too, of all layers
            together, in proportion to sqrt(energy * size), the energy being that of all of the
            layer's coordinates, and a tenth of it by size.
        energies: of `dropinf.energies` or `dropinf.energies_from_adam`. Coordinate j is then kept
            with a probability pi_j in proportion to sqrt(E g_j^2), at least a tenth of what it
            would be uniformly, and at most 1.

    An entry is g_j / sqrt(pi_j), where pi_j = r / P if uniform: so a product of two rows is
    unbiased for that of the gradients. A layer with fewer coordinates than asked for keeps all it
    has.
    """

    r: int | None = None
    rate: float | None = None
    total: int | None = None
    seed: int = 0
    allocation: Allocation = "size"
    energies: Energies | None = None

    def __post_init__(self) -> None:
        check_budget(self)

    def keep(
        self, layers: Sequence[Layer], energies: LayerEnergies | None = None
    ) -> list[list[Part]]:
        """Of each layer (name, shapes): the part of each parameter, `energies` being theirs."""
        kept = []
        budget = entries_of(self, layers, energies)
        for l, ((_, shapes), r) in enumerate(zip(layers, budget, strict=True)):
            mine = None if energies is None else energies[l]
            kept.append([Part(*drawn) for drawn in draw_layer(shapes, r, self.seed, l, mine)])
        return kept


@dataclass(frozen=True, repr=False)
class Full(AsWritten):
    """Keep every coordinate: the exact method, for small models and tests.

    A row is the gradient itself, layer by layer.

        plan = dropinf.Plan.make(model, dropinf.Full())
    """

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
