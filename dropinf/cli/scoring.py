"""Commands on the rows of a run: fit, score, topk, self."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

import dropinf
from dropinf.cli.app import command
from dropinf.cli.matrix_file import Matrix, ending_of, write_table
from dropinf.cli.run_directory import (
    Damping,
    Kind,
    MaxBytes,
    QueriesPath,
    Run,
    RunPath,
    SolverPath,
    TrainPath,
    can_be_saved,
    fitted,
    need_queries,
    new_solver,
)
from dropinf.cli.terminal import Terminal
from dropinf.results import Attribution
from dropinf.rows import RowStore
from dropinf.text_table import Table

OUT = Path("dropinf-run")
K = Annotated[int, typer.Option("--k", "-k", min=1, help="Examples at each end.")]
Relative = Annotated[
    bool,
    typer.Option(
        "--relative", help="Divide by the root of each training example's self-influence."
    ),
]


class Weights(str, Enum):
    """Whether rows of other weights are taken."""

    same = "same"
    any = "any"


AnyWeights = Annotated[
    Weights, typer.Option(help="Whether rows may be of other weights than each other.")
]


@command("dropinf fit dropinf-run --damping 0.1")
def fit(
    terminal: Terminal,
    path: RunPath = OUT,
    train: TrainPath = None,
    solver: SolverPath = None,
    kind: Kind = None,
    damping: Damping = None,
    max_bytes: MaxBytes = None,
) -> None:
    """Fit a solver on the training rows, and save it for score, topk, self and report."""
    run = Run.of(path, train, solver=solver)
    made = new_solver(kind, damping, max_bytes, run.job)
    if not can_be_saved(made):
        raise ValueError(
            f"{type(made).__name__} cannot be saved; score, topk and self fit it themselves, with "
            "the same options"
        )
    if run.solver.exists():
        raise FileExistsError(f"{run.solver} exists; remove it, or name another with --solver")
    store = run.training_rows()
    made.fit(store).save(run.solver)
    facts = {"path": str(run.solver), "solver": repr(made), "rows": len(store)}
    terminal.show(facts, f"{run.solver}: {made}")


@command("dropinf score dropinf-run --to scores.parquet")
def score(
    terminal: Terminal,
    to: Annotated[
        Path, typer.Option(help="File to write: .csv, .parquet, .arrow, or .npy without the ids.")
    ],
    path: RunPath = OUT,
    train: TrainPath = None,
    queries: QueriesPath = None,
    solver: SolverPath = None,
    kind: Kind = None,
    damping: Damping = None,
    max_bytes: MaxBytes = None,
    relative: Relative = False,
    weights: AnyWeights = Weights.same,
) -> None:
    """Write the score of every training example for every query, a row for each query.

    A score is per example, of the summed loss, not divided by n: one removal changes the query's
    loss by about score / n. Positive: more of the example lowers it.
    """
    ending_of(to)
    run = Run.of(path, train, queries, solver)
    asked, store = need_queries(run), run.training_rows()
    used = fitted(terminal, run, store, kind, damping, max_bytes)
    found = dropinf.scores(asked, store, used, relative=relative, weights=weights.value)
    columns = Matrix.of("scores", store.ids, [""], found[:0]).ids
    Matrix.of("scores", asked.ids, columns, found).write(to)
    facts = {"path": str(to), "queries": len(asked), "examples": len(store)}
    terminal.show(facts, f"{to}: {len(asked):,} queries, {len(store):,} training examples")


@command("dropinf topk dropinf-run --k 5 --to influence.csv")
def topk(
    terminal: Terminal,
    path: RunPath = OUT,
    k: K = 10,
    to: Annotated[
        Path | None, typer.Option(help="Also write a file: .csv, .parquet, .arrow or .html.")
    ] = None,
    train: TrainPath = None,
    queries: QueriesPath = None,
    solver: SolverPath = None,
    kind: Kind = None,
    damping: Damping = None,
    max_bytes: MaxBytes = None,
    relative: Relative = False,
    weights: AnyWeights = Weights.same,
) -> None:
    """The training examples that lower each query's loss most, and those that raise it."""
    ending = None if to is None else ending_of(to, (".csv", ".parquet", ".arrow", ".html"))
    run = Run.of(path, train, queries, solver)
    asked, store = need_queries(run), run.training_rows()
    used = fitted(terminal, run, store, kind, damping, max_bytes)
    found = dropinf.attribute(asked, store, used, k, relative=relative, weights=weights.value)
    if ending == ".csv":
        found.to_csv(to)
    elif ending == ".html":
        found.to_html(to)
    elif to is not None:
        write_table(found.to_arrow(), to)
    terminal.show(_facts_of(found), found)


@command("dropinf self dropinf-run --k 20", name="self")
def self_influence(
    terminal: Terminal,
    path: RunPath = OUT,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Examples to show.")] = 20,
    to: Annotated[
        Path | None,
        typer.Option(help="Also write all to a file: .csv, .parquet, .arrow, .npy."),
    ] = None,
    train: TrainPath = None,
    solver: SolverPath = None,
    kind: Kind = None,
    damping: Damping = None,
    max_bytes: MaxBytes = None,
    weights: AnyWeights = Weights.same,
) -> None:
    """The training examples of largest self-influence: memorised, mislabelled, rare."""
    if to is not None:
        ending_of(to)
    run = Run.of(path, train, solver=solver)
    store = run.training_rows()
    used = fitted(terminal, run, store, kind, damping, max_bytes)
    own = dropinf.self_influence(store, used, weights=weights.value)
    matrix = Matrix.of("self_influence", store.ids, ["self_influence"], own[:, None])
    if to is not None:
        matrix.write(to)
    order = most_suspicious(store, own, k)
    shown = [{"example": matrix.ids[i], "self_influence": float(own[i])} for i in order]
    rows = [(str(one["example"]), f"{one['self_influence']:.4g}") for one in shown]
    facts = {"largest": shown, "examples": len(store), "solver": repr(used)}
    terminal.show(facts, Table(("example", "self-influence"), rows, right=(1,)))


def most_suspicious(store: RowStore, own: Any, k: int) -> list[int]:
    """Positions of the k largest self-influences, of valid rows."""
    order = own.nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
    return order[: min(k, int(store.valid.sum()))].tolist()


def _facts_of(found: Attribution) -> dict[str, Any]:
    queries = []
    for q, query in enumerate(found.query_ids):
        ends = {}
        for side, ranked in (("top", found.top), ("bottom", found.bottom)):
            pairs = zip(ranked.ids[q], ranked.scores[q].tolist(), strict=True)
            ends[side] = [{"example": id_, "score": score} for id_, score in pairs]
        queries.append({"query": query, **ends})
    return {"queries": queries, "facts": dataclasses.asdict(found.facts)}
