"""The page of a result: tables, fitted exponents, and figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dropinf.tools.microbenchmark.sweep import TITLES

_SIZES = ("n", "r", "d")
_SAID = {
    "formed": "Gradients [n, d] in memory are compressed to [n, r].",
    "passes": (
        "A stack of four linear layers of d weights each, 32 positions an example: a batch of n "
        "examples to rows of r entries a layer."
    ),
}


class Fit(NamedTuple):
    """time ~ size^exponent, by least squares in logarithms.

    Attributes:
        exponent: over all sizes.
        last: between the two largest sizes, where fixed costs weigh least.
        residual: largest factor by which a time is off the fitted line.
        low, high: smallest and largest size.
    """

    exponent: float
    last: float
    residual: float
    low: int
    high: int


def fit(sizes: Sequence[float], times: Sequence[float]) -> Fit:
    """Of two sizes or more, rising."""
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(times, float))
    slope, level = np.polyfit(x, y, 1)
    off = float(np.abs(y - (slope * x + level)).max())
    last = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
    return Fit(float(slope), last, math.exp(off), int(sizes[0]), int(sizes[-1]))


def series(found: dict[str, Any], variable: str) -> dict[str, list[tuple[int, list[float]]]]:
    """Contestant -> (value, [median, smallest, largest] ms) of the sizes that differ in `variable`
    alone from the base, rising."""
    base = found["base"]
    points = [p for p in found["points"] if all(p[s] == base[s] for s in _SIZES if s != variable)]
    points.sort(key=lambda p: p[variable])
    names = dict.fromkeys(name for p in points for name in p["ms"])
    return {n: [(p[variable], p["ms"][n]) for p in points if n in p["ms"]] for n in names}


def write(results: dict[str, Any], folder: Path) -> None:
    """page.md, and its figures where matplotlib is installed."""
    figures = _figures(results, folder)
    (folder / "page.md").write_text("\n".join(_page(results, figures)) + "\n", encoding="utf-8")


def _page(results: dict[str, Any], figures: dict[tuple[str, str], str]) -> Iterator[str]:
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    yield "# What compressing costs\n"
    yield (
        f"`python -m dropinf bench --preset {results['preset']}`, {results['date'][:10]}, "
        f"{results['machine']}; {versions}; commit {results['commit'] or 'unknown'}.\n"
    )
    yield (
        f"Contestants alternate in one process, {results['rounds']} rounds; figures are medians, "
        "with the smallest and largest. A contestant whose call takes more than "
        f"{results['budget']:g} s is left out of larger sizes, except for Dropout and the floor, "
        "to which the ratios are. Each was checked against its "
        "definition before. Of projections made anew in each call, the making is part of the time, "
        "as it is in use."
    )
    if not figures:
        yield "\nWithout figures: matplotlib is missing; pip install 'dropinf[demo]'."
    for setting, found in results["settings"].items():
        yield f"\n## {TITLES[setting]}\n\n{_SAID[setting]}\n"
        yield from _base_table(found)
        yield from _exponents(found)
        for variable in _SIZES:
            if (setting, variable) in figures:
                yield f"\n![time against {variable}]({figures[setting, variable]})"
            yield from _sweep_table(found, variable)
        yield from _left_out(found)


def _base_table(found: dict[str, Any]) -> Iterator[str]:
    base = found["base"]
    (at,) = (p for p in found["points"] if all(p[s] == base[s] for s in _SIZES))
    yield f"At n={base['n']}, r={base['r']}, d={base['d']:,}:\n"
    memory = found["peak_mb"]
    yield f"| contestant | ms | times {found['ours']} |" + " peak memory, MB |" * bool(memory)
    yield "| --- | --- | --- |" + " --- |" * bool(memory)
    for name, ms in at["ms"].items():
        mb = memory.get(name)
        peak = f" {'' if mb is None else f'{mb:.3g}'} |" if memory else ""
        yield f"| {name} | {_spread(ms)} | {_spread(at['ratio'][name])} |{peak}"


def _exponents(found: dict[str, Any]) -> Iterator[str]:
    yield (
        "\nExponents of time, fitted over all sizes, and in brackets between the two largest, "
        "where fixed costs weigh least; the largest factor by which a time is off its line; and "
        "the smallest and largest size, which budgets may cut short:\n"
    )
    yield "| contestant | in n | in r | in d |\n| --- | --- | --- | --- |"
    by_variable = {variable: series(found, variable) for variable in _SIZES}
    for name in dict.fromkeys(n for s in by_variable.values() for n in s):
        cells = []
        for variable in _SIZES:
            points = by_variable[variable].get(name, [])
            if len(points) < 2:
                cells.append("")
                continue
            line = fit([x for x, _ in points], [ms[0] for _, ms in points])
            cells.append(
                f"{line.exponent:.2f} ({line.last:.2f}), {line.residual:.2g}, "
                f"{line.low:,} to {line.high:,}"
            )
        yield f"| {name} | {' | '.join(cells)} |"


def _sweep_table(found: dict[str, Any], variable: str) -> Iterator[str]:
    lines = series(found, variable)
    values = sorted({x for points in lines.values() for x, _ in points})
    yield f"\nms against {variable}:\n"
    yield f"| contestant | {' | '.join(f'{v:,}' for v in values)} |"
    yield "| --- |" + " --- |" * len(values)
    for name, points in lines.items():
        at = dict(points)
        yield f"| {name} | {' | '.join(_spread(at[v]) if v in at else '' for v in values)} |"


def _left_out(found: dict[str, Any]) -> Iterator[str]:
    lines = [f"- {name}: {reason}" for name, reason in found["left_out"].items()]
    sizes: dict[str, list[str]] = {}
    for p in found["points"]:
        for name, reason in p["left_out"].items():
            where = f"n={p['n']}, r={p['r']}, d={p['d']:,}"
            sizes.setdefault(name, []).append(f"{where} ({reason})")
    lines += [f"- {name} at {'; '.join(where)}" for name, where in sizes.items()]
    if lines:
        yield "\nNot measured:\n"
        yield from lines


def _spread(values: Sequence[float]) -> str:
    return "{:.3g} ({:.3g} to {:.3g})".format(*values)


def _figures(results: dict[str, Any], folder: Path) -> dict[tuple[str, str], str]:
    """(setting, variable) -> the file of its figure."""
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "dropinf"  # the same ids every time
    files = {}
    for setting, found in results["settings"].items():
        for variable in _SIZES:
            figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
            for name, points in series(found, variable).items():
                ours, floor = name.startswith("dropinf"), name == found["floor"]
                axes.loglog(
                    [x for x, _ in points],
                    [ms[0] for _, ms in points],
                    "k:" if floor else "o-" if ours else "x--",
                    label=name,
                    linewidth=2 if name == found["ours"] else 1,
                    markersize=4,
                )
            axes.set(xlabel=variable, ylabel="ms", title=TITLES[setting])
            axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
            files[setting, variable] = f"{setting}-{variable}.svg"
            figure.savefig(folder / files[setting, variable], metadata={"Date": None})
            pyplot.close(figure)
    return files
