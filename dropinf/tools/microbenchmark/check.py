"""What became slower: two results, compared by ratios."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# How much slower beyond what both spreads explain: two busy cores differ by so much between runs.
_TOLERANCE = 1.25


def slower(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A sentence for each contestant of dropinf that became slower at some size.

    Times are compared as multiples of the floor's in the same run, so that machines may differ. It
    is slower if its smallest multiple now is above its largest then, by a quarter, where
    what is over its budget now takes at least that.

    Raises:
        ValueError: the results are not of one preset, or have no size in common.
    """
    if old["preset"] != new["preset"]:
        raise ValueError(
            f"bench-check: results are of presets {old['preset']!r} and {new['preset']!r}; compare "
            "those of one"
        )
    lines, compared = [], 0
    for setting, found in new["settings"].items():
        then = {_size(p): p for p in old["settings"].get(setting, {}).get("points", [])}
        for point in found["points"]:
            before = then.get(_size(point))
            if before is None:
                continue
            floor = found["floor"]
            for name in before["ms"]:
                if not name.startswith("dropinf") or name not in point["left_out"]:
                    continue
                compared += 1
                at_least = 1e3 * new["budget"] / point["ms"][floor][0]
                if at_least > _TOLERANCE * before["ms"][name][2] / before["ms"][floor][0]:
                    lines.append(
                        f"{setting}: {name} at n={point['n']}, r={point['r']}, d={point['d']:,} "
                        f"is left out, {point['left_out'][name]}; it was measured before"
                    )
            for name, was, now in _multiples(before, point, floor):
                compared += 1
                if now[1] > _TOLERANCE * was[2]:
                    lines.append(
                        f"{setting}: {name} at n={point['n']}, r={point['r']}, d={point['d']:,} "
                        f"takes {now[0]:.3g} times the floor, {was[0]:.3g} before"
                    )
    if not compared:
        raise ValueError("bench-check: the results have no size in common")
    return lines


def subject(line: str) -> str:
    """Who, and at which size, a sentence of `slower` is about."""
    return line.partition(" takes ")[0].partition(" is left out")[0]


def _size(point: dict[str, Any]) -> tuple[int, int, int]:
    return point["n"], point["r"], point["d"]


def _multiples(
    before: dict[str, Any], after: dict[str, Any], floor: str
) -> Iterator[tuple[str, list[float], list[float]]]:
    """Contestants of dropinf with [median, smallest, largest] of their time over the floor's.

    The floor's own spread is part of it: at sizes of a millisecond it may be twofold.
    """
    for name in before["ms"].keys() & after["ms"].keys():
        if name.startswith("dropinf"):
            yield name, *(_over(p["ms"][name], p["ms"][floor]) for p in (before, after))


def _over(ms: list[float], floor: list[float]) -> list[float]:
    return [ms[0] / floor[0], ms[1] / floor[2], ms[2] / floor[1]]
