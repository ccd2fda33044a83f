"""The report of a run: what is missing is fitted and scored, and goes on one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import dropinf
from dropinf.cli.app import command
from dropinf.cli.job_options import takes_job
from dropinf.cli.masks import stability_of
from dropinf.cli.matrix_file import refuse_no_file
from dropinf.cli.run_directory import Run, can_be_saved, load_solver, refuse_another_job
from dropinf.cli.scoring import K, most_suspicious
from dropinf.cli.terminal import Terminal
from dropinf.cli.token_shares import shares_of_tokens
from dropinf.evaluate import mislabeled_auc
from dropinf.extras import optional
from dropinf.jobs import Examples, Job, Ready, prepare
from dropinf.rows import RowStore, listed
from dropinf.solvers import Cholesky, DampingChoice, Eigen, Solver

_MOST_SCORES = 1 << 24  # of all layers, held at once for the page's charts
_QUERIES = 20  # where the job names none


@command("dropinf report job.toml, or dropinf report dropinf-run --k 5")
@takes_job
def report(
    terminal: Terminal,
    job: Job,
    to: Annotated[
        Path | None, typer.Option(help="File to write, if not report.html in the run's directory.")
    ] = None,
    k: K = 10,
    dampings: Annotated[
        str, typer.Option(metavar="LIST", help="Also say what these are worth: 0.01,0.1,1.")
    ] = "",
    stability: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Also collect anew at these r under three seeds each, and say where they agree: "
            "256,1024.",
        ),
    ] = "",
) -> None:
    """Write what a run says as one HTML file, fitting and scoring what is not there yet.

    Without queries, the training examples of largest self-influence are asked about. --dampings go
    by the AUC where --truth names what is known to be wrong, and else by what so many rows can tell
    of the matrix that is damped.
    """
    optional("jinja2", "report", "the report")
    tried = _numbers("--dampings", dampings), _numbers("--stability", stability)
    run = Run.of_job(job)
    to = to or run.path / "report.html"
    store, asked = run.training_rows(), run.query_rows()
    refuse_no_file(to)
    way_out = f"dropinf report {run.path} is of what was collected"
    refuse_another_job(run, job, way_out, free=("batch_tokens", "batch_size"))
    ready = prepare(job)  # what is wrong there is found first
    contents = _contents(ready, asked is not None)
    solver = _solver_of(terminal, run, job, store)
    with terminal.passes("self"):
        own = dropinf.self_influence(store, solver)
    title = "What taught the model"
    if asked is None:
        ready.queries = None
        asked = store[[listed(store.ids)[i] for i in most_suspicious(store, own, _QUERIES)]]
        title = "What the examples of largest self-influence were learnt with"
        terminal.note(
            f"there are no queries; the {len(asked)} training examples of largest self-influence "
            "are asked about"
        )
    terminal.note(f"scoring {len(store):,} training examples for {len(asked):,} queries")
    with terminal.passes("topk"):
        found = dropinf.attribute(asked, store, solver, k)
    truth = None
    if ready.truth is not None:
        truth = [ready.truth[ready.train.position(id_)] for id_ in listed(store.ids)]
    sweep = _sweep(tried[0], (asked, store, solver), truth) if tried[0] else None
    dropinf.write_report(
        to,
        found,
        **contents,
        tokens=shares_of_tokens(terminal, ready, found, asked, solver),
        **_all_scores(asked, store, solver),
        self_influence=own,
        ids=store.ids,
        truth=truth,
        sweep=sweep,
        stability=stability_of(terminal, job, ready, tried[1], 3, k) if tried[1] else None,
        title=title,
    )
    facts: dict[str, Any] = {"path": str(to), "queries": len(asked), "examples": len(store)}
    said = f"{to}: {len(asked):,} queries, {len(store):,} training examples"
    if sweep is not None:
        said += f"; of the dampings, {sweep.damping:g} is worth most"
        worth = dict(zip(map(str, tried[0]), sweep.values.tolist(), strict=True))
        facts |= {"dampings": worth, "chosen damping": sweep.damping}
    terminal.show(facts, said)


def _numbers(option: str, given: str) -> list[float]:
    """Of a list with commas.

    Raises:
        ValueError: one is no positive number.
    """
    found = []
    for one in filter(None, given.split(",")):
        try:
            number = float(one)
        except ValueError:
            number = -1.0
        if not 0 < number < float("inf"):
            raise ValueError(f"{option} must be positive numbers with commas, got {given!r}")
        found.append(number)
    return found


def _sweep(
    dampings: Sequence[float], part: tuple[RowStore, RowStore, Solver], truth: list[bool] | None
) -> DampingChoice:
    """The choice of one; with `truth`, [n] in the store's order, by the AUC of a low mean score.

    Raises:
        ValueError: the solver takes no other damping, or there are too many scores to hold.
    """
    asked, store, solver = part
    if not isinstance(solver, Cholesky | Eigen):
        raise ValueError(
            f"--dampings tries those of Cholesky and Eigen; the job has {type(solver).__name__}"
        )
    if truth is None:
        return dropinf.choose_damping(dampings, [part])
    if len(dampings) * len(asked) * len(store) > _MOST_SCORES:
        raise ValueError("--dampings would hold too many scores at once; take fewer queries")
    wrong = torch.tensor(truth)
    return dropinf.choose_damping(
        dampings, [part], lambda scores: mislabeled_auc(-scores.nanmean(0), wrong).value
    )


def _solver_of(terminal: Terminal, run: Run, job: Job, store: RowStore) -> Solver:
    """The solver of a run; the job's, if there is none, or the job asks for another one.

    It is saved where that can be, if it is the run's own, of all rows.
    """
    before = Job.load(run.job) if run.job.exists() else Job()
    own = (job.solver_kind, job.damping) == (before.solver_kind, before.damping)
    if own and run.solver.exists():
        return load_solver(run.solver, store, job.max_bytes)
    solver = job.solver()
    terminal.note(f"fitting {solver} on {len(store):,} rows of {run.train}")
    with terminal.passes("fit"):
        solver.fit(store)
    if own and store.finished and can_be_saved(solver):
        solver.save(run.solver)
    return solver


def _all_scores(asked: RowStore, store: RowStore, solver: Solver) -> dict[str, Any]:
    """Every score and each layer's part, for charts, if they are not too many to hold."""
    blocks = store.plan.blocks
    cells = len(asked) * len(store)
    if cells * len(blocks) <= _MOST_SCORES:
        layers = dropinf.scores(asked, store, solver, by="layer")
        parts = dict(zip((block.name for block in blocks), layers, strict=True))
        return {"scores": layers.sum(0), "layers": parts}
    if cells <= _MOST_SCORES:
        return {"scores": dropinf.scores(asked, store, solver)}
    return {}


def _contents(ready: Ready, queries: bool) -> dict[str, Any]:
    """Texts and images by the ids of the rows."""
    asked = ready.queries if queries else ready.train
    found: dict[str, Any] = {}
    for prefix, examples in (("", ready.train), ("query_", asked)):
        if examples is not None and examples.texts is not None:
            found[f"{prefix}texts"] = _by_id(examples, examples.texts.__getitem__)
        if examples is not None and examples.images is not None:
            found[f"{prefix}images"] = _by_id(examples, _image(examples.images))
    return found


def _by_id(examples: Examples, content: Callable[[int], Any]) -> Callable[[Any], Any]:
    return lambda id_: content(examples.position(id_))


def _image(files: Any) -> Callable[[int], Any]:
    image = optional("PIL.Image", "report", "a report with images")
    numpy = optional("numpy", "report", "a report with images")
    return lambda position: numpy.asarray(image.open(files[position]).convert("RGB"))
