"""What every solver shares: the interface, and the checks of what it is given."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from dropinf.argument_kinds import need
from dropinf.compression import LayerPlan, Plan
from dropinf.rows import RowStore, finite_rows, identity_of, ranks_together
from dropinf.solvers.number_range import check_scores
from dropinf.solvers.room import Room

Self = TypeVar("Self", bound="Solver")


class Solver(ABC):
    """Fit once on training rows, then solve for many queries.

        solver = dropinf.solvers.Cholesky().fit(store)
        solved = solver.solve(asked.rows)  # [m, R]

    Attributes:
        plan: of the rows it was fitted on; None before `fit`.
        store: what it was fitted on; None before `fit`, and for a solver that was loaded.
        weights: fingerprint of those that made the rows of the fit, None if it is not known.
        updates: the optimizer whose steps the rows of the fit are; None of gradients.
        num_rows: n, the valid rows of the fit; 0 before `fit`.
        device: where it computes and keeps what it has learnt: that of the rows of the fit.
        max_bytes: bound of the memory of `fit` and what it leaves, of each `solve`, and of
            self-influences, beyond what these are given and return. None: `solve` takes its queries
            all at once, what goes over all rows of a store takes 256 MB or a row at a time.
    """

    plan: Plan | None = None
    store: RowStore | None = None
    weights: str | None = None
    updates: str | None = None
    num_rows: int = 0
    device: torch.device = torch.device("cpu")
    max_bytes: int | None = None
    _takes_part = False  # whether `fit` is shared out inside of `over_ranks`
    _kept_bytes: int = 0  # in memory, between fit and solve
    _given: Mapping[str, Any] = MappingProxyType({})  # arguments

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Remembers the arguments, for its repr."""
        made = super().__new__(cls)
        with contextlib.suppress(TypeError):  # which __init__ says better
            given = inspect.signature(cls.__init__).bind(made, *args, **options).arguments
            made._given = {k: v for k, v in given.items() if k != "self"}
        return made

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._shown().items())
        fitted = "" if self.plan is None else f" fitted on {self.num_rows:,} rows"
        return f"{type(self).__name__}({shown}){fitted}"

    def _shown(self) -> dict[str, Any]:
        """Arguments that are not left to their defaults; and the damping always."""
        found = inspect.signature(type(self).__init__).parameters
        damping = {"damping": found["damping"].default} if "damping" in found else {}
        return damping | {k: v for k, v in self._given.items() if v != found[k].default}

    def fit(self: Self, store: RowStore) -> Self:
        """Learn F from the valid rows of `store`.

        It may be another store than the one that is scored: of `losses.sampled` or
        `losses.gauss_newton` under the same plan. Of the training rows themselves F is the
        empirical Fisher matrix. Inside of `over_ranks` all ranks fit together.

        Raises:
            TypeError: it is no store.
            ValueError: the store holds no valid row, a layer cannot be inverted, or does not fit
                into `max_bytes`; or ranks cannot fit this together.
        """
        _need_store(f"{type(self).__name__}.fit", "store", store)
        self._agree_to_fit(store)
        n = int(store.valid.sum())
        if n == 0:
            raise ValueError(
                f"{type(self).__name__}.fit: none of the store's {len(store)} rows is valid"
            )
        self.plan = self.store = None  # an error leaves it unfitted, not half of the one before
        self._kept_bytes = 0
        self.device = store.device
        self._fit(store, n)
        self.plan, self.store, self.weights = store.plan, store, store.weights
        self.num_rows, self.updates = n, store.updates
        return self

    def _agree_to_fit(self, store: RowStore) -> None:
        """Inside of `over_ranks`, with the other ranks."""
        ranks = ranks_together()
        if ranks is None:
            return
        name = type(self).__name__
        if not self._takes_part:
            raise ValueError(
                f"{name}.fit: ranks do not fit it together; fit it on every rank before "
                "over_ranks(), inside of which scores may be made with it"
            )
        ranks.agree(f"{name}.fit", {"arguments": repr(self._shown()), **identity_of(store)})

    def solve(self, rows: Tensor) -> Tensor:
        """[m, R] -> [m, R]: each layer's slice times the inverse of its damped matrix.

        A row that is not finite gives NaN. A solution too large for the rows' dtype is infinite:
        give them in float64, as `scores` does. Rows on another device than the solver's are solved
        on that one, and the solution is where they are.

        Raises:
            RuntimeError: the solver was not fitted.
            ValueError: the rows do not have the width of those it was fitted on, or one of them
                takes more than `max_bytes`.
        """
        return self.solve_within(rows, self.room("solve"))

    def solve_within(self, rows: Tensor, room: Room) -> Tensor:
        """`solve` of rows [m, R] with a share of the memory, for who keeps something beside it."""
        return self._checked("solve", rows, self._solve, room)

    def scale(self, rows: Tensor) -> Tensor | None:
        """[n] factors of the scores of training rows [n, R]; None is one each."""
        return None

    def room(self, call: str, whole_store: bool = False) -> Room:
        """The memory that a call may take, beside what the solver keeps."""
        room = Room.of(f"{type(self).__name__}.{call}", self.max_bytes, whole_store)
        return room if self.max_bytes is None else room.beside(self._kept_bytes)

    def _bounded(self, max_bytes: int | None) -> None:
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(f"{type(self).__name__}: max_bytes must be positive, got {max_bytes}")
        self.max_bytes = max_bytes

    def _checked(
        self, call: str, rows: Tensor, solve: Callable[[Tensor, Tensor, Room], None], room: Room
    ) -> Tensor:
        if self.plan is None:
            raise RuntimeError(f"{type(self).__name__}.{call}: call fit(store) first")
        if rows.dim() != 2 or rows.shape[1] != self.plan.width:
            raise ValueError(
                f"{type(self).__name__}.{call}: rows must be [m, {self.plan.width}], "
                f"got {tuple(rows.shape)}"
            )
        if not len(rows):
            return rows.clone()
        asked, rows = rows.device, rows.to(self.device)
        row_bytes = 8 * rows.shape[1]
        # A query that is marked invalid may hold anything.
        finite = torch.cat([finite_rows(some) for some in rows.split(room.count(4 * row_bytes))])
        solved = torch.zeros_like(rows)
        if finite.all():
            solve(rows, solved, room)
            return solved.to(asked)
        solved[~finite] = torch.nan
        half = room.share(1 / 2)
        for at in finite.nonzero().flatten().split(half.count(2 * row_bytes)):
            some = rows[at]
            found = torch.zeros_like(some)
            solve(some, found, half)
            solved[at] = found
        return solved.to(asked)

    def _blocks(self, plan: Plan) -> Sequence[LayerPlan]:
        """The layers that have a matrix of their own."""
        return plan.blocks

    def check_scores(
        self, op: str, found: Tensor, valid: Sequence[Tensor], at: Callable[..., Sequence[Tensor]]
    ) -> None:
        """Raise if a score [..., m, n] is beyond its dtype: see `number_range.check_scores`."""
        check_scores(op, self.plan, found, valid, at)

    def check_plans(
        self, op: str, queries: RowStore, store: RowStore | None, weights: str = "same"
    ) -> None:
        """Raise unless this, queries and store (None: that of the fit) are of one plan.

        And of one model's weights, as far as these are known, unless `weights` is "any".

        Raises:
            TypeError: queries or store are no stores.
            ValueError: the plans or the weights differ.
            RuntimeError: this was not fitted.
        """
        _need_store(op, "queries", queries)
        if store is not None:
            _need_store(op, "store", store)
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

        if self.updates is not None and store is not None and store.updates is None:
            raise ValueError(
                f"{op}: the solver was fitted on updates (of {self.updates}), and the rows of the "
                "store are gradients; fit it on those, or score the updates"
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
    def _solve(self, rows: Tensor, solved: Tensor, room: Room) -> None:
        """Write into `solved`, which holds zeros."""


def need_solver(op: str, given: Any) -> None:
    """Raise TypeError unless it is a solver."""
    need(op, "solver", given, Solver, "fit one, as dropinf.solvers.Cholesky().fit(store)")


def _need_store(op: str, name: str, given: Any) -> None:
    need(op, name, given, RowStore, "collect makes one, and RowStore(rows, plan) of rows [n, R]")


class Joint(Solver):
    """One matrix over all layers together, instead of one for each."""

    def _blocks(self, plan: Plan) -> Sequence[LayerPlan]:
        P = sum(block.P for block in plan.blocks)
        return [LayerPlan("all layers", plan.slots, P, plan.width, 0)]
