"""Commands on the rows of a run: fit, score, topk, self."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

import dropinf
from dropinf.cli.app import command
from dropinf.cli.matrix_file import Matrix, ending_of, write_table
from dropinf.cli.row_options import FitOptions, ScoreOptions, SelfOptions, takes_options
from dropinf.cli.run_directory import can_be_saved, need_queries
from dropinf.cli.terminal import Terminal
from dropinf.results import Attribution
from dropinf.rows import RowStore
from dropinf.text_table import Table

K = Annotated[int, typer.Option("--k", "-k", min=1, help="Examples at each end.")]


@command("dropinf fit dropinf-run --damping 0.1")
@takes_options
def fit(terminal: Terminal, of: FitOptions) -> None:
    """Fit a solver on the training rows, and save it for score, topk, self and report."""
    run, made = of.run, of.new_solver()
    if not can_be_saved(made):
        raise ValueError(
            f"{type(made).__name__} cannot be saved; score, topk and self fit it themselves, with "
            "the same options"
        )
    if run.solver.exists():
        raise FileExistsError(f"{run.solver} exists; remove it, or name another with --solver")
    store = run.training_rows()
    with terminal.passes("fit"):
        made.fit(store)
    made.save(run.solver)
    facts = {"path": str(run.solver), "solver": repr(made), "rows": len(store)}
    terminal.show(facts, f"{run.solver}: {made}")


@command("dropinf score dropinf-run --to scores.parquet")
@takes_options
def score(
    terminal: Terminal,
    of: ScoreOptions,
    to: Annotated[
        Path, typer.Option(help="File to write: .csv, .parquet, .arrow, or .npy without the ids.")
    ],
) -> None:
    """Write the score of every training example for every query, a row for each query.

    A score is per example, of the summed loss, not divided by n: one removal changes the query's
    loss by about score / n. Positive: more of the example lowers it.
    """
    ending_of(to)
    run = of.run
    asked, store = need_queries(run), run.training_rows()
    used = of.fitted(terminal, store)
    with terminal.passes("score"):
        found = dropinf.scores(asked, store, used, relative=of.relative, weights=of.weights.value)
    columns = Matrix.of("scores", store.ids, [""], found[:0]).ids
    Matrix.of("scores", asked.ids, columns, found).write(to)
    facts = {"path": str(to), "queries": len(asked), "examples": len(store)}
    terminal.show(facts, f"{to}: {len(asked):,} queries, {len(store):,} training examples")


@command("dropinf topk dropinf-run --k 5 --to influence.csv")
@takes_options
def topk(
    terminal: Terminal,
    of: ScoreOptions,
    k: K = 10,
    to: Annotated[
        Path | None, typer.Option(help="Also write a file: .csv, .parquet, .arrow or .html.")
    ] = None,
) -> None:
    """The training examples that lower each query's loss most, and those that raise it."""
    ending = None if to is None else ending_of(to, (".csv", ".parquet", ".arrow", ".html"))
    run = of.run
    asked, store = need_queries(run), run.training_rows()
    used = of.fitted(terminal, store)
    with terminal.passes("topk"):
        found = dropinf.attribute(
            asked, store, used, k, relative=of.relative, weights=of.weights.value
        )
    if ending == ".csv":
        found.to_csv(to)
    elif ending == ".html":
        found.to_html(to)
    elif to is not None:
        write_table(found.to_arrow(), to)
    terminal.show(_facts_of(found), found)


@command("dropinf self dropinf-run --k 20", name="self")
@takes_options
def self_influence(
    terminal: Terminal,
    of: SelfOptions,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Examples to show.")] = 20,
    to: Annotated[
        Path | None,
        typer.Option(help="Also write all to a file: .csv, .parquet, .arrow, .npy."),
    ] = None,
) -> None:
    """The training examples of largest self-influence: memorised, mislabelled, rare."""
    if to is not None:
        ending_of(to)
    store = of.run.training_rows()
    used = of.fitted(terminal, store)
    with terminal.passes("self"):
        own = dropinf.self_influence(store, used, weights=of.weights.value)
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
