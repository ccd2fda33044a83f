"""Markdown tables, a figure and the sentences of what mislabeled.py recorded."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
from pages import new_figure, row, rows_of, save_figure

ANOTHER = "Dropout, another mask"  # whose ratio to Dropout is noise
STABLE = (
    0.02  # standard deviation of the AUC over masks, from which on another mask is another answer
)


class Found:
    """The records, by what they are of."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.settings, self.records = data["settings"], data["records"]
        self.tasks = [name for name in data["settings"]["tasks"] if any(self.of("auc", name))]

    def of(self, stage: str, task: str, **where: Any) -> Iterator[dict[str, Any]]:
        wanted = {"stage": stage, "task": task, **where}
        return (x for x in self.records if all(x[name] == v for name, v in wanted.items()))

    def aucs(self, task: str, method: str, r: int | None) -> list[float]:
        """One for each seed, by seed."""
        found = sorted(self.of("auc", task, method=method, r=r), key=lambda x: x["seed"])
        return [x["auc"] for x in found]

    def methods(self, task: str) -> list[tuple[str, int | None]]:
        return list(dict.fromkeys((x["method"], x["r"]) for x in self.of("auc", task)))

    def ratios(self, task: str, method: str) -> list[float]:
        """Seconds over Dropout's of the same round."""
        rounds = [x["seconds"] for x in self.of("seconds", task)]
        return [each[method] / each["Dropout"] for each in rounds]

    def small(self, method: str, r: int) -> list[dict[str, Any]]:
        wanted = ("small", method, r)
        return [x for x in self.records if (x["stage"], x["method"], x["r"]) == wanted]

    def smallest_stable(self, method: str) -> int | None:
        """The r from which on the AUC's deviation over masks stays within `STABLE`."""
        found = None
        for r in reversed(self.settings["small_r"]):
            records = self.small(method, r)
            if not records or statistics.fmean(deviations(records)) > STABLE:
                break
            found = r
        return found


def deviations(records: list[dict[str, Any]]) -> list[float]:
    """Over masks, of each model."""
    return [statistics.stdev(record["aucs"]) for record in records]


def write_report(data: dict[str, Any], page: Path, figures: Path) -> None:
    """The page, and its figure."""
    found = Found(data)
    lines = [*head(data)]
    for task in found.tasks:
        lines += ["", f"## {task}", "", *about(found, task), "", *table(found, task)]
        lines += ["", *conclusions(found, task)]
    drawn = draw(found, figures / "mislabeled.svg")
    link = pages.link(drawn, page)
    lines += ["", f"![AUC by method and r]({link})"]
    if any(x["stage"] == "small" for x in found.records):
        lines += ["", "## A few coordinates of each layer", "", *small_table(found)]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def head(data: dict[str, Any]) -> Iterator[str]:
    settings = data["settings"]
    yield from pages.head("mislabeled", "Which wrong labels are found", data)
    yield (
        "A fifth of the training labels is flipped. AUC of finding them: mean ± standard error "
        "over seeds, each with flips, a training and a mask of its own. Methods are minus the mean "
        "influence on clean queries, but for self-influence and the loss; r counts coordinates "
        f"over all layers. Every solve has damping {settings['damping']}, a matrix a layer; LiSSA "
        f"makes {settings['lissa_steps']} steps over all rows; energies are of "
        f"{settings['measured']} training examples."
    )
    yield ""
    yield (
        "Seconds: of the processor, on one thread, of the whole pipeline (energies, rows of "
        "training examples and queries, fit, scores) over those of Dropout at "
        f"r = {settings['timed_r']} in the same round: median (smallest to largest) of "
        f'{settings["rounds"]} rounds. The row "{ANOTHER}" shows how far ratios can be trusted.'
    )


def about(found: Found, task: str) -> Iterator[str]:
    facts = found.settings["tasks"][task]
    models = list(found.of("model", task))
    shares = {
        name: statistics.fmean(model[name] for model in models)
        for name in ("queries", "given", "wrong")
    }
    yield (
        f"{facts['about']}; {facts['n']} training examples, {facts['spoiled']} of them with a "
        f"wrong label; {facts['m']} queries. The model gets {shares['queries']:.1%} of the queries "
        f"right, and reproduces {shares['given']:.1%} of the labels it was given, "
        f"{shares['wrong']:.1%} of the wrong ones; {len(models)} seeds."
    )


