"""How many entries each layer has: r, rate or total, and how a total is shared out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np

Allocation = Literal["size", "sqrt", "equal"]
Layer = tuple[str, Sequence[tuple[int, ...]]]  # its name, and the shapes of its parameters


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
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"{name}: rate must be in (0, 1], got {rate!r}")
    if not _is_whole(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"{name}: seed must be in 0 .. 2^64 - 1, got {seed!r}")
    if compression.allocation not in get_args(Allocation):
        raise ValueError(
            f"{name}: allocation must be one of {get_args(Allocation)}, got "
            f"{compression.allocation!r}"
        )
    if compression.allocation != "size" and compression.total is None:
        raise ValueError(f"{name}: allocation={compression.allocation!r} shares out total=")


def entries_of(compression: Any, layers: Sequence[Layer]) -> list[int]:
    """Entries of each layer, 1 to its size."""
    sizes = [sum(map(math.prod, shapes)) for _, shapes in layers]
    if compression.r is not None:
        return [min(compression.r, P) for P in sizes]
    if compression.rate is not None:
        return [max(1, round(compression.rate * P)) for P in sizes]
    name = type(compression).__name__
    return allocate(name, compression.total, layers, compression.allocation)


def allocate(op: str, total: int, layers: Sequence[Layer], allocation: Allocation) -> list[int]:
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
    while left:
        room = [P - r for P, r in zip(sizes, kept, strict=True)]
        weights = [_weight(P, m, allocation) for P, m in zip(sizes, room, strict=True)]
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


def _weight(P: int, room: int, allocation: Allocation) -> int:
    """Of a layer in a share; integers, so that no machine's rounding decides."""
    if allocation == "size":
        return room
    # Six digits behind the point of a root.
    return (math.isqrt(P << 40) if allocation == "sqrt" else 1) if room else 0


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
