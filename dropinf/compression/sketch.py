"""Sketch keeps signed sums of sampled coordinates."""

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
from dropinf.compression.entry_map import SignedSums
from dropinf.compression.parts import Part, draw_layer


@dataclass(frozen=True, repr=False)
class Sketch(AsWritten):
    """Keep sums of s coordinates each, with random signs.

    r s coordinates are drawn without replacement inside a layer, uniformly or by energy, all P of
    them once s r ≥ P, and shared out over the r entries, so that each has s or, of all P, as many
    as there are. Entry k is the sum of ± g_j / sqrt(pi_j) over its coordinates, with the
    probability pi_j that j had of being drawn, r s / P if uniform. A product of two rows is the sum
    of ± g_i h_j / sqrt(pi_i pi_j) over pairs in one entry: independent signs leave i = j in the
    mean, and the draw pi_j (g_j h_j / pi_j), so that it is unbiased for that of the gradients, as
    with `Dropout`. Each entry averages over s coordinates, which keeps more of the signal at small
    r. (A count sketch, Charikar et al. 2002, of the drawn coordinates, with buckets of one size.)

        plan = dropinf.Plan.make(model, dropinf.Sketch(r=256, s=4))

    Exactly one of r, rate and total is given:

    Args:
        r: entries of each layer.
        s: coordinates of an entry.
        rate: entries as a fraction of each layer's coordinates, in (0, 1].
        total: entries of all layers together, at least one each.
        seed, allocation, energies: as in `Dropout`.

    Raises:
        ValueError: not exactly one of the three is given, or a number is out of range.
    """

    r: int | None = None
    s: int = 4
    rate: float | None = None
    total: int | None = None
    seed: int = 0
    allocation: Allocation = "size"
    energies: Energies | None = None

    def __post_init__(self) -> None:
        check_budget(self)
        if isinstance(self.s, bool) or not isinstance(self.s, int | np.integer) or self.s < 1:
            raise ValueError(f"Sketch: s must be a whole number from 1, got {self.s!r}")

    def keep(
        self, layers: Sequence[Layer], energies: LayerEnergies | None = None
    ) -> list[list[Part]]:
        """Of each layer (name, shapes): the part of each parameter, `energies` being theirs."""
        kept = []
        budget = entries_of(self, layers, energies)
        for l, ((_, shapes), r) in enumerate(zip(layers, budget, strict=True)):
            P = sum(map(math.prod, shapes))
            n = min(P, r * self.s)
            mine = None if energies is None else energies[l]
            drawn = draw_layer(shapes, n, self.seed, l, mine)
            # Counter-based, and apart from the draw's stream by the top bit of the key.
            key = np.array([self.seed, l + 2**63], dtype=np.uint64)
            raw = np.random.Philox(key=key).random_raw(2 * n)
            sign = 2 * (raw[n:] >> np.uint64(63)).astype(np.int8) - 1
            parts = []
            for index, first, scale in drawn:
                here, last = slice(first, first + len(index)), first + len(index) - 1
                # Shuffled inside of the parameter, so that at most one entry lies in two of them.
                place = first + np.argsort(np.argsort(raw[here], kind="stable"))
                start = first * r // n
                entry_map = SignedSums(
                    place * r // n - start,
                    sign[here],
                    first,
                    shares_first=0 < first < n and (first - 1) * r // n == start,
                    shares_last=0 <= last < n - 1 and (last + 1) * r // n == last * r // n,
                )
                parts.append(Part(index, start, scale, entry_map))
            kept.append(parts)
        return kept
