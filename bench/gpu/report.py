"""Short Markdown tables of a part, and figures where matplotlib is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.results import Results


def print_part(results: Results, part: str) -> None:
    """What came of it."""
    data = results.data
    where = data["device"]["name"] + (", a rehearsal on the CPU" if data["rehearsal"] else "")
    print(f"\n## make gpu PART={part}: {where}\n")
    if part == "test":
        table(
            ["backend/op", "passed", "failed", "skipped", "complete"],
            [[of, *counts.values()] for of, counts in sorted(data["verified"].items())],
        )
    elif part == "sanitize":
        table(
            ["tool", "state", "errors"],
            [[tool, s["state"], s.get("errors")] for tool, s in data["sanitizers"].items()],
        )
    else:
        for name, value in data["ceilings"].items() if part == "bench" else ():
            print(f"{name}: {value:.4g}  ")
        print()
        table(
            ["target", "mode", "contestant", "against", "measured", "met"],
            [target_cells(target) for target in results.of("targets", part)],
        )
        failed = [r for r in results.of("rows", part) if r.get("reason")]
        for row in failed:
            print(f"failed: {row['case']}: {row['contestant']}: {row['reason']}")
    for entry in results.of("left_out", part):
        print(f"left out: {entry['what']}: {entry['reason']}")


def target_cells(target: dict[str, Any]) -> list[Any]:
    measured = target["measured"]
    if measured is None:
        return [target["target"], "", "", "", target.get("reason"), ""]
    cells = [target[key] or "" for key in ("target", "mode", "contestant", "against")]
    figures = "{median:.3g} ({min:.3g} to {max:.3g})".format(**measured)
    return [*cells, figures, "yes" if target["met"] else "**no**"]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join("" if c is None else str(c) for c in cells) + " |")


def draw(results: Results, part: str) -> Path | None:
    """An SVG of the part's times beside the JSON; None where there is nothing to draw it with."""
    rows = [r for r in results.of("rows", part) if r.get("us")]
    modes = {r["case"]: "graph" for r in rows if r["mode"] == "graph"}
    rows = [r for r in rows if r["mode"] == modes.get(r["case"], "eager")]
    if not rows:
        return None
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed")
        return None
    matplotlib.use("svg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(r["case"] for r in rows))
    lines = len(rows) + 2 * len(cases)
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.16 * lines))
    y, ticks = 0, []
    for case in cases:
        ticks.append((y, case, "bold"))
        y += 1
        for row in (r for r in rows if r["case"] == case):
            us = row["us"]
            error = [[us["median"] - us["min"]], [us["max"] - us["median"]]]
            axes.barh(y, us["median"], xerr=error, color="C1" if row["ours"] else "C0")
            ticks.append((y, row["contestant"], "normal"))
            y += 1
        y += 1
    axes.set_yticks([t[0] for t in ticks], [t[1] for t in ticks], fontsize=6)
    for label, tick in zip(axes.get_yticklabels(), ticks, strict=True):
        label.set_fontweight(tick[2])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("µs; CUDA graph replays where there are any")
    note = " (REHEARSAL ON A CPU)" if results.data["rehearsal"] else ""
    axes.set_title(f"{part}, {results.data['device']['name']}{note}", fontsize=8)
    path = results.path.with_name(f"{results.path.stem}-{part}.svg")
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
    return path
