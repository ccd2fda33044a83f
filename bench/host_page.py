"""What bench_host prints: markdown."""

from typing import Any

from host_cases import A_LAYER, OF_FLOOR, OF_PLAIN
from report import spread


def head(results: dict[str, Any]) -> list[str]:
    """What was run, where and how."""
    r, whole_r = results["r"]
    return [
        f"# What a capture costs the host, {results['date']}",
        "",
        f"{results['machine']}; {results['versions']}; commit {results['commit'] or 'unknown'}.",
        "",
        "Contestants alternate in one process; figures are medians over "
        f"{results['rounds']} rounds ({results['whole_rounds']} of whole models), with the "
        f"smallest and largest. Ratios are within a round. r={r} a layer ({whole_r} of whole "
        f"models). `collect` takes {results['collected']} batches, of which it proves the first; "
        "its times are of one batch.",
    ]


def table(case: dict[str, Any]) -> list[str]:
    """The contestants of one case."""
    measures = [m for m in (OF_FLOOR, OF_PLAIN, A_LAYER) if in_table(case, m)]
    lines = ["", f"## {case['title']}", ""]
    lines += [row("contestant", "ms", *measures), row(*["---"] * (2 + len(measures)))]
    for name, found in case["contestants"].items():
        values = (spread(found[m]) if m in found else "" for m in ("ms", *measures))
        lines.append(row(name, *values))
    for name, why in case["left_out"].items():
        lines.append(row(name, f"not run: {why}", *[""] * len(measures)))
    return lines


def bars_table(cases: list[dict[str, Any]]) -> list[str]:
    """What must hold, and whether it does."""
    lines = ["", "## What must hold", ""]
    lines.append(row("case", "contestant", "measure", "at most", "is", "reached"))
    lines.append(row(*["---"] * 6))
    for case in cases:
        for bar in case["bars"]:
            reached = "yes" if bar["found"] <= bar["at_most"] else "**no**"
            values = bar["contestant"], bar["measure"], f"{bar['at_most']:g}", f"{bar['found']:.3g}"
            lines.append(row(case["title"], *values, reached))
    return lines


def in_table(case: dict[str, Any], measure: str) -> bool:
    return any(measure in found for found in case["contestants"].values())


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
