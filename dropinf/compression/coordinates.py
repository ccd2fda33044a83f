"""The kept coordinates of a plan themselves, before its scales and entry maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dropinf.compression.allocation import Layer
from dropinf.compression.parts import Part
from dropinf.compression.plan import LayerPlan, Plan


@dataclass(frozen=True)
class Coordinates:
    """Keep the coordinates that these layers keep, each as an entry of its own."""

    blocks: tuple[LayerPlan, ...]

    def keep(self, layers: Sequence[Layer]) -> list[list[Part]]:
        """Of each layer (name, shapes): the part of each parameter."""
        kept = []
        for block in self.blocks:
            parts, first = [], 0
            for slot in block.slots:
                parts.append(Part(slot.index.numpy(), first, 1.0))
                first += len(slot.index)
            kept.append(parts)
        return kept


def coordinates_of(plan: Plan) -> Plan:
    """A plan of the same parameters, whose rows are what `plan` makes its entries of.

    Its scales are 1, and it has no entry maps: parameter l's values there, times the scale of
    `plan`'s and through its entry map, are what it adds to its entries of a row. A path that is
    taken under it is one of `plan`.
    """
    layers = [(b.name, [(slot.name, slot.shape) for slot in b.slots]) for b in plan.blocks]
    bare = Plan(layers, Coordinates(plan.blocks), [block.type for block in plan.blocks])
    bare.paths = plan.paths
    return bare
