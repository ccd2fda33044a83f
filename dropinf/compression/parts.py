"""What a compression keeps of a layer, parameter by parameter, and how coordinates are drawn.

A compression is a frozen dataclass with `keep(layers)`: of every layer, what is kept of each of its
parameters. It depends on shapes, seed and integer energies alone, so that a plan is the same on
every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dropinf.compression.energy import ParamEnergy
from dropinf.compression.energy_draw import draw_by_energy
from dropinf.compression.entry_map import EntryMap


class Part(NamedTuple):
    """What is kept of one parameter of a layer.

    Attributes:
        index: [n] int64, sorted positions in the flattened parameter.
        first: number of its first entry in the layer.
        scale: factor of the n values; [n] float64, or one for all.
        entry_map: makes entries of the values; None takes each as one.
    """

    index: np.ndarray
    first: int
    scale: float | np.ndarray
    entry_map: EntryMap | None = None


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


def draw_layer(
    shapes: Sequence[tuple[int, ...]],
    r: int,
    seed: int,
    layer: int,
    energies: Sequence[ParamEnergy] | None = None,
) -> list[tuple[np.ndarray, int, float | np.ndarray]]:
    """For each parameter: positions in it, the number of the first of r coordinates of its layer,
    and 1 / sqrt(pi), which makes products of entries unbiased. Uniform without energies.
    """
    P = sum(map(math.prod, shapes))
    if energies is None:
        drawn = by_parameter(draw(P, r, seed, layer), shapes)
        return [(index, first, math.sqrt(P / r)) for index, first in drawn]
    coordinates, pi = draw_by_energy(energies, r, seed, layer)
    scale = 1 / np.sqrt(pi)
    drawn = by_parameter(coordinates, shapes)
    return [(index, first, scale[first : first + len(index)]) for index, first in drawn]


def by_parameter(
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
