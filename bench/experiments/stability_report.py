"""Markdown and the figure of what stability.py recorded."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
from pages import new_figure, row, rows_of, save_figure

DRAWS = ("uniform", "by energy")
NOISE = 2.0  # standard errors of a difference


def write_report(data: dict[str, Any], page: Path, figures: Path) -> None:
    settings = data["settings"]
    drawn = draw(data, figures / "stability.svg")
    link = pages.link(drawn, page)
    lines = [
        *pages.head("stability", "Stability: how alike two masks are", data),
        f"Dropout with r coordinates of each layer (R in all), {settings['masks']} masks"
        f"{fewer(settings['fewer masks'])}, "
        f"`solvers.Cholesky(damping={settings['damping']})`. Overlap: the share of the "
        f"{settings['k']} best examples of a query that two masks have in common; rank "
        "correlation: Spearman's, over all training examples; both ± standard error over queries. "
        "AUC: of finding the spoiled examples by a low mean score, mean ± standard deviation over "
        "masks. Layers that have no more than r parameters are kept whole.",
        "",
        f"![Overlap and rank correlation against r]({link})",
        "",
        f"## The smallest r at which the top {settings['k']} overlap by {settings['level']}",
        "",
        *stable_table(data),
        "",
        *conclusions(data),
    ]
    for name, about in measured(data).items():
        lines += ["", f"## {name}", "", f"{about['about']}. {about['n']} training examples.", ""]
        lines += table(data, name)
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measured(data: dict[str, Any]) -> dict[str, Any]:
    """Models that are done, and what they are."""
    models, last = data["settings"]["models"], data["settings"]["r"][-1]
    there = {(x["model"], x["draw"], x["r"]) for x in data["records"]}
    return {
        name: about
        for name, about in models.items()
        if all((name, drawn, last) in there for drawn in DRAWS)
    }


def fewer(masks: dict[str, int]) -> str:
    return "".join(f" ({number} of {name})" for name, number in masks.items())


def of(data: dict[str, Any], model: str, drawn: str) -> list[dict[str, Any]]:
    """Records in growing r."""
    mine = [x for x in data["records"] if (x["model"], x["draw"]) == (model, drawn)]
    return sorted(mine, key=lambda x: x["r"])


def smallest(records: list[dict[str, Any]], level: float) -> dict[str, Any] | None:
    """The one of the smallest r from which on all overlap by `level`; a whole gradient does."""
    found = None
    for record in reversed(records):
        if not record["whole"] and record["overlap"][0] < level:
            break
        found = record
    return found


def stable_table(data: dict[str, Any]) -> Iterator[str]:
    yield from rows_of(
        ("model", "parameters", "layers", *(f"{d}: r a layer (R, share kept)" for d in DRAWS))
    )
    for name in measured(data):
        cells = []
        for drawn in DRAWS:
            records = of(data, name, drawn)
            found = smallest(records, data["settings"]["level"])
            if found is None:
                cells.append(f"above {records[-1]['r']}")
            elif found["whole"]:
                cells.append("the whole gradient alone")
            else:
                share = found["R"] / found["parameters"]
                cells.append(f"{found['r']} ({found['R']:,}, {share:.0%})")
        about = of(data, name, "uniform")[0]
        yield row(name, f"{about['parameters']:,}", about["layers"], *cells)


def conclusions(data: dict[str, Any]) -> Iterator[str]:
    """Sentences with their numbers."""
    settings = data["settings"]
    least = settings["r"][0]
    yield (
        f"At r = {least} a layer, uniform: "
        + "; ".join(
            f"{name} overlap {x['overlap'][0]:.2f} (chance {settings['k'] / about['n']:.3f}), "
            f"rank correlation {x['correlation'][0]:.2f}, AUC {spread(x['auc'])}"
            for name, about in measured(data).items()
            for x in of(data, name, "uniform")[:1]
        )
        + "."
    )
    better = worse = total = 0
    for name in measured(data):
        for uniform, energy in zip(*(of(data, name, drawn) for drawn in DRAWS), strict=True):
            if uniform["whole"]:
                continue
            (a, a_error), (b, b_error) = uniform["overlap"], energy["overlap"]
            far = abs(b - a) > NOISE * (a_error**2 + b_error**2) ** 0.5
            better, worse, total = better + (far and b > a), worse + (far and b < a), total + 1
    yield ""
    yield (
        f"By energy the overlap is above uniform's by more than {NOISE:g} standard errors in "
        f"{better} of {total} pairs of a model and an r, and below it in {worse}."
    )


def table(data: dict[str, Any], name: str) -> Iterator[str]:
    columns = ("overlap", "rank correlation", "AUC")
    yield from rows_of(("r", "R", *(f"{drawn}: {c}" for drawn in DRAWS for c in columns)))
    for both in zip(*(of(data, name, drawn) for drawn in DRAWS), strict=True):
        cells = []
        for x in both:
            if x["whole"]:
                cells += ["all kept", "", ""]
                continue
            pairs = (x["overlap"], x["correlation"])
            cells += [f"{value:.3f} ± {error:.3f}" for value, error in pairs]
            cells.append(spread(x["auc"]))
        yield row(both[0]["r"], f"{both[0]['R']:,}", *cells)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def draw(data: dict[str, Any], path: Path) -> Path:
    figure, panels = new_figure("stability", 1, 2, figsize=(10, 4.6))
    for number, name in enumerate(measured(data)):
        for drawn, line in zip(DRAWS, ("-", "--"), strict=True):
            mine = [x for x in of(data, name, drawn) if not x["whole"]]
            for panel, measure in zip(panels, ("overlap", "correlation"), strict=True):
                panel.errorbar(
                    [x["r"] for x in mine],
                    [x[measure][0] for x in mine],
                    [x[measure][1] for x in mine],
                    color=f"C{number}",
                    linestyle=line,
                    marker="o",
                    markersize=3,
                    linewidth=1,
                    label=name if line == "-" else f"{name}, by energy",
                )
    sizes = data["settings"]["r"]
    titles = (f"overlap of the top {data['settings']['k']}", "rank correlation")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, map(str, sizes))
        panel.minorticks_off()
        panel.set_ylim(0, 1)
        panel.set_xlabel("r of each layer")
        panel.set_title(f"{title} of two masks", fontsize=10)
    panels[0].axhline(data["settings"]["level"], color="grey", linestyle=":")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return save_figure(figure, path)
