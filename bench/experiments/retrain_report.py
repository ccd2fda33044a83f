"""The page and the figure of what retrain.py recorded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pages
import torch
from pages import new_figure, row, rows_of, save_figure
from quality_contestants import DOT

from dropinf.evaluate import Estimate, Removal, removal

ALL, RANDOM, BM25 = "none left out", "at random", "BM25"
NOISE = 2  # standard errors
COMPARED = (
    ("Dropout", DOT),
    ("Dropout", "Gaussian"),
    ("Dropout by energy", "Gaussian"),
    ("Dropout", BM25),
)


class Change(NamedTuple):
    """What training without a method's top k does, in the loss of each group."""

    method: str
    k: int
    removal: Removal


def changes(records: list[dict[str, Any]], task: str) -> list[Change]:
    """In the order in which they were recorded."""
    losses = {
        (x["method"], x["k"]): torch.tensor(x["losses"], dtype=torch.float64)  # [seeds, h, groups]
        for x in records
        if x["task"] == task
    }
    return [
        Change(method, k, removal(top, losses[RANDOM, k], losses[ALL, 0]))
        for (method, k), top in losses.items()
        if method not in (ALL, RANDOM)
    ]


def paired(a: Change, b: Change) -> tuple[float, float]:
    """How much more a's removals raise the loss than b's, and its standard error over groups."""
    more = a.removal.top.each - b.removal.top.each
    return float(more.mean()), float(more.std() / len(more) ** 0.5)


def write_report(data: dict[str, Any], page: Path, figures: Path) -> None:
    drawn = draw(data, figures / "retrain.svg")
    link = pages.link(drawn, page)
    lines = [*head(data), "", f"![change of the query loss]({link})"]
    for task, about in data["settings"]["tasks"].items():
        found = changes(data["records"], task)
        groups = about["groups"]
        lines += ["", f"## {task}", "", "{about}.".format(**about)]
        lines += [
            "{n} training examples, {m} queries in {groups} groups; {epochs} epochs of AdamW in "
            "batches of {batch_size}, learning rate {lr}; r = {r} over all layers; {seeds} seeds, "
            "{random} random sets.".format(**{**data["settings"], **about}),
            "",
            *conclusions(found),
            "",
            *table(found, groups),
        ]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def head(data: dict[str, Any]) -> Iterator[str]:
    settings = data["settings"]
    yield from pages.head("retrain", "Training without the top examples", data)
    yield (
        "For each group of queries a method ranks the training examples by the model of seed 0, "
        "and models are trained anew without the highest k, with several seeds (of first weights "
        "and order); at random is the mean of several sets of k. "
        "Change is that of the group's loss beside the model of the same seed on all examples; ± "
        "is the standard error over groups, of means over seeds. More than at random is paired by "
        "group. Each compression has one seed of its own. Influence is that of "
        f"`solvers.Cholesky(damping={settings['damping']})`; the dot product has no inverse."
    )


def conclusions(found: list[Change]) -> Iterator[str]:
    for k in dict.fromkeys(change.k for change in found):
        mine = {change.method: change for change in found if change.k == k}
        clear, unclear = [], []
        for name, change in mine.items():
            more = change.removal.difference
            (clear if more.value > NOISE * more.error else unclear).append(name)
        yield (
            f"- k = {k}: the loss goes up more than at random, by over {NOISE} standard errors, "
            f"without the top of: {', '.join(clear) or 'none'}."
            + (f" Not so: {', '.join(unclear)}." if unclear else "")
        )
        for a, b in COMPARED:
            if {a, b} <= mine.keys():
                more, error = paired(mine[a], mine[b])
                if abs(more) <= NOISE * error:
                    word = "within noise of"
                else:
                    word = "above" if more > 0 else "below"
                yield f"- k = {k}: {a} is {word} {b}: {more:+.3f} ± {error:.3f}."


def table(found: list[Change], groups: int) -> Iterator[str]:
    heads = ("k", "left out", "change of the loss", "error over seeds", "more than at random")
    yield from rows_of((*heads, "groups above random"))
    for k in dict.fromkeys(change.k for change in found):
        mine = [change for change in found if change.k == k]
        yield row(k, RANDOM, *changed(mine[0].removal.at_random), "", "")
        for change in mine:
            more = change.removal.difference
            up = f"{int((more.each > 0).sum())} of {groups}"
            figures = changed(change.removal.top)
            yield row(k, change.method, *figures, f"{more.value:+.3f} ± {more.error:.3f}", up)


def changed(estimate: Estimate) -> tuple[str, str]:
    return f"{estimate.value:+.3f} ± {estimate.error:.3f}", f"{estimate.runs_error:.3f}"


def draw(data: dict[str, Any], path: Path) -> Path:
    """A panel for each task: how much more than at random, by method and k."""
    tasks = list(data["settings"]["tasks"])
    figure, panels = new_figure("retrain", 1, len(tasks), figsize=(5.5 * len(tasks), 3.8))
    for panel, task in zip(panels, tasks, strict=True):
        found = changes(data["records"], task)
        names = list(dict.fromkeys(c.method for c in found))
        sizes = list(dict.fromkeys(c.k for c in found))
        for number, k in enumerate(sizes):
            mine = {c.method: c.removal.difference for c in found if c.k == k}
            shift = 0.16 * (number - (len(sizes) - 1) / 2)
            panel.errorbar(
                [mine[name].value for name in names],
                [names.index(name) + shift for name in names],
                xerr=[mine[name].error for name in names],
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
    return save_figure(figure, path)
