"""Markdown and the figure of what spectrum.py recorded."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pages
from pages import mean_error, new_figure, row, rows_of, save_figure

CRITERIA = ("noise", "likelihood", "likelihood of rows left out", "agreement", "always 0.1")


class Cell(NamedTuple):
    """One task at one r."""

    task: str
    r: int
    lds: dict[float, list[float]]  # of each damping, over masks
    overlap: dict[float, float]  # of each damping
    picks: dict[str, list[float]]  # of each criterion, one a mask or one for all

    @property
    def best(self) -> float:
        """The damping of the largest mean LDS."""
        return max(self.lds, key=lambda d: statistics.fmean(self.lds[d]))

    def lost(self, criterion: str) -> list[float]:
        """LDS below that of the best damping, over masks."""
        picks = self.picks[criterion]
        best = self.lds[self.best]
        if len(picks) == 1:
            picks = picks * len(best)
        return [b - self.lds[d][mask] for mask, (b, d) in enumerate(zip(best, picks, strict=True))]


def name_with(task: str, n: int) -> str:
    """Of the task with its first n training examples."""
    return f"{task}, n = {n}"


def names_with_fewer(settings: dict[str, Any]) -> list[str]:
    return [name_with(task, n) for task, several in settings["fewer"].items() for n in several]


def measured(data: dict[str, Any]) -> list[str]:
    """Tasks that are done."""
    last = data["settings"]["totals"][-1]
    done = {x["task"] for x in data["records"] if x["stage"] == "choice" and x["r"] == last}
    return [task for task in data["settings"]["tasks"] if task in done]


def cells_of(data: dict[str, Any]) -> list[Cell]:
    found = []
    for task in measured(data):
        for r in data["settings"]["totals"]:
            mine = [x for x in data["records"] if (x["task"], x["r"]) == (task, r)]
            lds = {x["at"]: x["lds"] for x in mine if x["stage"] == "damping"}
            picks = {x["at"]: x["dampings"] for x in mine if x["stage"] == "choice"}
            overlap = {x["at"]: x["overlap"][0] for x in mine if x["stage"] == "damping"}
            found.append(Cell(task, r, lds, overlap, {**picks, "always 0.1": [0.1]}))
    return found


def write_report(data: dict[str, Any], page: Path, figures: Path) -> None:
    everywhere = cells_of(data)
    fewer = names_with_fewer(data["settings"])
    cells = [cell for cell in everywhere if cell.task not in fewer]
    drawn = draw(data, cells, figures / "spectrum.svg")
    link = pages.link(drawn, page)
    settings = data["settings"]
    lines = [
        *pages.head("spectrum", "Damping, condition number and stability", data),
        "Dropout (uniform), r over all layers, relative damping: λ_l = damping x trace(F_l) / r_l. "
        f"{settings['seeds']} masks. LDS: mean ± standard error over masks; of the models "
        "retrained on halves. Overlap: the share of the "
        f"{settings['k']} best examples of a query that two masks have in common, and rank "
        "correlation over all examples, ± standard error over queries. Condition: of F_l + λ_l, "
        "the geometric mean over entries. `noise` is the default of `choose_damping`: λ_l nearest "
        "to trace(F_l) / n.",
        "",
        f"![LDS, overlap and condition against damping]({link})",
        "",
        "## What each criterion picks",
        "",
        *picked(cells),
        "",
        *conclusions(cells),
    ]
    lines += ["", "## With fewer training examples", "", *with_n(data["settings"], everywhere)]
    for task in measured(data):
        lines += ["", f"## {task}", "", *table(data, task)]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def picked(cells: list[Cell]) -> Iterator[str]:
    """The damping, in the median over masks, and the LDS it has."""
    yield from rows_of(("task", "r", "best damping of the grid", *CRITERIA))
    for cell in cells:
        best = cell.lds[cell.best]
        found = []
        for criterion in CRITERIA:
            value = statistics.fmean(best) - statistics.fmean(cell.lost(criterion))
            found.append(f"{statistics.median_low(cell.picks[criterion]):g}: {value:.3f}")
        yield row(cell.task, cell.r, f"{cell.best:g}: {mean_error(best)}", *found)


def conclusions(cells: list[Cell]) -> Iterator[str]:
    """Sentences with their numbers."""
    yield "LDS below that of the best damping, which needs the retrained models to be known:"
    yield ""
    yield from rows_of(("criterion", "mean over tasks and r", "largest", "where"))
    for criterion in CRITERIA:
        lost = [statistics.fmean(cell.lost(criterion)) for cell in cells]
        worst = max(range(len(cells)), key=lost.__getitem__)
        yield row(
            criterion,
            mean_error(lost),
            mean_error(cells[worst].lost(criterion)),
            f"{cells[worst].task}, r = {cells[worst].r}",
        )
    inside = [min(c.lds) < c.best < max(c.lds) for c in cells]
    yield ""
    yield (
        f"The best damping is inside of the grid in {sum(inside)} of {len(cells)} cases. By "
        "growing r it is, "
        + "; ".join(f"{task}: {found}" for task, found in growth(cells).items())
        + ". Overlap at the largest damping is above overlap at the best one in "
        f"{sum(c.overlap[max(c.lds)] > c.overlap[c.best] for c in cells)} of {len(cells)} cases, "
        "with a condition number near 1: a small condition number and masks that agree do not "
        "mean that scores are right."
    )


def growth(cells: list[Cell]) -> dict[str, str]:
    """Task -> its best dampings, r by r."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        found.setdefault(cell.task, []).append(f"{cell.best:g}")
    return {task: ", ".join(best) for task, best in found.items()}