def table(found: Found, task: str) -> Iterator[str]:
    yield from rows_of(("method", "r", "AUC", "seconds / Dropout's"))
    timed = found.settings["timed_r"]
    for method, r in found.methods(task):
        at = "all" if r is None else r
        ratios = found.ratios(task, method) if r in (None, timed) else []
        yield row(method, at, with_error(found.aucs(task, method, r)), spread(ratios))
    yield row(ANOTHER, timed, "", spread(found.ratios(task, ANOTHER)))


def conclusions(found: Found, task: str) -> Iterator[str]:
    """What comes first, and where Dropout stands, by means; differences seed by seed."""
    means = {key: statistics.fmean(found.aucs(task, *key)) for key in found.methods(task)}
    best = max(means, key=means.get)
    largest = max(found.settings["totals"])
    yield f"- Highest AUC: {named(best)}, {means[best]:.3f}; loss {means['loss', None]:.3f}."
    mine = found.aucs(task, "Dropout", largest)
    for other in (
        ("whole gradient", None),
        ("Gaussian", largest),
        ("Dropout by energy", largest),
        ("LiSSA", None),
        ("DataInf", None),
        ("dot product", None),
        ("loss", None),
        ("Dropout, self-influence", largest),
    ):
        yield f"- Dropout at r = {largest} minus {named(other)}: " + difference(
            mine, found.aucs(task, *other)
        )


def difference(a: list[float], b: list[float]) -> str:
    """Mean of a - b seed by seed with its standard error, and whether it is beyond two of these."""
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
    word = (
        "within two standard errors" if abs(mean) <= 2 * error else "above" if mean > 0 else "below"
    )
    return f"{mean:+.3f} ± {error:.3f}, {word}."


def small_table(found: Found) -> Iterator[str]:
    masks, models = found.settings["masks"], found.settings["seeds"]
    methods = list(dict.fromkeys(x["method"] for x in found.records if x["stage"] == "small"))
    yield (
        f"minilm-lora, r coordinates of each layer; a LoRA matrix has 1,536. {masks} masks of each "
        f"of {models} models: AUC, mean ± its standard deviation over masks (mean over models); in "
        "brackets the Spearman correlation of two masks' suspicions of all examples, and the share "
        "of the most suspicious, as many as there are wrong labels, that both have."
    )
    yield ""
    yield from rows_of(("r", *methods))
    for r in found.settings["small_r"]:
        cells = []
        for method in methods:
            records = found.small(method, r)
            auc = statistics.fmean(a for record in records for a in record["aucs"])
            numbers = (
                statistics.fmean(record[name] for record in records)
                for name in ("correlation", "overlap")
            )
            both = ", ".join(f"{number:.2f}" for number in numbers)
            cells.append(f"{auc:.3f} ± {statistics.fmean(deviations(records)):.3f} ({both})")
        yield row(r, *cells)
    yield ""
    for method in methods:
        smallest = found.smallest_stable(method)
        where = "at none of these r" if smallest is None else f"from r = {smallest} on"
        yield f"- {method}: another mask changes the AUC by at most {STABLE} (deviation) {where}."


def named(key: tuple[str, int | None]) -> str:
    return key[0] if key[1] is None else f"{key[0]} at r = {key[1]}"


def with_error(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def draw(found: Found, path: Path) -> Path:
    """AUC against r, a panel a task; methods of whole gradients and the loss as lines."""
    from matplotlib import colormaps

    figure, panels = new_figure(
        "mislabeled",
        1,
        len(found.tasks),
        figsize=(4.2 * len(found.tasks), 4.4),
        squeeze=False,
    )
    totals = found.settings["totals"]
    for panel, task in zip(panels[0], found.tasks, strict=True):
        compressed = list(dict.fromkeys(m for m, r in found.methods(task) if r is not None))
        for number, method in enumerate(compressed):
            values = [found.aucs(task, method, r) for r in totals]
            panel.errorbar(
                # Side by side, so that no error bar hides another.
                [r * 1.04 ** (number - (len(compressed) - 1) / 2) for r in totals],
                [statistics.fmean(v) for v in values],
                [statistics.stdev(v) / len(v) ** 0.5 for v in values],
                label=method,
                color=f"C{number}",
                marker="o",
                markersize=3,
                linewidth=1,
            )
        whole = [m for m, r in found.methods(task) if r is None]
        for number, method in enumerate(whole):
            panel.axhline(
                statistics.fmean(found.aucs(task, method, None)),
                label=f"{method}, no r",
                color=colormaps["Dark2"](number) if method != "loss" else "black",
                linestyle=":",
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(totals, [str(r) for r in totals])
        panel.minorticks_off()
        panel.set_xlabel("r over all layers")
        panel.set_title(f"AUC, {task}", fontsize=10)
    handles, labels = panels[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return save_figure(figure, path)
