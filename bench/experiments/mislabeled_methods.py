"""The contestants of mislabeled.py: of each training example, how suspicious its label is."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from quality_contestants import BY_ENERGY, COMPRESSIONS
from quality_tasks import Task, loader
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from whole_rows import rows_under

import dropinf
from dropinf import solvers

DAMPING = 0.1  # relative, of every solve
LISSA_STEPS = 20  # over all rows each, however large the residual is then
MEASURED = 64  # training examples that make the energies

# Minus the mean influence on the queries, by rows of r entries in all.
INFLUENCE = ("Dropout", "Dropout by energy", "Sketch", "Gaussian")
SELF = "Dropout, self-influence"
# By whole gradients.
SOLVERS: dict[str, Callable[[], solvers.Solver]] = {
    "whole gradient": lambda: solvers.Cholesky(damping=DAMPING),
    "LiSSA": lambda: solvers.LiSSA(damping=DAMPING, depth=LISSA_STEPS),
    "DataInf": lambda: solvers.DataInf(damping=DAMPING),
    "dot product": solvers.Identity,
}
WHOLE_SELF = "whole gradient, self-influence"
LOSS = "loss"
COMPRESSED, WHOLE = (*INFLUENCE, SELF), (*SOLVERS, WHOLE_SELF)


class Trained(NamedTuple):
    """A task and its model; the whole gradients of both, where they are kept."""

    task: Task
    model: nn.Module
    whole: dict[str, dropinf.RowStore]

    @classmethod
    def of(cls, task: Task) -> "Trained":
        return cls(task, task.trained(), {})

    def with_whole(self) -> "Trained":
        plan = dropinf.Plan.make(self.model, dropinf.Full())
        return self._replace(
            whole={which: self.collect(plan, which) for which in ("train", "queries")}
        )

    def collect(self, plan: dropinf.Plan, which: str) -> dropinf.RowStore:
        """Rows of "train" or "queries"."""
        if self.whole:
            of_all = self.whole[which]
            return (
                of_all if of_all.plan.fingerprint == plan.fingerprint else rows_under(plan, of_all)
            )
        data = getattr(self.task, which)
        return dropinf.collect(
            self.model, loader(data), self.task.loss_fn, plan, progress=False, check=False
        )

    def plan(self, method: str, r: int | None, seed: int) -> dropinf.Plan:
        if method in WHOLE:
            return dropinf.Plan.make(self.model, dropinf.Full())
        if method in BY_ENERGY:
            return dropinf.Plan.make(self.model, BY_ENERGY[method](r, seed, self.energies()))
        name = "Dropout" if method == SELF else method
        return dropinf.Plan.make(self.model, COMPRESSIONS[name](r, seed))

    def energies(self) -> dropinf.Energies:
        """Of the first training examples."""
        first = TensorDataset(*self.task.train[:MEASURED])
        return dropinf.energies(self.model, loader(first), self.task.loss_fn, examples=len(first))


def suspicion(of: Trained, method: str, r: int | None, seed: int) -> Tensor:
    """[n], large where a label may be wrong: the whole pipeline of a method."""
    if method == LOSS:
        with torch.no_grad():
            return of.task.loss_fn(of.model, of.task.train.tensors)
    plan = of.plan(method, r, seed)
    store = of.collect(plan, "train")
    if method in (SELF, WHOLE_SELF):
        return dropinf.self_influence(store, solvers.Cholesky(damping=DAMPING).fit(store))
    solver = SOLVERS[method]() if method in SOLVERS else solvers.Cholesky(damping=DAMPING)
    return minus_influence(of.collect(plan, "queries"), store, solver)


def minus_influence(
    queries: dropinf.RowStore, store: dropinf.RowStore, solver: solvers.Solver
) -> Tensor:
    """[n], of the mean of the queries."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LiSSA.solve")  # of its residual
        return -dropinf.scores(dropinf.mean_query(queries), store, solver.fit(store))[0]
