"""The command: measure a preset, write its results, or compare them with others."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from dropinf.microbenchmark import check, page, sweep


def run(preset: str, out: Path, against: Path | None = None) -> int:
    """Measure, and write results.json, page.md and figures into the directory `out`.

    Returns:
        The exit status: 1 if something became slower than in the results `against`.

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
    return 0 if against is None else compare(against, out / "results.json")


def compare(old: Path, new: Path) -> int:
    """Print what became slower between two results; the exit status, 1 if something did."""
    lines = check.slower(*(json.loads(path.read_text()) for path in (old, new)))
    for line in lines:
        print(line)
    if not lines:
        print("nothing became slower")
    return bool(lines)
