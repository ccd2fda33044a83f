"""Commands that run a model: init, plan, energies, collect."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import dropinf
from dropinf.cli.app import command
from dropinf.cli.job_options import takes_job
from dropinf.cli.matrix_file import refuse_no_file
from dropinf.cli.run_directory import Run, refuse_another_job
from dropinf.cli.terminal import Terminal
from dropinf.compression import Energies, Plan
from dropinf.jobs import CARDS, Examples, Job, Ready, estimate_of_job, prepare
from dropinf.rows import RowStore
from dropinf.text_table import Table

Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run left.")]
_EXAMPLES = 64  # for energies, where the job does not say


@command("dropinf init my-model --train train.jsonl --queries queries.jsonl")
@takes_job
def init(
    terminal: Terminal,
    job: Job,
    to: Annotated[Path, typer.Option(help="File to write.")] = Path("job.toml"),
) -> None:
    """Write a commented job file for a model's directory."""
    for name in ("model", "adapter", "train", "queries"):
        path = getattr(job, name)
        if path is not None and not os.path.exists(path):
            raise FileNotFoundError(f"there is no {path} ({name})")
    refuse_no_file(to)
    if os.path.lexists(to):
        raise FileExistsError(f"{to} exists; remove it, or name another file with --to")
    job.save(to)
    todo = "" if job.train or job.entry else f"name the training examples in {to}, then "
    terminal.show({"path": str(to)}, f"{to} is written; {todo}dropinf collect {to} runs it")


@command("dropinf plan job.toml, or dropinf plan my-model --estimate --r 4096 --dtype bfloat16")
@takes_job
def plan(
    terminal: Terminal,
    job: Job,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate", help="Say what collecting takes, of the model's config; write nothing."
        ),
    ] = False,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="With --estimate: tokens of a text.")
    ] = None,
) -> None:
    """Choose what is kept of each layer, and show it; collect then takes that plan."""
    if estimate:
        found = estimate_of_job(job, tokens)
        names = ("batch_size", "weights", "kept", "rows", "coordinates", "temporary", "peak")
        facts = {name: getattr(found, name) for name in (*names, "flops")}
        cards = {
            name: {"fits": found.fits(card.num_bytes), "seconds": found.seconds(1000, card)}
            for name, card in CARDS.items()
        }
        terminal.show({**facts, "of 1000 examples, predicted": cards}, found.describe())
        return
    if tokens is not None:
        raise ValueError("--tokens goes with --estimate")
    run, ready = Run.of_job(job), prepared(terminal, job)
    made = plan_of(terminal, job, ready, run)
    layers = [{"layer": block.name, "parameters": block.P, "r": block.r} for block in made.blocks]
    facts = {"path": str(run.plan), "plan": made.fingerprint, "width": made.width, "layers": layers}
    terminal.show(facts, f"{made.describe()}\n{run.plan}: {made}")


@command("dropinf energies job.toml")
@takes_job
def energies(terminal: Terminal, job: Job) -> None:
    """Measure where the gradients are: the energy of each parameter, E g^2 summed up."""
    ready = prepared(terminal, job)
    found = measured(terminal, job, ready, job.energies or _EXAMPLES)
    sums = {name: float(found[name][0].sum() * found[name][1].sum()) for name in found}
    total = sum(sums.values())
    named = dict(ready.model.named_parameters())
    rows = [
        (name, f"{named[name].numel():,}", f"{energy:.3g}", f"{energy / total:.1%}")
        for name, energy in sums.items()
    ]
    terminal.show(sums, Table(("parameter", "entries", "energy", "share"), rows, right=(1, 2, 3)))


@command(
    "dropinf collect job.toml, or dropinf collect my-model --train train.jsonl --r 1024 --out run",
    goes_on="the same command with --resume goes on",
)
@takes_job
def collect(terminal: Terminal, job: Job, resume: Resume = False) -> None:
    """Compress the gradient of every training example and query into the directory of a run."""
    run = Run.of_job(job)
    _refuse_what_is_there(run, job, resume)
    started = time.monotonic()
    ready = prepared(terminal, job)
    made = plan_of(terminal, job, ready, run)
    job.save(run.job)
    stores = {"train": _collected(terminal, job, ready, ready.train, made, run.train)}
    if ready.queries is not None:
        stores["queries"] = _collected(terminal, job, ready, ready.queries, made, run.queries)
    facts = {
        "out": str(run.path),
        **{name: len(store) for name, store in stores.items()},
        "width": made.width,
        "plan": made.fingerprint,
        "seconds": round(time.monotonic() - started, 3),
    }
    lines = [f"{store.path}: {store}" for store in stores.values()]
    terminal.show(facts, "\n".join([*lines, f"dropinf report {run.path} shows what they say"]))


def plan_of(terminal: Terminal, job: Job, ready: Ready, run: Run) -> Plan:
    """The plan of a run, made and saved if it has none.

    Raises:
        ValueError: the one that is there is another job's.
    """
    if run.plan.exists():
        known = Plan.load(run.plan)
        of = getattr(known.compression, "energies", None)
        wanted = None
        if bool(of) == bool(job.energies):
            wanted = job.plan(ready.model, of)
        if wanted is None or wanted.fingerprint != known.fingerprint:
            raise ValueError(
                f"{run.plan} is the plan of another job or model ({known.compression!r}); remove "
                "it, or give another --out"
            )
        return known
    found = measured(terminal, job, ready, job.energies) if job.energies else None
    made = job.plan(ready.model, found)
    run.path.mkdir(parents=True, exist_ok=True)
    made.save(run.plan)
    return made


def prepared(terminal: Terminal, job: Job) -> Ready:
    """The job made ready; what people should know of it is said."""
    ready = prepare(job)
    for sentence in ready.notes:
        terminal.note(sentence)
    return ready


def measured(terminal: Terminal, job: Job, ready: Ready, n: int) -> Energies:
    """Energies of n training examples."""
    terminal.note(f"measuring energies on {n} training examples or fewer")
    return dropinf.energies(
        ready.model,
        ready.train.spread(n),
        ready.loss_fn,
        n,
        include=job.include,
        exclude=job.exclude,
    )


def rows_of(
    terminal: Terminal, ready: Ready, examples: Examples, plan: Plan, label: str
) -> RowStore:
    """Rows in memory, under another plan than the run's."""
    return dropinf.collect(
        ready.model,
        examples.loader,
        ready.loss_fn,
        plan,
        progress=terminal.progress and label,
        ids=examples.ids,
    )


def _collected(
    terminal: Terminal, job: Job, ready: Ready, examples: Examples, made: Plan, path: Path
) -> RowStore:
    return dropinf.collect(
        ready.model,
        examples.loader,
        ready.loss_fn,
        made,
        path,
        progress=terminal.progress and path.name,
        resume=True,  # what must not be there was looked at
        ids=examples.ids,
        dtype=None if job.rows_dtype is None else getattr(torch, job.rows_dtype),
    )


def _refuse_what_is_there(run: Run, job: Job, resume: bool) -> None:
    """Without --resume, rows must not be there; with it, the job must be that of the run.

    Raises:
        FileExistsError, ValueError: it is not so.
    """
    if not resume:
        for path in (run.train, run.queries):
            if os.path.lexists(path):
                raise FileExistsError(
                    f"{path} is there already; go on with it by --resume, or give another --out"
                )
        return
    refuse_another_job(run, job, f"dropinf collect {run.path} --resume goes on as it was begun")
