"""How to choose the damping: what n rows can tell, held-out queries, masks, or a user's measure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dropinf.ranks import standard_ranks
from dropinf.rows import RowStore, mean_squares
from dropinf.solvers.cholesky import Cholesky
from dropinf.solvers.damping import Damping
from dropinf.solvers.eigen import Eigen
from dropinf.solvers.triples import triples
from dropinf.text_table import Table
from dropinf.user_warning import warn_user

_WORTH = {
    "noise": "minus decades from trace(F) / n",
    "likelihood": "log likelihood of a held-out query",
    "agreement": "rank correlation of two masks",
}


@dataclass(frozen=True, repr=False, eq=False)
class DampingChoice:
    """What `choose_damping` returns; values and errors are in the order of `dampings`.

        choice = dropinf.choose_damping([0.01, 0.1, 1.0], parts)
        print(choice)  # a table, with the one that was chosen

    Attributes:
        damping: the one to take.
        values: [k] float64, on the CPU; larger is better.
        errors: [k] float64, standard errors; NaN where there is nothing to take them over.
        dampings: the k that were given.
        metric: "noise", "likelihood", "agreement", or "metric" for a user's own.
        at_edge: the damping is the smallest or the largest given, so a better one may be beyond.
    """

    damping: float
    values: Tensor
    errors: Tensor
    dampings: tuple[float, ...]
    metric: str
    at_edge: bool

    @property
    def worth(self) -> str:
        """What `values` are."""
        return _WORTH.get(self.metric, self.metric)

    def describe(self) -> Table:
        """A row for each damping, in growing order."""
        rows = []
        for at in sorted(range(len(self.dampings)), key=self.dampings.__getitem__):
            error = float(self.errors[at])
            worth = f"{float(self.values[at]):.4g}" + (
                "" if math.isnan(error) else f" +- {error:.2g}"
            )
            chosen = "chosen" if self.dampings[at] == self.damping else ""
            rows.append((f"{self.dampings[at]:g}", worth, chosen))
        beyond = "It is at the end of those given; a better one may be beyond."
        notes = [beyond] if self.at_edge else []
        columns = ("damping", self.worth, "")
        return Table(columns, rows, right=range(2), notes=notes)

    def __str__(self) -> str:
        return str(self.describe())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.describe()._repr_html_()


def choose_damping(
    dampings: Sequence[float],
    parts: Sequence[tuple[RowStore, RowStore, Cholesky | Eigen]],
    metric: str | Callable[[Tensor], float] = "noise",
) -> DampingChoice:
    """Pick a damping. With a measure of what you want the scores for, give it as `metric`.

    - "noise": what n rows can tell of F. An eigenvalue of F_l below trace(F_l) / n may be nothing
      but the choice of the n rows (the sample covariance's error, Koltchinskii & Lounici, Bernoulli
      23, 2017), so that λ_l should be about that: a relative damping of r_l / n, which grows with
      r. The damping is taken for which log λ_l is nearest to it, in the mean over entries.
      Reads no query, and one mask is enough. On five tasks and four r it was within 0.02 of the
      best LDS of the grid (docs/damping.md), where the others were up to 0.28 and 0.31 below it.
    - "likelihood": of the held-out queries' rows under N(0, F_l + λ_l), the sum over layers. Mostly
      it takes dampings that are too small.
    - "agreement": the Spearman correlation over training examples between the scores of two masks
      (`Dropout(seed=)`), mean over queries and pairs; the smallest damping within a standard error
      (over queries) of the best. What a mask makes up differs from mask to mask; but all masks
      agree on dot products, so that this runs to large dampings.

        choice = dropinf.choose_damping([0.01, 0.1, 1.0, 10.0], parts)
        solver = dropinf.solvers.Cholesky(choice.damping).fit(store)

    Args:
        dampings: k numbers to choose from, of the kind that the solvers take (relative or not).
        parts: (queries, store, solver) of each mask: the same held-out queries and training
            examples under plans that differ in their seed; each solver fitted on its store.
        metric: one of the above; or scores [m, n] -> a number, larger is better, of which the best
            mean over the parts wins.

    Returns:
        The damping, with a warning if it is the smallest or largest given; values [k] and their
        standard errors [k]: over queries, of a metric over parts, NaN for one part and for "noise".
        A metric and "agreement" hold k x m x n scores of every part at once.

    Raises:
        TypeError: a part is something else.
        ValueError: no damping, an unknown metric, no part, fewer than two masks for "agreement",
            parts that differ, or no row to go by.
    """
    if not dampings:
        raise ValueError("choose_damping: no dampings were given")
    if not callable(metric) and metric not in _WORTH:
        raise ValueError(
            f"choose_damping: metric must be a function of scores or one of "
            f"{', '.join(map(repr, _WORTH))}, got {metric!r}"
        )
    parts = list(triples("choose_damping", parts))
    needed = 2 if metric == "agreement" else 1
    if len(parts) < needed:
        raise ValueError(
            f"choose_damping: need (queries, store, solver) of {needed} masks or more, got "
            f"{len(parts)}; collect with Dropout(seed=0), Dropout(seed=1), ..."
        )
    if metric == "noise":
        each = torch.stack([_decades_off(dampings, *part[1:]) for part in parts]).mean(0)[None]
    elif metric == "likelihood":
        each = torch.stack([_likelihood(dampings, *part) for part in parts]).mean(0)
    elif metric == "agreement":
        each = _agreement(dampings, parts)
    else:
        swept = (solver.sweep(dampings, queries, store) for queries, store, solver in parts)
        each = torch.tensor([[float(metric(s)) for s in scores] for scores in swept]).double()
    values = each.mean(0)
    errors = each.std(0) / len(each) ** 0.5 if len(each) > 1 else torch.full_like(values, torch.nan)
    best = int(values.argmax())
    if metric == "agreement" and len(each) > 1:
        near = values >= values[best] - errors[best]
        best = min(near.nonzero().flatten().tolist(), key=lambda j: dampings[j])
    at_edge = len(dampings) > 1 and dampings[best] in (min(dampings), max(dampings))
    if at_edge:
        warn_user(
            f"choose_damping: {dampings[best]:g} is at the end of the dampings given; give some "
            "beyond it, as the best may be there"
        )
    name = metric if isinstance(metric, str) else "metric"
    given = tuple(map(float, dampings))
    return DampingChoice(given[best], values, errors, given, name, at_edge)


def _decades_off(dampings: Sequence[float], store: RowStore, solver: Cholesky | Eigen) -> Tensor:
    """[k]: minus the mean of |log10(λ_l n / trace(F_l))|, each layer by its entries."""
    if solver.plan is None:
        raise RuntimeError("choose_damping: the solver was not fitted; call fit(store) first")
    n, blocks = solver.num_rows, solver.plan.blocks
    if solver.absolute:
        fitted = store if solver.store is None else solver.store
        squares = mean_squares(fitted, int(fitted.valid.sum()))
        means = [float(squares[block.entries].mean()) for block in blocks]
    else:
        means = [1.0] * len(blocks)  # cancels
    counted = [(block.r, mean) for block, mean in zip(blocks, means, strict=True) if mean > 0]
    if not counted:
        raise ValueError("choose_damping: every row of the fit is zero; there is nothing to damp")
    found = []
    for damping in dampings:
        one = Damping("choose_damping", damping, solver.absolute)
        off = [
            r * abs(math.log10(one.λ(damping, mean) * n / (r * mean))) if damping > 0 else math.inf
            for r, mean in counted
        ]
        found.append(-sum(off) / sum(r for r, _ in counted))
    return torch.tensor(found, dtype=torch.float64)


def _likelihood(
    dampings: Sequence[float], queries: RowStore, store: RowStore, solver: Cholesky | Eigen
) -> Tensor:
    """[m, k] of the valid queries."""
    solver.check_plans("choose_damping", queries, store)
    rows = queries.at(queries.valid.nonzero().flatten())
    if not len(rows):
        raise ValueError("choose_damping: no query is valid")
    eigen = solver.decomposed() if isinstance(solver, Cholesky) else solver
    return eigen.log_likelihood(rows, dampings).cpu()


def _agreement(
    dampings: Sequence[float], parts: Sequence[tuple[RowStore, RowStore, Cholesky | Eigen]]
) -> Tensor:
    """[m, k] of the valid queries."""
    if len({store.plan.fingerprint for _, store, _ in parts}) < len(parts):
        raise ValueError(
            "choose_damping: two parts have the same plan, so they agree at any damping; collect "
            "them with another seed"
        )
    found = [solver.sweep(dampings, queries, store) for queries, store, solver in parts]
    if len({scores.shape for scores in found}) > 1:
        shapes = [list(scores.shape[1:]) for scores in found]
        raise ValueError(f"choose_damping: the parts differ in queries or examples: {shapes}")
    ranks = [_ranks(scores.to(found[0].device)) for scores in found]
    agreement = [(a * b).mean(-1) for a, b in itertools.combinations(ranks, 2)]  # [k, m]
    return torch.stack(agreement).mean(0).T.cpu()


def _ranks(scores: Tensor) -> Tensor:
    """[k, m, n] -> ranks over the valid training examples, of the valid queries."""
    valid_rows = ~scores[0].isnan().all(0)
    valid_queries = ~scores[0].isnan().all(1)
    return standard_ranks(scores[:, valid_queries][:, :, valid_rows])
