"""Draws in proportion to sqrt(E g^2), without a look at more than rows and columns.

Coordinates are drawn without replacement, with a known probability pi_j of being among them, and an
entry is g_j / sqrt(pi_j) (Horvitz & Thompson 1952): the product of two rows is then, in the mean
over draws, sum_j pi_j (g_j / sqrt(pi_j)) (h_j / sqrt(pi_j)) = g . h, whatever the gradients, as
long as no pi_j is 0. Nothing but pi_j itself matters to that, so that how two coordinates depend on
each other is free to be what is cheap: a systematic sample (Madow 1949), r equal steps over the
cumulative sums of a measure m_j with one random start, which needs sums of rows, and of columns
inside of a row that was hit. What it does matter to is how far a product is off. Steps that meet a
period of the rows (heads of attention) or the same column of each row would keep too little of a
gradient, which is of low rank: so rows are taken in random order, and each starts at a random
column of its own.

The measure is that of energies, w_o v_i in a parameter, mixed with a uniform one, since energies of
64 examples are zero where others' are not. All of it is integers below 2^63.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dropinf.compression.energy import STEPS, ParamEnergy, table

# The uniform part is 1 of 10, of coordinates and of a total that layers share. On digits (an MLP)
# and text of bench/experiments/quality_tasks.py, at r = 256 and 1024 in all, 5 seeds, the rank
# correlation with uncompressed influence is 0 to 0.006 below that without one (each to 0.003), also
# by energies of two digits or two texts alone; with 4 of 10, 0.009 to 0.016. Without one, what the
# examples did not show would be lost; with a tenth, no coordinate adds more than 10 times what it
# does to the variance of a uniform draw's product.
UNIFORM, OF = 1, 10
_BITS = 10  # of the mean w, and of the mean v
_ROOTS = table(2 * STEPS)


@dataclass
class _Measure:
    """m(o, i) = w[o] * v[i] + floor of the coordinates of one parameter.

    Attributes:
        w: [a] int64.
        v: [b] int64, falling.
        column: [b] the column that each is of.
        sums: [b + 1] of v before each.
        floor: of every coordinate.
        certain: [a] how many of the first of v are taken for certain in each row.
    """

    w: np.ndarray
    v: np.ndarray
    column: np.ndarray
    sums: np.ndarray
    floor: int
    certain: np.ndarray

    def before(self, o: np.ndarray, i: np.ndarray) -> np.ndarray:
        """Of the coordinates of row o that are not certain, and stand before place i."""
        first = self.certain[o]
        return self.w[o] * (self.sums[i] - self.sums[first]) + self.floor * (i - first)

    def rows(self) -> np.ndarray:
        """[a] of the coordinates of each row that are not certain."""
        return self.before(np.arange(len(self.w)), np.full(len(self.w), len(self.v)))

    def take(self, least: int) -> None:
        """Those of at least this measure are certain."""
        need = np.full(len(self.w), 0 if least <= self.floor else np.iinfo(np.int64).max)
        some = self.w > 0
        need[some] = -((self.floor - least) // self.w[some])  # rounded up
        self.certain = np.searchsorted(-self.v, -need, side="right")

    def find(self, o: np.ndarray, t: np.ndarray) -> np.ndarray:
        """The place i in row o with before(o, i) <= t < before(o, i + 1)."""
        low, high = self.certain[o], np.full(len(o), len(self.v))
        while (high - low > 1).any():
            middle = (low + high) // 2
            below = self.before(o, middle) <= t
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return low

    def chosen(self, o: np.ndarray, i: np.ndarray) -> np.ndarray:
        """The flattened coordinates at places i of rows o."""
        return o * len(self.v) + self.column[i]


def draw_by_energy(
    energies: Sequence[ParamEnergy], r: int, seed: int, layer: int
) -> tuple[np.ndarray, np.ndarray]:
    """r coordinates of a layer, sorted int64, and the probability [r] that each had of being drawn.

    pi_j = r m_j / sum(m); where that reaches 1, j is certain, and the rest is shared out anew. The
    first are drawn by the counter-based Philox stream keyed by (seed, layer). With rows and columns
    of all parameters A and B it takes O(A log A + B log B + r log(A B)) time, and O(A + B + r)
    memory.
    """
    sizes = [len(e.rows) * len(e.columns) for e in energies]
    starts = np.cumsum([0, *sizes])
    P = int(starts[-1])
    if r == P:
        return np.arange(P, dtype=np.int64), np.ones(P)
    measures = _measures(energies, P)
    left, total = _settle(measures, r)
    parts = [_certain(m, start) for m, start in zip(measures, starts, strict=False)]
    pis = [np.ones(len(part)) for part in parts]
    if left:
        hits = _systematic(measures, left, total, seed, layer)
        for m, start, (o, i) in zip(measures, starts, hits, strict=False):
            parts.append(start + m.chosen(o, i))
            pis.append((m.w[o] * m.v[i] + m.floor).astype(np.float64) * left / total)
    coordinates, pi = np.concatenate(parts), np.concatenate(pis)
    order = np.argsort(coordinates)
    return coordinates[order], pi[order]


def _measures(energies: Sequence[ParamEnergy], P: int) -> list[_Measure]:
    """Of each parameter, with a mean of about 2^20 (less for layers of 2^41 coordinates)."""
    bits = min(_BITS, (61 - P.bit_length()) // 2)
    least = min(e.shift for e in energies)
    wholes = []  # sums of rows, of columns, and the parameter's factor
    for e in energies:
        factor = _ROOTS[1 + (e.shift - least) % (2 * STEPS)] << (e.shift - least) // (2 * STEPS)
        wholes.append((_sum(e.rows), _sum(e.columns), factor))
    whole = sum(A * B * factor for A, B, factor in wholes)
    measures = []
    for e, (A, _, factor) in zip(energies, wholes, strict=True):
        a = len(e.rows)
        w = _lookup(e.rows, a << bits, A)
        v = _lookup(e.columns, (P << bits) * A * factor, a * whole)
        column = np.argsort(-v, kind="stable")
        v = v[column]
        sums = np.concatenate([[0], np.cumsum(v)])
        measures.append(_Measure(w, v, column, sums, 0, np.zeros(a, dtype=np.int64)))
    by_energy = sum(int(m.rows().sum()) for m in measures)
    floor = max(1, by_energy * UNIFORM // ((OF - UNIFORM) * P))
    for m in measures:
        m.floor = floor
    return measures


def _sum(levels: np.ndarray) -> int:
    counts = np.bincount(levels, minlength=len(_ROOTS))
    return sum(int(n) * root for n, root in zip(counts, _ROOTS, strict=True))


def _lookup(levels: np.ndarray, factor: int, divisor: int) -> np.ndarray:
    """[n] int64 of the roots at these levels, times factor / divisor; zeros if that is 0."""
    scaled = [root * factor // divisor if divisor else 0 for root in _ROOTS]
    used = np.zeros(len(_ROOTS), dtype=np.int64)
    for level in np.unique(levels):
        used[level] = scaled[level]
    return used[levels]


def _settle(measures: Sequence[_Measure], r: int) -> tuple[int, int]:
    """Find what is certain; how many are left to draw, and from what measure in all."""
    while True:
        certain = sum(int(m.certain.sum()) for m in measures)
        left, total = r - certain, sum(int(m.rows().sum()) for m in measures)
        if not left:
            return left, total
        for m in measures:
            m.take(-(-total // left))
        if sum(int(m.certain.sum()) for m in measures) == certain:
            return left, total


def _certain(measure: _Measure, start: int) -> np.ndarray:
    counts = measure.certain
    o = np.repeat(np.arange(len(counts)), counts)
    i = np.arange(len(o)) - np.repeat(np.cumsum(counts) - counts, counts)
    return start + measure.chosen(o, i)


def _systematic(
    measures: Sequence[_Measure], left: int, total: int, seed: int, layer: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each parameter: rows and places of what is drawn, `left` in all."""
    counts = [len(m.w) for m in measures]
    start, order, turns = _chance(sum(counts), total, seed, layer)
    # floor((start + k * total) / left), whose products stay below 2^63.
    k, (step, rest) = np.arange(left), divmod(total, left)
    points = k * step + (k * rest + start) // left
    ends = np.cumsum(np.concatenate([m.rows() for m in measures])[order])
    at = np.searchsorted(ends, points, side="right")
    inside = points - np.where(at > 0, ends[at - 1], 0)
    rows = order[at]
    hits, first = [], 0
    for m, count in zip(measures, counts, strict=True):
        mine = (rows >= first) & (rows < first + count)
        o, t = rows[mine] - first, inside[mine]
        width = len(m.v) - m.certain[o]
        turn = m.certain[o] + (turns[rows[mine]] * width >> 32)  # where the row starts
        t = (t + m.before(o, turn)) % m.before(o, np.full(len(o), len(m.v)))
        hits.append((o, m.find(o, t)))
        first += count
    return hits


def _chance(num_rows: int, total: int, seed: int, layer: int) -> tuple[int, np.ndarray, np.ndarray]:
    """A start in 0 .. total - 1; the order of rows; and of each, a number of 32 bits."""
    stream = np.random.Philox(key=np.array([seed, layer], dtype=np.uint64))
    high, low = (int(raw) for raw in stream.random_raw(2))
    order = np.argsort(stream.random_raw(num_rows), kind="stable")
    turns = (stream.random_raw(num_rows) >> np.uint64(32)).astype(np.int64)
    return ((high << 64) + low) * total >> 128, order, turns
