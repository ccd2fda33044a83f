"""The page and the figure of what frontier.py recorded."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pages
from frontier_contestants import CONTESTANTS, DROPOUT, EKFAC, FULL, OURS, PEERS, WITHOUT_R
from pages import new_figure, row, rows_of, save_figure

NOISE = 2  # standard errors of a difference of means
BEST_OF_OURS = "Dropout and shares by energy"


class Point(NamedTuple):
    """One contestant at one size, over its seeds."""

    name: str
    r: int
    default: float | None  # mean LDS
    tuned: float  # mean LDS
    error: float  # standard error of `tuned`; 0 of one seed
    at_edge: int  # of the two choices of each seed, those at an end of the grid
    choices: int
    ratio: float  # median time beside Dropout's
    ratios: tuple[float, float]  # smallest and largest
    num_bytes: int


def tuned(record: dict[str, Any]) -> tuple[float, list[int]]:
    """LDS with a damping chosen on the other half of the queries, and which were chosen.

    The package's default is among those to choose from.
    """
    found, chosen = [], []
    for chosen_on, judged_on in (("even", "odd"), ("odd", "even")):
        best = max(
            (i for i, value in enumerate(record[chosen_on]) if value is not None),
            key=lambda i: record[chosen_on][i],
        )
        chosen.append(best)
        found.append(record[judged_on][best])
    return statistics.fmean(found), chosen


def default(record: dict[str, Any]) -> float | None:
    """LDS with the package's own damping; None where it has no inverse without one."""
    halves = record["even"][0], record["odd"][0]
    return None if None in halves else statistics.fmean(halves)


