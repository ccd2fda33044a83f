"""What compressions keep of influence where nothing is classified: a regression and a policy.

    python bench/experiments/beyond_classification.py [--quick] [--out FILE.json]

The measures are those of quality.py: rho to the scores of the whole gradient, LDS over models
trained on random halves, AUC of finding the spoiled examples. One task is a regression, the other
learns a policy from trajectories, of which the influence on the expected return is asked.

Every result goes to --out at once, so that the same command goes on where it was ended.
"""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pages
import quality_tasks
import torch
from command import files_of, parser_of
from pages import row, rows_of
from policy_task import policy_task
from quality import DAMPING, NAMES, Experiment, run
from quality_claims import MEASURES, Measured, difference
from quality_contestants import DOT, FULL
from quality_report import draw, mean_and_deviation
from quality_tasks import Task
from records import Key, Records

SETTINGS = {"totals": [64, 256, 1024], "seeds": 5, "threads": 1}
QUICK = {"totals": [64, 256], "seeds": 2, "threads": 1}
PACKAGES = ("scipy", "scikit-learn")
COMPRESSIONS = ["Dropout", "Dropout by energy", "Sketch", "LoGra", "Gaussian"]
HALVES = 60


def main(arguments: list[str] | None = None) -> None:
    given = parser_of(__doc__).parse_args(arguments)
    settings = {"quick": given.quick, "damping": DAMPING, **(QUICK if given.quick else SETTINGS)}
    torch.set_num_threads(settings["threads"])
    tasks = make_tasks()
    if given.quick:
        tasks = [task.tiny() for task in tasks]
    settings["datasets"] = {task.name: task.description() for task in tasks}
    files = files_of("beyond_classification", given)
    records = Records(files.json, settings, NAMES, PACKAGES)
    run([Untimed(task, COMPRESSIONS, records) for task in tasks], records)
    write_report(records.data, files.page, files.figures)
    print(files)


def make_tasks() -> list[Task]:
    patients = next(task for task in quality_tasks.small_tasks() if task.name == "diabetes")
    return [replace(patients, halves=HALVES), policy_task()]


class Untimed(Experiment):
    """The models are too small for their seconds to say anything."""

    def wanted(self) -> list[Key]:
        return [key for key in super().wanted() if key[0] != "time"]


def write_report(data: dict[str, Any], page: Path, figures: Path) -> None:
    measured = Measured(data)
    lines = list(head(data))
    for dataset in measured.datasets:
        about = data["settings"]["datasets"][dataset]
        drawn = draw(measured, dataset, figures / f"beyond-{dataset}.svg")
        link = pages.link(drawn, page)
        lines += ["", f"## {dataset}", "", "{about}.".format(**about)]
        lines += [
            "{n} training examples, {spoiled} of them spoiled; {m} queries; {epochs} epochs of "
            "AdamW in batches of {batch_size}, learning rate {lr}; {halves} halves.".format(
                **about
            ),
            "",
            f"![LDS, AUC and rho against r, {dataset}]({link})",
            "",
            *conclusions(measured, dataset),
            "",
            *table(measured, dataset),
        ]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def head(data: dict[str, Any]) -> Iterator[str]:
    settings = data["settings"]
    yield from pages.head("beyond_classification", "Beyond classification", data)
    yield (
        f"Mean ± standard deviation over {settings['seeds']} seeds of the compression; the model, "
        "the queries and the halves are the same for all. Measures and damping "
        f"({settings['damping']}) are those of quality.md."
    )


def conclusions(measured: Measured, dataset: str) -> Iterator[str]:
    """Dropout beside the others in LDS, and the whole gradient beside the dot product."""
    last = measured.totals[-1]
    for ours in COMPRESSIONS[:2]:
        said = []
        for other in COMPRESSIONS[2:]:
            cells = [
                difference(
                    measured.values(dataset, ours, r, "lds"),
                    measured.values(dataset, other, r, "lds"),
                )
                for r in measured.totals
            ]
            words = ", ".join(
                f"{cell.word} at {r}" for r, cell in zip(measured.totals, cells, strict=True)
            )
            said.append(f"{other}: {words}")
        yield f"- In LDS, {ours} is, beside {'; beside '.join(said)}."
    whole, dot = (reference(measured, dataset, name) for name in (FULL, DOT))
    for measure in ("lds", "auc"):
        kept = statistics.fmean(measured.values(dataset, "Dropout", last, measure))
        yield (
            f"- {MEASURES[measure]} of the whole gradient is {whole[measure]:.3f}, of the dot "
            f"product without an inverse {dot[measure]:.3f}, of Dropout with {last} of "
            f"{whole['r']:,} coordinates {kept:.3f}."
        )


def reference(measured: Measured, dataset: str, name: str) -> dict[str, Any]:
    return next(
        x
        for x in measured.records
        if (x["stage"], x["dataset"], x["compression"]) == ("score", dataset, name)
    )


def table(measured: Measured, dataset: str) -> Iterator[str]:
    yield from rows_of(("r", "compression", *MEASURES.values()))
    for name in (FULL, DOT):
        record = reference(measured, dataset, name)
        yield row(f"all {record['r']:,}", name, *(f"{record[measure]:.3f}" for measure in MEASURES))
    for r in measured.totals:
        for name in COMPRESSIONS:
            values = [measured.values(dataset, name, r, measure) for measure in MEASURES]
            yield row(r, name, *map(mean_and_deviation, values))


if __name__ == "__main__":
    main()
