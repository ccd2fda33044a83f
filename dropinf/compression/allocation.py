"""How many entries each layer has: r, rate or total, and how a total is shared out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np

from dropinf.compression.energy import Energies, ParamEnergy, energy_of
from dropinf.compression.energy_draw import OF, UNIFORM

Allocation = Literal["size", "sqrt", "equal", "energy"]
Layer = tuple[str, Sequence[tuple[int, ...]]]  # its name, and the shapes of its parameters
LayerEnergies = Sequence[Sequence[ParamEnergy]]  # of the parameters of each layer


def check_budget(compression: Any) -> None:
    """Refuse fields r, rate, total, seed and allocation of a compression that are out of range."""
    name, given = type(compression).__name__, []
    for field in ("r", "rate", "total"):
        value = getattr(compression, field)
        if value is None:
            continue
        given.append(field)
        if field != "rate" and (not _is_whole(value) or value < 1):
            raise ValueError(f"{name}: {field} must be a whole number from 1, got {value!r}")
    if len(given) != 1:
        raise ValueError(f"{name}: give exactly one of r, rate, total; got {given or 'none'}")
    rate, seed = compression.rate, compression.seed
    if rate is not None and not (isinstance(rate, Real) and 0 < rate <= 1):
        raise ValueError(f"{name}: rate must be in (0, 1], got {rate!r}")
    if not _is_whole(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"{name}: seed must be in 0 .. 2^64 - 1, got {seed!r}")
    if compression.allocation not in get_args(Allocation):
        raise ValueError(
            f"{name}: allocation must be one of {get_args(Allocation)}, got "
            f"{compression.allocation!r}"
        )
    energies = getattr(compression, "energies", None)
    if energies is not None and not isinstance(energies, Energies):
        raise ValueError(
            f"{name}: energies must be what dropinf.energies returns, got {type(energies).__name__}"
        )
    if compression.allocation == "energy":
        if not hasattr(compression, "energies"):
            raise ValueError(f"{name}: allocation='energy' is for Dropout and Sketch")
        if energies is None:
            raise ValueError(
                f"{name}: allocation='energy' needs energies=; measure them with dropinf.energies"
            )
    elif compression.allocation != "size" and compression.total is None:
        raise ValueError(f"{name}: allocation={compression.allocation!r} shares out total=")


def entries_of(
    compression: Any, layers: Sequence[Layer], energies: LayerEnergies | None = None
) -> list[int]:
    """Entries of each layer, 1 to its size; `energies` are those of its parameters."""
    sizes = [sum(map(math.prod, shapes)) for _, shapes in layers]
    total = compression.total
    if compression.r is not None:
        entries = [min(compression.r, P) for P in sizes]
    elif compression.rate is not None:
        entries = [max(1, round(compression.rate * P)) for P in sizes]
    if compression.allocation == "energy":
        total = sum(entries) if total is None else total
    elif total is None:
        return entries
    name = type(compression).__name__
    return allocate(name, total, layers, compression.allocation, energies)


def allocate(
    op: str,
    total: int,
    layers: Sequence[Layer],
    allocation: Allocation,
    energies: LayerEnergies | None = None,
) -> list[int]:
    """`total` shared out: one each, the rest by weight (largest remainders), at most all of each.

    What falls to a layer beyond its size is shared out over the others anew.
    """
    sizes = [sum(map(math.prod, shapes)) for _, shapes in layers]
    if total < len(layers):
        raise ValueError(
            f"{op}: {total} entries leave {layers[total][0]!r} without one; give at least "
            f"{len(layers)}"
        )
    kept, left = [1] * len(sizes), min(total, sum(sizes)) - len(sizes)
    shares = _shares(sizes, allocation, energies)
    while left:
        room = [P - r for P, r in zip(sizes, kept, strict=True)]
        weights = (
            room if shares is None else [s * (m > 0) for s, m in zip(shares, room, strict=True)]
        )
        quotas = [Fraction(left * w, sum(weights)) for w in weights]
        full = [l for l, (q, m) in enumerate(zip(quotas, room, strict=True)) if q >= m > 0]
        for l in full:
            kept[l] = sizes[l]
            left -= room[l]
        if not full:
            kept = [r + math.floor(q) for r, q in zip(kept, quotas, strict=True)]
            remainders = sorted(range(len(sizes)), key=lambda l: (-(quotas[l] % 1), l))
            for l in remainders[: left - sum(map(math.floor, quotas))]:
                kept[l] += 1
            left = 0
    return kept


def _shares(
    sizes: Sequence[int], allocation: Allocation, energies: LayerEnergies | None
) -> list[int] | None:
    """The weight of each layer in a share, integers, so that no machine's rounding decides; None
    for the room that is left in it."""
    if allocation == "size":
        return None
    if allocation == "equal":
        return [1] * len(sizes)
    if energies is not None:
        least = min(e.shift for layer in energies for e in layer)
        wholes = [sum(energy_of(e, least) for e in layer) for layer in energies]
        roots = [math.isqrt(E * P) for E, P in zip(wholes, sizes, strict=True)]
        # Mixed with the shares by size, as coordinates are with the uniform draw: what the examples
        # did not move, such as A of LoRA while B is 0, may move later. A layer then has at least a
        # tenth of its share by size.
        by_energy, by_size = sum(sizes) * (OF - UNIFORM), (sum(roots) or 1) * UNIFORM
        return [root * by_energy + P * by_size for root, P in zip(roots, sizes, strict=True)]
    return [math.isqrt(P << 40) for P in sizes]  # six digits behind the point


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
