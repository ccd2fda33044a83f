"""How scores were made: plan, solver, weights, proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dropinf.rows import RowStore
from dropinf.solvers import Solver
from dropinf.version import __version__


@dataclass(frozen=True)
class Facts:
    """How scores were made.

    Attributes:
        compression: as it is written, "Dropout(r=1024)".
        layers, parameters, width: of the plan; width is R, entries of a row.
        masks: how many plans or checkpoints the scores are averaged over.
        plans: fingerprint of each.
        examples, invalid: rows of the store, and how many are not valid.
        queries: rows asked about.
        solver: as it is written, "Cholesky(damping=0.1) fitted on 1,200 rows".
        updates: the optimizer whose steps the rows are; None where they are gradients.
        relative: whether scores are divided by the root of each example's self-influence.
        weights: fingerprint of the weights of each, None where it is not known.
        dtype: in which rows are kept.
        proof: on how many examples rows were compared with plain autograd.
        versions: of dropinf and torch.
    """

    compression: str
    layers: int
    parameters: int
    width: int
    masks: int
    plans: tuple[str, ...]
    examples: int
    invalid: int
    queries: int
    solver: str
    updates: str | None
    relative: bool
    weights: tuple[str | None, ...]
    dtype: str
    proof: str
    versions: str

    @property
    def unit(self) -> str:
        """What the number of a score says."""
        if self.relative:
            return (
                "A score is divided by the root of the example's self-influence, for an order; it "
                "is no change of a loss."
            )
        example = "the step that the optimizer would take of the example's"
        if self.solver.startswith("Identity(cosine=True"):
            if self.updates is not None:
                return f"A score is the cosine of the query's gradient and {example}, from -1 to 1."
            return "A score is the cosine of two gradients, from -1 to 1."
        if self.updates is not None:
            how = "" if self.solver.startswith("Identity(") else ", preconditioned by the solver"
            return f"A score is the product of the query's gradient and {example}{how}."
        if self.solver.startswith("Identity("):
            return (
                "A score is the product of two gradients: a step of size s down the example's "
                "lowers the query's loss by about s times its score."
            )
        return (
            "A score is per example, of the summed loss, not divided by n: training without one "
            "example changes the query's loss by about its score / n, up where the score is "
            "positive."
        )

    def rows(self) -> list[tuple[str, str]]:
        """(what, how) for a table."""
        invalid = f", {self.invalid:,} of them invalid" if self.invalid else ""
        masks = f", {self.masks} of them averaged" if self.masks > 1 else ""
        known = [weights or "not known" for weights in dict.fromkeys(self.weights)]
        return [
            ("training examples", f"{self.examples:,}{invalid}"),
            ("queries", f"{self.queries:,}"),
            ("compression", f"{self.compression}{masks}"),
            ("entries of a row", f"{self.width:,} of {self.parameters:,} in {self.layers} layers"),
            ("kept in", self.dtype),
            ("solver", self.solver),
            *([] if self.updates is None else [("rows are steps of", self.updates)]),
            ("plan", ", ".join(dict.fromkeys(self.plans))),
            ("weights", ", ".join(known)),
            ("proof", self.proof),
            ("versions", self.versions),
        ]


def facts_of(parts: Sequence[tuple[RowStore, RowStore, Solver]], relative: bool = False) -> Facts:
    """Of (queries, store, solver) of each mask or checkpoint."""
    queries, store, solver = parts[0]
    plan = store.plan
    return Facts(
        compression=repr(plan.compression),
        layers=len(plan.blocks),
        parameters=sum(block.P for block in plan.blocks),
        width=plan.width,
        masks=len(parts),
        plans=tuple(store.plan.fingerprint for _, store, _ in parts),
        examples=len(store),
        invalid=int((~store.valid).sum()),
        queries=len(queries),
        solver=repr(solver),
        updates=store.updates,
        relative=relative,
        weights=tuple(store.weights for _, store, _ in parts),
        dtype=str(store.dtype).removeprefix("torch."),
        proof="; ".join(dict.fromkeys(str(store.proof) for _, store, _ in parts)),
        versions=f"dropinf {__version__}, torch {torch.__version__}",
    )