def with_n(settings: dict[str, Any], cells: list[Cell]) -> Iterator[str]:
    """How the best damping goes with n, of the tasks that come with several."""
    yield "The first n training examples of a task, the same queries, halves of these n."
    yield ""
    yield from rows_of(("task", "n", "r", "best damping of the grid", "noise", "always 0.1"))
    for task, several in settings["fewer"].items():
        names = {name_with(task, n): n for n in several} | {task: settings["tasks"][task]["n"]}
        for cell in (cell for name in names for cell in cells if cell.task == name):
            best = statistics.fmean(cell.lds[cell.best])
            noise, always = (best - statistics.fmean(cell.lost(c)) for c in ("noise", "always 0.1"))
            yield row(
                task,
                names[cell.task],
                cell.r,
                f"{cell.best:g}: {mean_error(cell.lds[cell.best])}",
                f"{statistics.median_low(cell.picks['noise']):g}: {noise:.3f}",
                f"{always:.3f}",
            )


def table(data: dict[str, Any], task: str) -> Iterator[str]:
    yield from rows_of(("r", "damping", "condition", "overlap", "rank correlation", "LDS"))
    for x in data["records"]:
        if (x["stage"], x["task"]) == ("damping", task):
            pairs = (
                f"{value:.3f} ± {error:.3f}" for value, error in (x["overlap"], x["correlation"])
            )
            condition = f"{statistics.median(x['condition']):.3g}"
            yield row(x["r"], f"{x['at']:g}", condition, *pairs, mean_error(x["lds"]))


def draw(data: dict[str, Any], cells: list[Cell], path: Path) -> Path:
    settings = data["settings"]
    totals = settings["totals"]
    tasks = [task for task in measured(data) if task not in names_with_fewer(settings)]
    figure, grid = new_figure("spectrum",
        3, len(tasks), figsize=(3.2 * len(tasks), 8), sharex=True,
        squeeze=False,
    )  # fmt: skip
    for column, task in enumerate(tasks):
        for number, r in enumerate(totals):
            mine = [
                x
                for x in data["records"]
                if (x["stage"], x["task"], x["r"]) == ("damping", task, r)
            ]
            at, style = [x["at"] for x in mine], {"color": f"C{number}", "label": f"r = {r}"}
            lds = [statistics.fmean(x["lds"]) for x in mine]
            grid[0, column].plot(at, lds, **style)
            (cell,) = (c for c in cells if (c.task, c.r) == (task, r))
            noise = statistics.median_low(cell.picks["noise"])
            grid[0, column].plot(noise, lds[at.index(noise)], "o", color=f"C{number}")
            grid[1, column].plot(at, [x["overlap"][0] for x in mine], **style)
            grid[2, column].plot(at, [statistics.median(x["condition"]) for x in mine], **style)
        grid[0, column].set_title(task, fontsize=10)
        grid[1, column].set_ylim(0, 1)
        grid[2, column].set_yscale("log")
        grid[2, column].set_xscale("log")
        grid[2, column].set_xlabel("relative damping")
    labels = ("LDS (dot: by noise)", "overlap of two masks", "condition of F + λ")
    for panel, label in zip(grid[:, 0], labels, strict=True):
        panel.set_ylabel(label)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return save_figure(figure, path)
