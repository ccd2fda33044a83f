"""The directory of a run: its rows, its solver, the job that made it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dropinf import solvers
from dropinf.jobs import Job
from dropinf.manifest import read_manifest
from dropinf.rows import RowStore
from dropinf.solvers import Solver

_SAVED = ("Cholesky", "Full")
# They shape no rows.
_FREE = ("queries", "truth", "out", "device", "solver_kind", "damping", "max_bytes")


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
        """Those that are named, and else those of the directory.

        Raises:
            NotADirectoryError: it is a job's file.
        """
        refuse_job_file(path)
        return cls(
            path, train or path / "train", queries or path / "queries", solver or path / "solver"
        )

    @classmethod
    def of_job(cls, job: Job) -> Run:
        """The one that a job names.

        Raises:
            NotADirectoryError: a file is there.
        """
        path = Path(job.out)
        there = next((one for one in (path, *path.parents) if os.path.lexists(one)), None)
        if there is not None and not there.is_dir():
            raise NotADirectoryError(
                f"{there} is a file, and a run needs a directory; give another --out"
            )
        return cls.of(path)

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


def refuse_job_file(path: Path) -> None:
    """Refuse a job's file where a run is asked for, of which it names the directory.

    Raises:
        NotADirectoryError: it is one.
        ValueError: it has the name of one, and cannot be read.
    """
    if path.suffix == ".toml" and path.is_file():
        raise NotADirectoryError(
            f"{path} is a job's file; give the directory of its run, {Job.load(path).out}"
        )


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
