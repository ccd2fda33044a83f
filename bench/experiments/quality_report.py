"""Markdown tables and SVG figures of what quality.py recorded."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
from pages import new_figure, row, rows_of, save_figure
from quality_claims import FEWER_BYTES, MEASURES, NOISE, Measured, claims, spread

REFERENCES = {"Full": "black", "gradient dot product": "grey"}


def write_report(data: dict[str, Any], page: Path, figures: Path) -> None:
    """The page, and a figure of each dataset."""
    measured = Measured(data)
    lines = [*head(data), *verdicts(measured)]
    for dataset in measured.datasets:
        drawn = draw(measured, dataset, figures / f"quality-{dataset}.svg")
        link = pages.link(drawn, page)
        about = data["settings"]["datasets"][dataset]
        lines += ["", f"## {dataset}", "", "{about}.".format(**about)]
        lines += [
            "{n} training examples, {spoiled} of them spoiled; {m} queries; {epochs} epochs of "
            "AdamW in batches of {batch_size}, learning rate {lr}; {halves} halves; times of "
            "{rounds} rounds.".format(**about),
            "",
        ]
        lines += [f"![LDS, AUC and rho against r, {dataset}]({link})", ""]
        lines += table(measured, dataset)
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def head(data: dict[str, Any]) -> Iterator[str]:
    """What was measured, on what, and what the columns mean."""
    settings = data["settings"]
    yield from pages.head("quality", "What compressions keep of influence", data)
    yield (
        f"Mean ± standard deviation over {settings['seeds']} seeds of the compression alone: the "
        "model, the queries and the halves are the same for all. `r` counts coordinates over all "
        f"layers. Scores are those of `solvers.Cholesky(damping={settings['damping']})`, a matrix "
        "for each layer; the gradient dot product has no inverse."
    )
    yield ""
    yield "- rho: Spearman correlation with the scores of the whole gradient, mean over queries."
    yield "- AUC: how well a low mean score finds the spoiled training examples."
    yield (
        "- LDS: linear datamodeling score (arXiv 2303.14186) over models retrained on random "
        "halves, as many as each task says."
    )
    yield (
        "- collect: milliseconds to collect the training rows; and over Dropout's time at the "
        "same r in the same round: median (smallest to largest) of the task's rounds. "
        "Dropout's own ratio is between two of its seeds; the whole gradient's is to Dropout at "
        "the largest r. Rows in fewer bytes are not timed."
    )
    yield (
        "- by energy: 64 training examples, the same for every seed, give the energies. "
        "In bfloat16, float16, int8: training rows and queries are kept so, with the coordinates "
        "that Dropout has at the same seed."
    )


def verdicts(measured: Measured) -> Iterator[str]:
    """Each claim with its cases."""
    yield ""
    yield "## What should come out"
    yield ""
    yield (
        f"A difference of means below {NOISE} of its standard errors, over seeds of the "
        "compression, is within noise; a larger one is above or below. Two equal compressions "
        "still differ by more in about one of twelve comparisons of 5 and 5 seeds. Of rows in "
        "fewer bytes, ± is the standard error of the differences at the same seed; noise is what "
        "it is for all others, so that within noise means a cost below what can be told of "
        "Dropout's own quality. A claim holds if every comparison comes out as it says."
    )
    for claim in claims(measured):
        yield ""
        yield f"### {claim.text}: {claim.verdict}"
        yield ""
        yield from rows_of(("dataset", "compared", *(f"r = {r}" for r in claim.totals), "holds"))
        for case in claim.cases:
            word = {True: "yes", False: "**no**", None: "not measured"}[claim.holds(case)]
            yield row(case.dataset, case.compared, *(cell.text for cell in case.cells), word)


def table(measured: Measured, dataset: str) -> Iterator[str]:
    """The measures of every compression at every r."""
    heads = ("r", "compression", *MEASURES.values(), "collect, ms", "/ Dropout's")
    yield from rows_of(heads)
    records = [x for x in measured.records if (x["stage"], x["dataset"]) == ("score", dataset)]
    for record in records:
        if record["compression"] in REFERENCES:
            times = measured.times(dataset, record["compression"], max(measured.totals))
            figures = (f"{record[measure]:.3f}" for measure in MEASURES)
            yield row(f"all {record['r']:,}", record["compression"], *figures, *timed(times))
    for r in measured.totals:
        for compression in compressions(measured, dataset):
            values = [measured.values(dataset, compression, r, m) for m in MEASURES]
            times = measured.times(dataset, compression, r)
            yield row(r, compression, *map(mean_and_deviation, values), *timed(times))


def compressions(measured: Measured, dataset: str) -> list[str]:
    """Those that have scores, in the order in which they were made."""
    names = [
        x["compression"]
        for x in measured.records
        if (x["stage"], x["dataset"]) == ("score", dataset) and x["compression"] not in REFERENCES
    ]
    return list(dict.fromkeys(names))


def timed(times: dict[str, list[float]] | None) -> tuple[str, str]:
    return ("", "") if times is None else (spread(times["ms"]), spread(times["ratio"]))


def mean_and_deviation(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def draw(measured: Measured, dataset: str, path: Path) -> Path:
    """Three panels: LDS, AUC and rho against r, with the whole gradient as a line.

    Without rows in fewer bytes, whose points lie on Dropout's.
    """
    figure, panels = new_figure(dataset, 1, 3, figsize=(13, 4.6))
    names = [name for name in compressions(measured, dataset) if name not in FEWER_BYTES]
    for panel, measure in zip(panels, ("lds", "auc", "rho"), strict=True):
        for number, name in enumerate(names):
            values = [measured.values(dataset, name, r, measure) for r in measured.totals]
            # Side by side, so that no error bar hides another.
            r = [r * 1.03 ** (number - (len(names) - 1) / 2) for r in measured.totals]
            panel.errorbar(
                r,
                [statistics.fmean(v) for v in values],
                [statistics.stdev(v) for v in values],
                label=name,
                color=f"C{number}",
                marker="o",
                markersize=3,
                linewidth=1,
            )
        for record in measured.records:
            of = record["compression"]
            if of in REFERENCES and (record["stage"], record["dataset"]) == ("score", dataset):
                panel.axhline(record[measure], color=REFERENCES[of], linestyle=":", label=of)
        panel.set_xscale("log", base=2)
        panel.set_xticks(measured.totals, [str(r) for r in measured.totals])
        panel.minorticks_off()
        panel.set_xlabel("r over all layers")
        panel.set_title(f"{MEASURES[measure]}, {dataset}", fontsize=10)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    return save_figure(figure, path)
