"""What pages of experiments have in common: the head, and numbers with their errors."""

import statistics
from collections.abc import Sequence
from typing import Any

from quality_report import row, rows_of

__all__ = ["head", "mean_error", "row", "rows_of"]


def head(title: str, data: dict[str, Any]) -> list[str]:
    """The title, and where, with what and when it was made."""
    machine = data["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    commits = ", ".join(dict.fromkeys(run["commit"][:12] for run in data["runs"]))
    quick = (
        " (--quick: tiny sizes, which show only that it runs)" if data["settings"]["quick"] else ""
    )
    return [
        f"# {title}{quick}",
        "",
        f"One thread of {machine['cores']} cores of {machine['cpu']}, {machine['system']}; "
        f"{packages}; commit {commits}; {data['runs'][-1]['date'][:10]}.",
        "",
    ]


def mean_error(values: Sequence[float]) -> str:
    """Mean ± standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"
