"""What pages of experiments have in common: the head, tables, and figures beside them."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def head(name: str, title: str, data: dict[str, Any]) -> list[str]:
    """The title, and with what command, where, with what and when it was made."""
    machine = data["machine"]
    packages = ", ".join(f"{package} {version}" for package, version in data["versions"].items())
    commits = ", ".join(dict.fromkeys(run["commit"][:12] for run in data["runs"]))
    quick = (
        " (--quick: tiny sizes, which show only that it runs)" if data["settings"]["quick"] else ""
    )
    return [
        f"# {title}{quick}",
        "",
        f"`python bench/experiments/{name}.py`; one thread of {machine['cores']} cores of "
        f"{machine['cpu']}, {machine['system']}; {packages}; commit {commits}; "
        f"{data['runs'][-1]['date'][:10]}.",
        "",
    ]


def rows_of(heads: Sequence[str]) -> list[str]:
    """The first two rows of a table."""
    return [row(*heads), row(*["---"] * len(heads))]


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def mean_error(values: Sequence[float]) -> str:
    """Mean ± standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def new_figure(name: str, *grid: int, **options: Any) -> tuple[Any, Any]:
    """matplotlib's figure and its panels; `name` makes the same figure the same file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = name
    return pyplot.subplots(*grid, layout="constrained", **options)


def save_figure(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def link(drawn: Path, page: Path) -> str:
    """From a page to its figure."""
    return Path(os.path.relpath(drawn, page.parent)).as_posix()
