"""What each damping is worth: by labels that are known to be wrong, or by a second mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import dropinf
from dropinf.cli.collecting import measured, rows_of
from dropinf.cli.terminal import Terminal
from dropinf.jobs import Job, Ready
from dropinf.reporting import area
from dropinf.rows import RowStore
from dropinf.solvers import Cholesky, DampingChoice, Eigen, Solver

Part = tuple[RowStore, RowStore, Solver]


def sweep_of(
    terminal: Terminal,
    job: Job,
    ready: Ready,
    part: Part,
    dampings: Sequence[float],
    truth: Sequence[bool] | None,
) -> DampingChoice:
    """The choice of one of the dampings.

    With `truth`, [n] in the store's order, by the AUC of a low mean score; else by the agreement
    with another seed, whose rows are collected in memory.

    Raises:
        ValueError: the solver takes no other damping, or there is no other mask.
    """
    solver = part[2]
    if not isinstance(solver, Cholesky | Eigen):
        raise ValueError(
            f"--dampings tries those of Cholesky, Full and Eigen; the job has "
            f"{type(solver).__name__}"
        )
    if truth is not None:
        wrong = torch.tensor(truth).numpy()

        def found(scores: Tensor) -> float:
            auc = area(wrong, -scores.nanmean(0).double().numpy())
            return float("nan") if auc is None else auc

        return dropinf.choose_damping(dampings, [part], found)
    return dropinf.choose_damping(dampings, [part, _other_mask(terminal, job, ready, part)])


def _other_mask(terminal: Terminal, job: Job, ready: Ready, part: Part) -> Part:
    if ready.queries is None:
        raise ValueError(
            "--dampings compares masks by queries; name these with --queries, or a column of what "
            "is known to be wrong with --truth"
        )
    made = part[1].plan
    if not hasattr(made.compression, "seed"):
        raise ValueError(
            f"--dampings compares two seeds, and {made.compression!r} has none; name a column of "
            "what is known to be wrong with --truth"
        )
    other = replace(job, seed=job.seed + 1)
    terminal.note(f"collecting under seed {other.seed}, by whose agreement dampings are compared")
    energies = measured(terminal, job, ready, job.energies) if job.energies else None
    plan = other.plan(ready.model, energies)
    store = rows_of(terminal, ready, ready.train, plan, f"train, seed {other.seed}")
    asked = rows_of(terminal, ready, ready.queries, plan, f"queries, seed {other.seed}")
    with terminal.passes("fit"):
        return asked, store, job.solver().fit(store)
