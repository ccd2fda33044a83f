"""Compressions: which coordinates of a layer's gradient are kept, and what becomes of them.

A compression is a frozen dataclass with `keep(layers)`: of every layer, what is kept of each of its
parameters. It depends on shapes and seed alone, so that a plan is the same on every machine.
`Gaussian` and its kin, which keep every coordinate and project, are in `baselines`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dropinf.compression.allocation import Allocation, Layer, check_budget, entries_of, shares
from dropinf.compression.entry_map import Fold, Sums


class Part(NamedTuple):
    """What is kept of one parameter of a layer.

    Attributes:
        index: [n] int64, sorted positions in the flattened parameter.
        first: number of its first entry in the layer.
        scale: factor of the n values.
        fold: makes entries of the values; None takes each as one.
    """

    index: np.ndarray
    first: int
    scale: float
    fold: Fold | None = None


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
            drawn = _by_parameter(draw(P, r, self.seed, l), shapes)
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
                for index, first in _by_parameter(
                    np.arange(sum(map(math.prod, shapes)), dtype=np.int64), shapes
                )
            ]
            for _, shapes in layers
        ]


@dataclass(frozen=True)
class Sketch:
    """Keep sums of s coordinates each, with random signs.

    r s coordinates are drawn uniformly without replacement inside a layer, all P of them once
    s r ≥ P, and shared out over the r entries, so that each has s or, of all P, as many as there
    are. A product of two rows is unbiased for that of the gradients, as with `Dropout`; each entry
    averages over s coordinates, which keeps more of the signal at small r. (A count sketch,
    Charikar et al. 2002, of the drawn coordinates, with buckets of one size.)

    Args:
        r: entries of each layer; or, exactly one of the three,
        s: coordinates of an entry.
        rate: entries as a fraction of each layer's coordinates, in (0, 1].
        total: entries of all layers together, at least one each.
        seed, allocation: as in `Dropout`.
    """

    r: int | None = None
    s: int = 4
    rate: float | None = None
    total: int | None = None
    seed: int = 0
    allocation: Allocation = "size"

    def __post_init__(self) -> None:
        check_budget(self)
        if isinstance(self.s, bool) or not isinstance(self.s, int | np.integer) or self.s < 1:
            raise ValueError(f"Sketch: s must be a whole number from 1, got {self.s!r}")

    def keep(self, layers: Sequence[Layer]) -> list[list[Part]]:
        """Of each layer (name, shapes): the part of each parameter."""
        kept = []
        for l, ((_, shapes), r) in enumerate(zip(layers, entries_of(self, layers), strict=True)):
            P = sum(map(math.prod, shapes))
            n = min(P, r * self.s)
            drawn = _by_parameter(draw(P, n, self.seed, l), shapes)
            # Counter-based, and apart from the draw's stream by the top bit of the key.
            key = np.array([self.seed, l + 2**63], dtype=np.uint64)
            raw = np.random.Philox(key=key).random_raw(2 * n)
            sign = 2 * (raw[n:] >> np.uint64(63)).astype(np.int8) - 1
            parts = []
            for index, first in drawn:
                here, last = slice(first, first + len(index)), first + len(index) - 1
                # Shuffled inside of the parameter, so that at most one entry lies in two of them.
                place = first + np.argsort(np.argsort(raw[here], kind="stable"))
                start = first * r // n
                fold = Sums(
                    place * r // n - start,
                    sign[here],
                    shares_first=0 < first < n and (first - 1) * r // n == start,
                    shares_last=0 <= last < n - 1 and (last + 1) * r // n == last * r // n,
                )
                parts.append(Part(index, start, math.sqrt(P / n), fold))
            kept.append(parts)
        return kept


@dataclass(frozen=True)
class FactoredDropout:
    """Keep a grid of sampled rows x sampled columns of each weight.

    Cheaper than `Dropout` at small r, since one small product gives the whole grid, and it keeps
    less of the signal, since its coordinates are not independent. Rows and columns are drawn
    uniformly without replacement (the mask of arXiv 2505.18976's factorised compressions). Of a
    parameter [O, ...] columns are the positions of the flattened rest; parameters of one dimension
    (biases, norms) keep plain coordinates. A layer's entries are shared out over its parameters in
    proportion to their size, at least one each; where there are fewer, the layer keeps plain
    coordinates.

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
                drawn = _by_parameter(draw(P, r, self.seed, number), shapes)
                parts = [Part(index, first, math.sqrt(P / r)) for index, first in drawn]
            else:
                first = 0
                own = [(name, [shape]) for shape in shapes]
                for shape, share in zip(shapes, shares(name, r, own, "size"), strict=True):
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


def draw(P: int, r: int, seed: int, layer: int) -> np.ndarray:
    """r of 0 .. P - 1, uniform without replacement, sorted int64; O(r log r) time, O(r) memory.

    The first r distinct values of the counter-based Philox stream (Salmon et al. 2011) keyed by
    (seed, layer), each cut to the bits of P - 1 and refused where it reaches P. Integers only, so
    the result is the same everywhere. Above P / 2 the coordinates to leave out are drawn instead.
    """
    if 2 * r > P:
        return np.setdiff1d(
            np.arange(P, dtype=np.int64), draw(P, P - r, seed, layer), assume_unique=True
        )
    stream = np.random.Philox(key=np.array([seed, layer], dtype=np.uint64))
    unused_bits = np.uint64(64 - max(1, (P - 1).bit_length()))
    values = np.empty(0, dtype=np.int64)
    while len(values) < r:
        raw = stream.random_raw(2 * (r - len(values)) + 16) >> unused_bits
        values = np.concatenate([values, raw[raw < P].astype(np.int64)])
        distinct, first = np.unique(values, return_index=True)
        values = distinct[np.argsort(first)]  # in the order they were drawn
    return np.sort(values[:r])


def _by_parameter(
    coordinates: np.ndarray, shapes: Sequence[tuple[int, ...]]
) -> list[tuple[np.ndarray, int]]:
    """For each parameter: positions in it, and the number of the first of them, of a layer's
    sorted coordinates, which count through its flattened parameters one after the other."""
    parts, first = [], 0
    for shape in shapes:
        size = math.prod(shape)
        start, stop = np.searchsorted(coordinates, [first, first + size])
        parts.append((coordinates[start:stop] - first, int(start)))
        first += size
    return parts
