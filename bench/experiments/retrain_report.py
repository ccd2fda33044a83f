"""The page and the figure of what retrain.py recorded."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from quality_contestants import DOT
from quality_report import row, rows_of

ALL, RANDOM, BM25 = "none left out", "at random", "BM25"
NOISE = 2  # standard errors


class Change(NamedTuple):
    """Of the loss of the queries, mean over groups and seeds, beside the model of all examples.

    Attributes:
        change, error: and its standard error over groups, of means over seeds.
        more, more_error: how much more than at random, and its error over groups.
        groups_up: of how many groups the loss goes up more than at random.
    """

    method: str
    k: int
    change: float
    error: float
    seeds_error: float
    more: float
    more_error: float
    groups_up: int


def changes(records: list[dict[str, Any]], task: str) -> list[Change]:
    """In the order in which they were recorded."""
    losses = {(x["method"], x["k"]): np.array(x["losses"]) for x in records if x["task"] == task}
    whole = losses[ALL, 0][:, 0]  # [seeds, groups]
    found = []
    for (method, k), some in losses.items():
        if method == ALL:
            continue
        # Of a method, model g lacks the top of group g; any random one serves all groups.
        own = some.mean(1) if method == RANDOM else np.diagonal(some, axis1=1, axis2=2)
        change = own - whole
        more = (own - losses[RANDOM, k].mean(1)).mean(0)
        found.append(
            Change(
                method,
                k,
                float(change.mean()),
                standard_error(change.mean(0)),
                standard_error(change.mean(1)),
                float(more.mean()),
                standard_error(more),
                int((more > 0).sum()),
            )
        )
    return found


def difference(records: list[dict[str, Any]], task: str, k: int, a: str, b: str):
    """How much more a's removals raise the loss than b's, and its error over groups, paired."""
    own = [
        np.diagonal(np.array(x["losses"]), axis1=1, axis2=2).mean(0)
        for method in (a, b)
        for x in records
        if (x["task"], x["method"], x["k"]) == (task, method, k)
    ]
    paired = own[0] - own[1]
    return float(paired.mean()), standard_error(paired)


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5)


def write_report(data: dict[str, Any], page: Path, figures: Path) -> None:
    drawn = draw(data, figures / "retrain.svg")
    link = Path(os.path.relpath(drawn, page.parent)).as_posix()
    lines = [*head(data), "", f"![change of the query loss]({link})"]
    for task, about in data["settings"]["tasks"].items():
        found = changes(data["records"], task)
        groups = about["groups"]
        lines += ["", f"## {task}", "", "{about}.".format(**about)]
        lines += [
            "{n} training examples, {m} queries in {groups} groups; {epochs} epochs of AdamW in "
            "batches of {batch_size}, learning rate {lr}; r = {r} over all layers.".format(**about),
            "",
            *conclusions(data["records"], task, found, groups),
            "",
            *table(found, groups),
        ]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def head(data: dict[str, Any]) -> Iterator[str]:
    settings, machine = data["settings"], data["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    commits = ", ".join(dict.fromkeys(run["commit"][:12] for run in data["runs"]))
    quick = " (--quick: tiny sizes, which show only that it runs)" if settings["quick"] else ""
    yield f"# Training without the top examples{quick}"
    yield ""
    yield (
        f"{settings['threads']} thread of {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['system']}; {packages}; commit {commits}; {data['runs'][-1]['date'][:10]}."
    )
    yield ""
    yield (
        "For each group of queries a method ranks the training examples by the model of seed 0, "
        f"and models are trained anew without the highest k, with {settings['seeds']} seeds (of first "
        f"weights and order); at random is the mean of {settings['random']} sets of k. Change is "
        "that of the group's loss beside the model of the same seed on all examples; ± is the "
        "standard error over groups, of means over seeds. More than at random is paired by group. "
        "Each compression has one seed of its own. Influence is that of "
        f"`solvers.Cholesky(damping={settings['damping']})`; the dot product has no inverse."
    )


def conclusions(records, task: str, found: list[Change], groups: int) -> Iterator[str]:
    for k in dict.fromkeys(change.k for change in found):
        mine = [change for change in found if change.k == k and change.method != RANDOM]
        clear = [c.method for c in mine if c.more > NOISE * c.more_error]
        unclear = [c.method for c in mine if c.more <= NOISE * c.more_error]
        yield (
            f"- k = {k}: the loss goes up more than at random, by over {NOISE} standard errors, "
            f"without the top of: {', '.join(clear) or 'none'}."
            + (f" Not so: {', '.join(unclear)}." if unclear else "")
        )
        for a, b in (
            ("Dropout", DOT),
            ("Dropout", "Gaussian"),
            ("Dropout by energy", "Gaussian"),
            ("Dropout", BM25),
        ):
            if {a, b} <= {change.method for change in mine}:
                more, error = difference(records, task, k, a, b)
                if abs(more) <= NOISE * error:
                    word = "within noise of"
                else:
                    word = "above" if more > 0 else "below"
                yield f"- k = {k}: {a} is {word} {b}: {more:+.3f} ± {error:.3f}."


def table(found: list[Change], groups: int) -> Iterator[str]:
    heads = ("k", "left out", "change of the loss", "error over seeds", "more than at random")
    yield from rows_of((*heads, "groups above random"))
    for c in found:
        more = ("", "") if c.method == RANDOM else (f"{c.more:+.3f} ± {c.more_error:.3f}", "")
        up = "" if c.method == RANDOM else f"{c.groups_up} of {groups}"
        yield row(
            c.k, c.method, f"{c.change:+.3f} ± {c.error:.3f}", f"{c.seeds_error:.3f}", more[0], up
        )


def draw(data: dict[str, Any], path: Path) -> Path:
    """A panel for each task: how much more than at random, by method and k."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "retrain"  # the same figure is the same file
    tasks = list(data["settings"]["tasks"])
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(11, 3.8), layout="constrained")
    for panel, task in zip(panels, tasks, strict=True):
        found = [c for c in changes(data["records"], task) if c.method != RANDOM]
        names = list(dict.fromkeys(c.method for c in found))
        sizes = list(dict.fromkeys(c.k for c in found))
        for number, k in enumerate(sizes):
            mine = {c.method: c for c in found if c.k == k}
            shift = 0.16 * (number - (len(sizes) - 1) / 2)
            panel.errorbar(
                [mine[name].more for name in names],
                [names.index(name) + shift for name in names],
                xerr=[mine[name].more_error for name in names],
                label=f"k = {k}",
                color=f"C{number}",
                marker="o",
                linestyle="",
            )
        panel.axvline(0, color="grey", linestyle=":")
        panel.set_yticks(range(len(names)), names, fontsize=9)
        panel.invert_yaxis()
        panel.set_title(task, fontsize=10)
        panel.set_xlabel("rise of the query loss, more than at random", fontsize=9)
        panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
