"""The command: measure a preset, write its results, or compare them with others."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from dropinf.microbenchmark import check, page, sweep


def run(preset: str, out: Path) -> None:
    """Measure, and write results.json, page.md and figures into the directory `out`."""
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


def compare(old: Path, new: Path) -> int:
    """Print what became slower between two results; the exit status, 1 if something did."""
    lines = check.slower(*(json.loads(path.read_text()) for path in (old, new)))
    for line in lines:
        print(line)
    if not lines:
        print("nothing became slower")
    return bool(lines)
