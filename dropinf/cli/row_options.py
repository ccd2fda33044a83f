"""Options of the commands on the rows of a run: which rows, which solver, stated once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from dropinf import solvers
from dropinf.cli.run_directory import Run, load_solver
from dropinf.cli.terminal import Terminal
from dropinf.jobs import Job
from dropinf.rows import RowStore
from dropinf.solvers import Solver

SOLVERS = ("Cholesky", "Eigen", "DataInf", "Diagonal", "Identity", "CG", "LiSSA")


class Weights(str, Enum):
    """Whether rows of other weights are taken."""

    same = "same"
    any = "any"


@dataclass(frozen=True)
class FitOptions:
    """Training rows, and a solver for them; each field is an option."""

    path: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")] = Path(
        "dropinf-run"
    )
    train: Annotated[
        Path | None, typer.Option(help="Store of the training rows, if not RUN/train.")
    ] = None
    solver: Annotated[
        Path | None, typer.Option(help="Directory of the solver, if not RUN/solver.")
    ] = None
    kind: Annotated[
        str | None, typer.Option(help=f"Fit this solver: {', '.join(SOLVERS)}.", metavar="KIND")
    ] = None
    damping: Annotated[
        float | None,
        typer.Option(help="Relative to the mean diagonal of each layer's matrix (default 0.1)."),
    ] = None
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bound of the memory of the solver.")
    ] = None

    @property
    def run(self) -> Run:
        """Where things are."""
        return Run.of(self.path, self.train, solver=self.solver)

    def new_solver(self) -> Solver:
        """A solver that is not fitted; without options that of the run's job."""
        job = self.run.job
        if self.kind is None and self.damping is None and job.exists():
            return Job.load(job).but(max_bytes=self.max_bytes).solver()
        if self.kind not in (None, *SOLVERS):
            raise ValueError(f"--kind must be one of {', '.join(SOLVERS)}, got {self.kind!r}")
        options: dict[str, Any] = {} if self.damping is None else {"damping": self.damping}
        if self.kind == "Identity" and options:
            raise ValueError("Identity inverts nothing and takes no --damping")
        return getattr(solvers, self.kind or "Cholesky")(max_bytes=self.max_bytes, **options)

    def fitted(self, terminal: Terminal, store: RowStore) -> Solver:
        """The solver of the run; where it has none, or options are given, one fitted now."""
        run = self.run
        if self.kind is None and self.damping is None and run.solver.exists():
            return load_solver(run.solver, store, self.max_bytes)
        solver = self.new_solver()
        terminal.note(f"fitting {solver} on {len(store):,} rows of {run.train}")
        with terminal.passes("fit"):
            return solver.fit(store)


@dataclass(frozen=True)
class SelfOptions(FitOptions):
    """And what is scored."""

    weights: Annotated[
        Weights, typer.Option(help="Whether rows may be of other weights than each other.")
    ] = Weights.same


@dataclass(frozen=True)
class ScoreOptions(SelfOptions):
    """And for which queries."""

    queries: Annotated[
        Path | None, typer.Option(help="Store of the query rows, if not RUN/queries.")
    ] = None
    relative: Annotated[
        bool,
        typer.Option(
            "--relative", help="Divide by the root of each training example's self-influence."
        ),
    ] = False

    @property
    def run(self) -> Run:
        """Where things are."""
        return Run.of(self.path, self.train, self.queries, self.solver)


def takes_options(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a command (terminal, options, ...) an option for each field of its options' class."""
    first, second, *own = inspect.signature(function, eval_str=True).parameters.values()
    kind, hints = second.annotation, get_type_hints(second.annotation, include_extras=True)

    def run(terminal: Terminal, **given: Any) -> None:
        options = kind(**{one.name: given.pop(one.name) for one in fields(kind)})
        function(terminal, options, **given)

    named = [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=one.default,
            annotation=hints[one.name],
        )
        for one in fields(kind)
    ]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [first, *own, *named], __validate_parameters__=False
    )
    run.__annotations__ = {}
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run
