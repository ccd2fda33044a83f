"""Energies of gradients known at a few coordinates of each row and column of a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dropinf.compression.allocation import Layer
from dropinf.compression.energy import sides
from dropinf.compression.parts import Part

# On the tasks of bench/experiments/quality.py rank correlations are the same to 0.007, from all
# coordinates, 4 and 2. But a rare token's gradient is one example's: e being the mean of 2 or 4 of
# its squares, were they Gaussian, 1 / sqrt(e) in the mean times sqrt(e) in the mean, by which
# products vary more, is 1.57 or 1.18.
_EACH = 4
_ROUNDS = 30


@dataclass(frozen=True)
class FewOfEach:
    """Keep `each` random coordinates of each row, or of each column if there are more of these, by
    which `fit` tells them all; the others have as many or more.

    All of a parameter where that is not twice as many; as they are, without a factor.
    """

    each: int = _EACH

    def keep(self, layers: Sequence[Layer]) -> list[list[Part]]:
        """Of each layer (name, shapes): the part of each parameter."""
        kept = []
        for l, (_, shapes) in enumerate(layers):
            parts, first = [], 0
            for k, shape in enumerate(shapes):
                index = self._few(*sides(shape), key=(l, k))
                parts.append(Part(index, first, 1.0))
                first += len(index)
            kept.append(parts)
        return kept

    def _few(self, a: int, b: int, key: tuple[int, int]) -> np.ndarray:
        long, short = max(a, b), min(a, b)
        if 2 * self.each * long >= a * b:
            return np.arange(a * b, dtype=np.int64)
        stream = np.random.Philox(key=np.array(key, dtype=np.uint64))
        raw = stream.random_raw(self.each * short).reshape(self.each, short)
        at = np.arange(long)
        with_it = np.argsort(raw, axis=1, kind="stable")[:, at % short]  # [each, long]
        return np.unique(at * b + with_it if a >= b else with_it * b + at)


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
