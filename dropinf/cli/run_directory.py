"""The directory of a run: its rows, its solver, the job that made it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from dropinf import solvers
from dropinf.cli.terminal import Terminal
from dropinf.jobs import Job
from dropinf.manifest import read_manifest
from dropinf.rows import RowStore
from dropinf.solvers import Solver

SOLVERS = ("Cholesky", "Eigen", "DataInf", "Diagonal", "Identity", "CG", "LiSSA")
_SAVED = ("Cholesky", "Full")
_FREE = ("queries", "out", "device", "solver_kind", "damping", "max_bytes")  # they shape no rows

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
TrainPath = Annotated[
    Path | None, typer.Option("--train", help="Store of the training rows, if not RUN/train.")
]
QueriesPath = Annotated[
    Path | None, typer.Option("--queries", help="Store of the query rows, if not RUN/queries.")
]
SolverPath = Annotated[
    Path | None, typer.Option("--solver", help="Directory of the solver, if not RUN/solver.")
]
Kind = Annotated[
    str | None,
    typer.Option("--kind", help=f"Fit this solver: {', '.join(SOLVERS)}.", metavar="KIND"),
]
Damping = Annotated[
    float | None,
    typer.Option(help="Relative to the mean diagonal of each layer's matrix (default 0.1)."),
]
MaxBytes = Annotated[
    int | None, typer.Option("--max-bytes", min=1, help="Bound of the memory of the solver.")
]


@dataclass(frozen=True)
class Run:
    """Where the things of a run are."""

    path: Path
    train: Path
    queries: Path
    solver: Path

    @classmethod
    def of(
        cls,
        path: Path,
        train: Path | None = None,
        queries: Path | None = None,
        solver: Path | None = None,
    ) -> Run:
        """Those that are named, and else those of the directory."""
        return cls(
            path, train or path / "train", queries or path / "queries", solver or path / "solver"
        )

    @property
    def plan(self) -> Path:
        """The plan's file."""
        return self.path / "plan.json"

    @property
    def job(self) -> Path:
        """The job as it ran."""
        return self.path / "job.toml"

    def training_rows(self) -> RowStore:
        """Raises:
        FileNotFoundError: there are none.
        """
        if not self.train.exists():
            raise FileNotFoundError(
                f"there are no training rows at {self.train}; dropinf collect makes them, or name "
                "a store with --train"
            )
        return RowStore.load(self.train)

    def query_rows(self) -> RowStore | None:
        """None if there are none."""
        return RowStore.load(self.queries) if self.queries.exists() else None


def refuse_another_job(run: Run, job: Job, way_out: str, free: Collection[str] = ()) -> None:
    """Refuse a job that would not have made the rows of a run.

    Args:
        run: that was begun.
        job: the one that is given.
        way_out: what to do instead, for the error.
        free: names of what may differ, beside what shapes no rows.

    Raises:
        ValueError: the job is another one.
    """
    if not run.job.exists():
        return
    before = Job.load(run.job)
    for one in fields(Job):
        mine, its = (_absolute(one.metadata, getattr(of, one.name)) for of in (job, before))
        may = one.name in (*_FREE, *free)
        if mine != its and (not may or (one.name == "queries" and its and run.queries.exists())):
            where = f"[{one.metadata['section']}] {one.metadata['name']}"
            raise ValueError(
                f"the run in {run.path} was begun with {where} = {its!r}, and this job has "
                f"{mine!r}; {way_out}"
            )


def _absolute(about: Mapping[str, Any], value: Any) -> Any:
    return os.path.abspath(value) if value is not None and about.get("path") else value


def need_queries(run: Run) -> RowStore:
    """The query rows.

    Raises:
        FileNotFoundError: there are none.
    """
    found = run.query_rows()
    if found is None:
        raise FileNotFoundError(
            f"there are no query rows at {run.queries}; collect with --queries, or name a store "
            "with --queries"
        )
    return found


def new_solver(
    kind: str | None, damping: float | None, max_bytes: int | None, job: Path | None = None
) -> Solver:
    """A solver that is not fitted, of these options; without any, that of a job's file."""
    if kind is None and damping is None and job is not None and job.exists():
        return Job.load(job).but(max_bytes=max_bytes).solver()
    if kind not in (None, *SOLVERS):
        raise ValueError(f"--kind must be one of {', '.join(SOLVERS)}, got {kind!r}")
    options: dict[str, Any] = {} if damping is None else {"damping": damping}
    if kind == "Identity" and options:
        raise ValueError("Identity inverts nothing and takes no --damping")
    return getattr(solvers, kind or "Cholesky")(max_bytes=max_bytes, **options)


def fitted(
    terminal: Terminal,
    run: Run,
    store: RowStore,
    kind: str | None,
    damping: float | None,
    max_bytes: int | None,
) -> Solver:
    """The solver of a run; where it has none, or options are given, one that is fitted now."""
    if kind is None and damping is None and run.solver.exists():
        return load_solver(run.solver, store, max_bytes)
    solver = new_solver(kind, damping, max_bytes, run.job)
    terminal.note(f"fitting {solver} on {len(store):,} rows of {run.train}")
    return solver.fit(store)


def load_solver(path: Path, store: RowStore | None, max_bytes: int | None = None) -> Solver:
    """What `fit` saved, by its kind.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or not of this store.
    """
    cls = getattr(solvers, solver_facts(path)["kind"])
    return cls.load(path, store, max_bytes=max_bytes)


def solver_facts(path: Path) -> dict[str, Any]:
    """What the file of a solver says, without its factors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    file = path / "solver.json"
    if not file.exists():
        raise FileNotFoundError(f"{path} holds no solver (no solver.json in it)")
    saved = read_manifest("solver", file, "fit and save it again")
    if saved.get("kind") not in _SAVED:
        raise ValueError(f"{file} is damaged: it names no solver; fit and save it again")
    return saved


def can_be_saved(solver: Solver) -> bool:
    """Whether it goes into a directory."""
    return type(solver).__name__ in _SAVED
