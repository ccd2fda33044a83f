"""Energies of gradients known at a few coordinates of each row and column of a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dropinf.compression.allocation import Layer
from dropinf.compression.energy import sides
from dropinf.compression.parts import Part

_EACH = 2  # TODO
_ROUNDS = 30


@dataclass(frozen=True)
class FewOfEach:
    """Keep some random coordinates of each row and of each column, by which `fit` tells them all.

    All of a parameter where that is less than twice as many; as they are, without a factor.
    """

    each: int = _EACH

    def keep(self, layers: Sequence[Layer]) -> list[list[Part]]:
        """Of each layer (name, shapes): the part of each parameter."""
        kept = []
        for l, (_, shapes) in enumerate(layers):
            parts, first = [], 0
            for k, shape in enumerate(shapes):
                index = self._few(*sides(shape), number=(l << 16) + k)
                parts.append(Part(index, first, 1.0))
                first += len(index)
            kept.append(parts)
        return kept

    def _few(self, a: int, b: int, number: int) -> np.ndarray:
        if 2 * self.each * (a + b) >= a * b:
            return np.arange(a * b, dtype=np.int64)
        raw = np.random.Philox(key=number).random_raw(self.each * (a + b)) >> np.uint64(2)
        column, row = np.split(raw.astype(np.int64), [self.each * a])
        of_rows = np.repeat(np.arange(a), self.each) * b + column % b
        of_columns = row % a * b + np.repeat(np.arange(b), self.each)
        return np.unique(np.concatenate([of_rows, of_columns]))


def fit(shape: Sequence[int], index: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rows [a] and columns [b] whose products have the row and column sums of `squares` [n].

    `squares` are those at the flattened coordinates `index` [n]. By iterative proportional fitting
    (Deming & Stephan 1940): the maximum likelihood, were they Poisson counts. Of all coordinates
    these are the sums of rows, and those of columns over that of all.
    """
    a, b = sides(shape)
    o, i = index // b, index % b
    rows, columns = np.zeros(a), np.ones(b)
    row_sums, column_sums = np.bincount(o, squares, a), np.bincount(i, squares, b)
    for _ in range(_ROUNDS if len(index) < a * b else 1):
        rows = _over(row_sums, np.bincount(o, columns[i], a))
        columns = _over(column_sums, np.bincount(i, rows[o], b))
    return rows, columns


def _over(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.divide(one, other, where=other > 0, out=np.zeros_like(one))