def points_of(data: dict[str, Any]) -> list[Point]:
    """In the order of the contestants, then by size; of those that were scored and timed."""
    points = []
    last = len(data["settings"]["dampings"]) - 1
    for name in CONTESTANTS:
        mine = [x for x in data["records"] if x["contestant"] == name]
        times = {x["r"]: x["ratio"] for x in mine if x["stage"] == "time"}
        for r, ratios in sorted(times.items()):
            scored = [x for x in mine if x["stage"] == "score" and x["r"] == r]
            judged = [tuned(x) for x in scored]
            values = [value for value, _ in judged]
            chosen = [i for _, both in judged for i in both]
            defaults = [default(x) for x in scored]
            points.append(
                Point(
                    name,
                    r,
                    None if None in defaults else statistics.fmean(defaults),
                    statistics.fmean(values),
                    standard_error(values),
                    sum(i in (1, last) for i in chosen),
                    len(chosen),
                    statistics.median(ratios),
                    (min(ratios), max(ratios)),
                    scored[0]["bytes"],
                )
            )
    return points


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def front(points: list[Point], cost: str) -> list[Point]:
    """Those that no other has both a lower cost and a higher LDS than, cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (getattr(p, cost), -p.tuned)):
        if not kept or point.tuned > kept[-1].tuned:
            kept.append(point)
    return kept


def compared(a: Point, b: Point) -> str:
    """What a's LDS is: above b's, below, or within noise of it."""
    noise = NOISE * (a.error**2 + b.error**2) ** 0.5
    if abs(a.tuned - b.tuned) <= noise:
        return "within noise of"
    return "above" if a.tuned > b.tuned else "below"


def write_report(data: dict[str, Any], page: Path, figures: Path) -> None:
    points = points_of(data)
    drawn = draw(points, figures / "frontier.svg")
    link = pages.link(drawn, page)
    lines = [
        *head(data, points),
        "",
        f"![LDS against seconds and bytes]({link})",
        "",
        *conclusions(points),
        "",
        *table(points),
    ]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def head(data: dict[str, Any], points: list[Point]) -> Iterator[str]:
    settings, task = data["settings"], data["settings"]["task"]
    yield from pages.head("frontier", "LDS against seconds and bytes", data)
    yield (
        f"{task['about']}. {task['n']} training examples, {task['m']} queries, {task['halves']} "
        f"models retrained on random halves. Means over {settings['seeds']} seeds of the random "
        "matrix ± standard error; of EK-FAC, which samples labels, one seed."
    )
    yield ""
    grid = ", ".join(str(d) for d in settings["dampings"] if d is not None)
    yield (
        "- LDS, default: with the damping that the package takes if it is told nothing: 0.1 of the "
        "mean eigenvalue in dropinf and Bergson, 1e-5 of it in dattri, none in TRAK, 1e-8 in "
        "Kronfluence."
    )
    yield (
        f"- LDS: with the best of that and of {grid} times the mean eigenvalue, the same grid for "
        "all, chosen on one half of the queries and judged on the other, both ways round."
    )
    yield (
        "- time: the processor's, on one thread, from the trained model to the scores (training "
        "rows, inverse, queries, scores; measuring energies too), over that of Dropout with the "
        "second largest r in the same round: median (smallest to largest) of "
        f"{settings['rounds']} rounds. Random matrices and compiled functions are made before. "
        "dropinf's check of the first batch is off. The machine was shared with other work, which "
        "the processor's time leaves out but for what that does to caches, so differences of a "
        "fifth say nothing."
    )
    yield (
        "- bytes: of the rows that are kept of the training set; TRAK's are its features; EK-FAC "
        "keeps its factors and forms the training gradients anew for every set of queries. "
        "Inverses come on top for all."
    )
    missing = [name for name in CONTESTANTS if name not in {point.name for point in points}]
    if missing:
        yield f"- Not measured, as they were not installed: {', '.join(missing)}."


def conclusions(points: list[Point]) -> Iterator[str]:
    yield "## What came out"
    yield ""
    for cost, words in (("ratio", "time"), ("num_bytes", "bytes")):
        best = "; ".join(f"{label(p)} {p.tuned:.3f}" for p in front(points, cost))
        yield f"- No other is both cheaper in {words} and higher in LDS than: {best}."
    by_size = {(p.name, p.r): p for p in points}
    for ours in (DROPOUT, BEST_OF_OURS):
        words: dict[str, list[str]] = {"above": [], "within noise of": [], "below": []}
        for (name, r), peer in by_size.items():
            if name in PEERS and (ours, r) in by_size:
                words[compared(by_size[ours, r], peer)].append(f"{name} {r}")
        said = "; ".join(f"{word} {', '.join(found)}" for word, found in words.items() if found)
        if said:
            yield f"- {ours} at the same r is, in LDS, {said}."
    whole = [p for p in points if p.name in WITHOUT_R]
    mine = [p for p in points if p.name in OURS and p.name != FULL]
    for peer in whole:
        above = [p for p in mine if compared(p, peer) == "above"]
        if above:
            said = f"is passed by {', '.join(map(label, above))}"
        else:
            said = "is passed by none of dropinf's compressed ways"
        yield (
            f"- {peer.name} has {peer.tuned:.3f} at {peer.ratio:.1f} times the time and "
            f"{megabytes(peer.num_bytes)}; it {said}."
        )
    edge = [label(p) for p in points if p.at_edge > p.choices / 2]
    if edge:
        yield f"- Most choices of a damping lie at an end of the grid for: {', '.join(edge)}."
    gains = [p for p in points if p.default is not None and p.tuned > p.default]
    if gains:
        most = max(gains, key=lambda p: p.tuned - p.default)
        yield (
            f"- A damping that was chosen instead of the default gains most for {label(most)}: "
            f"from {most.default:.3f} to {most.tuned:.3f}."
        )


def label(point: Point) -> str:
    return point.name if point.name in WITHOUT_R else f"{point.name} {point.r}"


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f} MB"


def table(points: list[Point]) -> Iterator[str]:
    yield from rows_of(("contestant", "r", "LDS, default", "LDS", "time", "bytes"))
    for p in points:
        yield row(
            p.name,
            "" if p.name in WITHOUT_R else p.r,
            "singular" if p.default is None else f"{p.default:.3f}",
            f"{p.tuned:.3f}" if p.name in WITHOUT_R else f"{p.tuned:.3f} ± {p.error:.3f}",
            f"{p.ratio:.2f} ({p.ratios[0]:.2f} to {p.ratios[1]:.2f})",
            megabytes(p.num_bytes),
        )


def draw(points: list[Point], path: Path) -> Path:
    """Two panels: LDS against time and against bytes; peers dashed."""
    from matplotlib import colormaps

    figure, panels = new_figure("frontier", 1, 2, figsize=(11, 5), sharey=True)
    names = list(dict.fromkeys(p.name for p in points))
    colors = colormaps["tab20"].colors  # more than the ten of a cycle
    costs = (
        (
            "ratio",
            1,
            "processor's time from model to scores, over Dropout's with the second largest r",
        ),
        ("num_bytes", 1e6, "MB kept of the training set"),
    )
    for panel, (cost, unit, words) in zip(panels, costs, strict=True):
        for number, name in enumerate(names):
            mine = [p for p in points if p.name == name]
            panel.errorbar(
                [getattr(p, cost) / unit for p in mine],
                [p.tuned for p in mine],
                [p.error for p in mine],
                label=name,
                color={FULL: "black", EKFAC: "grey"}.get(name, colors[number]),
                linestyle="-" if name in OURS else "--",
                marker="*" if name in WITHOUT_R else "o" if name in OURS else "s",
                markersize=10 if name in WITHOUT_R else 4,
                linewidth=1,
            )
        panel.set_xscale("log")
        panel.set_xlabel(words, fontsize=9)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("LDS, damping chosen on other queries")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return save_figure(figure, path)
