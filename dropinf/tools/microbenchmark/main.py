"""The command: measure a preset, write its results, or compare them with others."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dropinf.text_table import printable
from dropinf.tools.microbenchmark import check, page, sweep


def run(
    preset: str, out: Path, against: Path | None = None
) -> tuple[dict[str, Any], list[str] | None]:
    """Measure, and write results.json, page.md and figures into the directory `out`.

    Returns:
        The results, and lines on what became slower than in those of `against`, if they are given.

    Raises:
        ValueError: there is nothing at `against`, it cannot be compared with, or the preset is for
            a GPU and there is none.
    """
    if against is not None and not against.exists():
        folder = against.parent
        raise ValueError(
            f"bench: {against} is not there; python -m dropinf bench --preset {preset} --out "
            f"{folder} makes it"
        )
    # Bars and log lines of other packages, some for each call.
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.disable(logging.INFO)
    results = sweep.measure(preset, sweep.PRESETS[preset])
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "results.json.partial"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(out / "results.json")
    page.write(results, out)
    print(f"{out / 'page.md'}")
    if against is None:
        return results, None
    old = json.loads(against.read_text())
    return results, compare(old, results, lambda: sweep.measure(preset, sweep.PRESETS[preset]))


def compare(
    old: dict[str, Any], new: dict[str, Any], again: Callable[[], dict[str, Any]]
) -> list[str]:
    """Print what became slower, in a second measurement too.

    Of a hundred comparisons on a shared machine some are off in any one run.
    """
    lines = check.slower(old, new)
    if lines:
        confirmed = set(map(check.subject, check.slower(old, again())))
        lines = [line for line in lines if check.subject(line) in confirmed]
    for line in lines:
        print(printable(line))
    if not lines:
        print("nothing became slower")
    return lines
