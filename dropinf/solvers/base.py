"""What every solver shares: the interface, and the checks of what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dropinf.compression import LayerPlan, Plan
from dropinf.rows import RowStore, finite_rows
from dropinf.solvers.number_range import check_scores

Self = TypeVar("Self", bound="Solver")


class Solver(ABC):
    """Fit once on training rows, then solve for many queries.

    Attributes:
        plan: of the rows it was fitted on; None before `fit`.
        store: what it was fitted on; None before `fit`, and for a solver that was loaded.
        weights: fingerprint of those that made the rows of the fit, None if it is not known.
    """

    plan: Plan | None = None
    store: RowStore | None = None
    weights: str | None = None

    def fit(self: Self, store: RowStore) -> Self:
        """Learn F from the valid rows of `store`.

        It may be another store than the one that is scored: of `losses.sampled` or
        `losses.gauss_newton` under the same plan. Of the training rows themselves F is the
        empirical Fisher matrix.

        Raises:
            ValueError: the store holds no valid row, or a layer cannot be inverted.
        """
        n = int(store.valid.sum())
        if n == 0:
            raise ValueError(
                f"{type(self).__name__}.fit: none of the store's {len(store)} rows is valid"
            )
        self.plan = self.store = None  # an error leaves it unfitted, not half of the one before
        self._fit(store, n)
        self.plan, self.store, self.weights = store.plan, store, store.weights
        return self

    def solve(self, rows: Tensor) -> Tensor:
        """[m, R] -> [m, R]: each layer's slice times the inverse of its damped matrix.

        A row that is not finite gives NaN. A solution too large for the rows' dtype is infinite:
        give them in float64, as `scores` does.

        Raises:
            RuntimeError: the solver was not fitted.
            ValueError: the rows do not have the width of those it was fitted on.
        """
        return self._checked("solve", rows, self._solve)

    def scale(self, rows: Tensor) -> Tensor | None:
        """[n] factors of the scores of training rows [n, R]; None is one each."""
        return None

    def _checked(self, call: str, rows: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        if self.plan is None:
            raise RuntimeError(f"{type(self).__name__}.{call}: call fit(store) first")
        if rows.dim() != 2 or rows.shape[1] != self.plan.width:
            raise ValueError(
                f"{type(self).__name__}.{call}: rows must be [m, {self.plan.width}], "
                f"got {tuple(rows.shape)}"
            )
        finite = finite_rows(rows)  # a query that is marked invalid may hold anything
        if finite.all():
            return solve(rows) if len(rows) else rows.clone()
        solved = torch.full_like(rows, torch.nan)
        if finite.any():
            solved[finite] = solve(rows[finite])
        return solved

    def _blocks(self, plan: Plan) -> Sequence[LayerPlan]:
        """The layers that have a matrix of their own."""
        return plan.blocks

    def check_scores(
        self, op: str, found: Tensor, valid: Sequence[Tensor], at: Callable[..., Sequence[Tensor]]
    ) -> None:
        """Raise if a score is beyond the range of its dtype: see `number_range.check_scores`."""
        check_scores(op, self.plan, found, valid, at)

    def check_plans(
        self, op: str, queries: RowStore, store: RowStore | None, weights: str = "same"
    ) -> None:
        """Raise unless this, queries and store (None: that of the fit) are of one plan.

        And of one model's weights, as far as these are known, unless `weights` is "any".
        """
        if weights not in ("same", "any"):
            raise ValueError(f"{op}: weights must be 'same' or 'any', got {weights!r}")
        if self.plan is None:
            raise RuntimeError(f"{op}: the solver was not fitted; call fit(store) first")
        fitted = self.plan.fingerprint
        made = fitted if store is None else store.plan.fingerprint
        if queries.plan.fingerprint != made:
            raise ValueError(
                f"{op}: the queries were made under plan {queries.plan.fingerprint}, the store "
                f"under {made}; collect the queries with the store's plan (store.plan, or "
                "Plan.load(store.path))"
            )
        if made != fitted:
            raise ValueError(
                f"{op}: the solver was fitted under plan {fitted}, the store was made under "
                f"{made}; fit it on rows of the store's plan"
            )

        if weights == "any":
            return
        there = self.weights if store is None else store.weights
        for who, own in (("the queries were", queries.weights), ("the solver was", self.weights)):
            if None not in (own, there) and own != there:
                how = "fitted on rows of" if who == "the solver was" else "made with"
                raise ValueError(
                    f"{op}: {who} {how} weights {own}, the store's rows with {there}; collect both "
                    "with one model, or say weights='any'"
                )

    @abstractmethod
    def _fit(self, store: RowStore, n: int) -> None: ...

    @abstractmethod
    def _solve(self, rows: Tensor) -> Tensor: ...


class Joint(Solver):
    """One matrix over all layers together, instead of one for each."""

    def _blocks(self, plan: Plan) -> Sequence[LayerPlan]:
        P = sum(block.P for block in plan.blocks)
        return [LayerPlan("all layers", plan.slots, P, plan.width, 0)]
