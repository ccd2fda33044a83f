"""Compressions: which coordinates of a layer's gradient are kept.

A compression is a frozen dataclass with `coordinates(sizes)`: for the P of every layer, its sorted
coordinates. It depends on sizes and seed alone, so that a plan is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Dropout:
    """Keep coordinates drawn uniformly without replacement (arXiv 2509.15651, section 3.1).

    Exactly one of the first three is given:

    Args:
        r: coordinates of each layer.
        rate: fraction of each layer's coordinates, in (0, 1].
        total: coordinates of all layers together, shared out in proportion to layer size, at
            least one each.
        seed: of the draw, 0 to 2^64 - 1.

    A layer with fewer coordinates than asked for keeps all it has.
    """

    r: int | None = None
    rate: float | None = None
    total: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = [n for n in ("r", "rate", "total") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"Dropout: give exactly one of r, rate, total; got {given or 'none'}")
        for name in ("r", "total"):
            value = getattr(self, name)
            if value is not None and (not _is_whole(value) or value < 1):
                raise ValueError(f"Dropout: {name} must be a whole number from 1, got {value!r}")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ValueError(f"Dropout: rate must be in (0, 1], got {self.rate!r}")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**64:
            raise ValueError(f"Dropout: seed must be in 0 .. 2^64 - 1, got {self.seed!r}")

    def coordinates(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """For each layer of P = sizes[l] parameters: its kept coordinates, sorted int64."""
        if self.r is not None:
            kept = [min(self.r, P) for P in sizes]
        elif self.rate is not None:
            kept = [max(1, round(self.rate * P)) for P in sizes]
        else:
            kept = _shares(self.total, sizes)
        return [
            draw(P, r, self.seed, layer)
            for layer, (P, r) in enumerate(zip(sizes, kept, strict=True))
        ]


@dataclass(frozen=True)
class Full:
    """Keep every coordinate: the exact method, for small models and tests."""

    def coordinates(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """For each layer of P = sizes[l] parameters: 0 .. P - 1."""
        return [np.arange(P, dtype=np.int64) for P in sizes]


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


def _shares(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` shared out over layers: one each, the rest by size (largest remainders)."""
    if total < len(sizes):
        raise ValueError(
            f"Dropout: total={total} leaves some of the {len(sizes)} layers without a coordinate; "
            f"give at least {len(sizes)}"
        )
    spare, room = total - len(sizes), sum(sizes) - len(sizes)
    if spare >= room:
        return list(sizes)
    quotas = [divmod(spare * (P - 1), room) for P in sizes]
    left = spare - sum(whole for whole, _ in quotas)
    largest = sorted(range(len(sizes)), key=lambda l: (-quotas[l][1], l))
    extra = set(largest[:left])
    return [1 + whole + (l in extra) for l, (whole, _) in enumerate(quotas)]


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
