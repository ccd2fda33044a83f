"""Compressions that project the whole gradient: for comparison, and for users who want them.

Each keeps every coordinate, so that a layer's gradient is formed, a few examples at a time, before
it is projected; `LoGra` alone projects a linear layer's input and output gradient instead. Products
of two rows are unbiased for those of the gradients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dropinf.compression import projections
from dropinf.compression.allocation import Allocation, Layer, allocate, check_budget, entries_of
from dropinf.compression.as_written import AsWritten
from dropinf.compression.entry_map import DenseProjection
from dropinf.compression.grid import grid_sides
from dropinf.compression.parts import Part
from dropinf.compression.projections import Projection


@dataclass(frozen=True, repr=False)
class _Projected(AsWritten, ABC):
    """A projection of each layer's gradient."""

    r: int | None = None
    rate: float | None = None
    total: int | None = None
    seed: int = 0
    allocation: Allocation = "size"

    def __post_init__(self) -> None:
        check_budget(self)

    @abstractmethod
    def projection(self, P: int, r: int, layer: int) -> Projection:
        """Of the gradient [P] of layer number `layer` to r entries."""

    def keep(self, layers: Sequence[Layer]) -> list[list[Part]]:
        """Of each layer (name, shapes): the part of each parameter, all of it."""
        budget = zip(layers, entries_of(self, layers), strict=True)
        return [
            _parts(self.projection(sum(map(math.prod, shapes)), r, l), shapes)
            for l, ((_, shapes), r) in enumerate(budget)
        ]


@dataclass(frozen=True, repr=False)
class Gaussian(_Projected):
    """Independent Gaussian weights, as in TRAK (arXiv 2303.14186, section 3.2).

        plan = dropinf.Plan.make(model, dropinf.Gaussian(r=256))

    Args:
        r, rate, total, seed, allocation: as in `Dropout`.
    """

    def projection(self, P: int, r: int, layer: int) -> Projection:
        """Of the gradient [P] of layer number `layer` to r entries."""
        return projections.GaussianProjection(P, r, self.seed, layer)


@dataclass(frozen=True, repr=False)
class Rademacher(_Projected):
    """Independent weights of +1 and -1 (Achlioptas 2003), the default of TRAK.

        plan = dropinf.Plan.make(model, dropinf.Rademacher(r=256))

    Args:
        r, rate, total, seed, allocation: as in `Dropout`.
    """

    def projection(self, P: int, r: int, layer: int) -> Projection:
        """Of the gradient [P] of layer number `layer` to r entries."""
        return projections.RademacherProjection(P, r, self.seed, layer)


@dataclass(frozen=True, repr=False)
class SJLT(_Projected):
    """A sparse projection: s entries for each coordinate, random signs (Kane & Nelson 2014).

        plan = dropinf.Plan.make(model, dropinf.SJLT(r=256))

    Args:
        r, rate, total, seed, allocation: as in `Dropout`.
        s: entries that a coordinate goes to; at most those of the layer.
    """

    s: int = 1

    def projection(self, P: int, r: int, layer: int) -> Projection:
        """Of the gradient [P] of layer number `layer` to r entries."""
        return projections.SJLTProjection(P, r, self.seed, layer, s=min(self.s, r))


@dataclass(frozen=True, repr=False)
class FJLT(_Projected):
    """Random signs, a Hadamard transform, and r of its entries (Ailon & Chazelle 2009).

        plan = dropinf.Plan.make(model, dropinf.FJLT(r=256))

    Args:
        r, rate, total, seed, allocation: as in `Dropout`.
    """

    def projection(self, P: int, r: int, layer: int) -> Projection:
        """Of the gradient [P] of layer number `layer` to r entries."""
        return projections.FJLTProjection(P, r, self.seed, layer)


@dataclass(frozen=True, repr=False)
class LoGra(_Projected):
    """Two-sided: a weight's gradient [O, I] between Gaussian matrices (arXiv 2405.13954).

    The matrices are [O, a] and [I, b], with sides a b as in `FactoredDropout`; parameters of one
    dimension have a Gaussian projection.

        plan = dropinf.Plan.make(model, dropinf.LoGra(r=256))

    Args:
        r, rate, total, seed, allocation: as in `Dropout`.
    """

    def keep(self, layers: Sequence[Layer]) -> list[list[Part]]:
        """Of each layer (name, shapes): the part of each parameter, all of it."""
        kept, number = [], 0
        for (name, shapes), r in zip(layers, entries_of(self, layers), strict=True):
            if r < len(shapes):
                kept.append(_parts(self.projection(sum(map(math.prod, shapes)), r, number), shapes))
                number += len(shapes)
                continue
            own = [(name, [shape]) for shape in shapes]
            parts, first = [], 0
            for shape, share in zip(shapes, allocate(name, r, own, "size"), strict=True):
                P = math.prod(shape)
                projection = self.projection(P, share, number)
                if len(shape) > 1:
                    O, I = shape[0], math.prod(shape[1:])
                    sides = grid_sides(O, I, share)
                    projection = projections.Kron(O, I, *sides, self.seed, number)
                parts += _parts(projection, [shape], first)
                first += projection.r
                number += 1
            kept.append(parts)
        return kept

    def projection(self, P: int, r: int, layer: int) -> Projection:
        """Of a parameter [P] of one dimension, or of a layer of fewer entries than parameters."""
        return projections.GaussianProjection(P, r, self.seed, layer)


def _parts(projection: Projection, shapes: Sequence[tuple[int, ...]], first: int = 0) -> list[Part]:
    """The parts of parameters that one projection takes together, its first entry at `first`."""
    parts, start = [], 0
    for size in map(math.prod, shapes):
        entry_map = DenseProjection(projection, start, size)
        parts.append(Part(np.arange(size, dtype=np.int64), first, 1.0, entry_map))
        start += size
    return parts
