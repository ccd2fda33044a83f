"""Scores [m, n] of m queries against n training examples, and the largest k of each query."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dropinf.collecting import LossFn, collect
from dropinf.compress import Dropout, Full
from dropinf.plan import Plan
from dropinf.solvers import Cholesky
from dropinf.solvers.base import Solver
from dropinf.store import RowStore
from dropinf.streaming import products


def scores(queries: RowStore, store: RowStore, solver: Solver) -> Tensor:
    """scores[q, i] = Σ_l g_q,l · (F_l + λ_l)⁻¹ · g_i,l: the influence of example i on query q.

    Positive: more of training example i lowers query q's loss. Solves for the m queries, never for
    the n training rows.

    Args:
        queries: m rows.
        store: n training rows under the same plan.
        solver: fitted, usually on `store`.

    Returns:
        [m, n] in the rows' dtype; NaN where the query or the training row is invalid.

    Raises:
        ValueError: the three were not made under the same plan.
    """
    _check_plans("scores", queries, store, solver)
    solved = solver.solve(queries.rows)
    result = products(solved, store)
    result[~queries.valid] = torch.nan
    result[:, ~store.valid] = torch.nan
    return result


def topk(queries: RowStore, store: RowStore, solver: Solver, k: int = 10) -> tuple[Tensor, Tensor]:
    """The k training examples of largest score for each query, without forming [m, n].

    Args:
        queries, store, solver: as in `scores`.
        k: 1 to the number of valid training rows.

    Returns:
        values [m, k], largest first, and indices [m, k] int64, positions in the store. Invalid
        training rows are never among them; an invalid query has NaN and -1.

    Raises:
        ValueError: the three were not made under the same plan, or k is out of range.
    """
    _check_plans("topk", queries, store, solver)
    num_valid = int(store.valid.sum())
    if not 1 <= k <= num_valid:
        raise ValueError(f"topk: k must be 1 to {num_valid}, the valid rows of the store, got {k}")
    solved = solver.solve(queries.rows)
    values = solved.new_full((len(queries), k), -torch.inf)
    indices = torch.full((len(queries), k), -1)
    for start, chunk in store.chunks():
        part = solved @ chunk.to(solved).T
        part[:, ~store.valid[start : start + len(chunk)]] = -torch.inf
        best, where = part.topk(min(k, part.shape[1]))
        merged = torch.cat([values, best], 1)
        values, order = merged.topk(k)
        indices = torch.cat([indices, where + start], 1).gather(1, order)
    values[~queries.valid] = torch.nan
    indices[~queries.valid] = -1
    return values, indices


def influence(
    model: nn.Module,
    train_loader: Iterable,
    query_loader: Iterable,
    loss_fn: LossFn,
    compression: Dropout | Full | None = None,
    damping: float = 0.1,
    *,
    mode: str = "activations",
    progress: bool = True,
) -> Tensor:
    """All of it in one call: plan, collect both loaders, fit `solvers.Cholesky`, score.

    Args:
        model: its trainable parameters are tracked.
        train_loader, query_loader: in a fixed order; batches of any type that `loss_fn` takes.
        loss_fn: (model, batch) -> [B], one loss per example.
        compression: None is Dropout(r=1024).
        damping: relative, see `solvers.Cholesky`.
        mode: see `capture`.
        progress: show a bar for each loader.

    Returns:
        scores [m, n], see `scores`.
    """
    plan = Plan.make(model, Dropout(r=1024) if compression is None else compression)
    store, queries = (
        collect(model, loader, loss_fn, plan, mode=mode, progress=progress and label)
        for loader, label in ((train_loader, "train rows"), (query_loader, "query rows"))
    )
    return scores(queries, store, Cholesky(damping).fit(store))


def _check_plans(op: str, queries: RowStore, store: RowStore, solver: Solver) -> None:
    if solver.plan is None:
        raise RuntimeError(f"{op}: the solver was not fitted; call solver.fit(store) first")
    made = store.plan.fingerprint
    if queries.plan.fingerprint != made:
        raise ValueError(
            f"{op}: the queries were made under plan {queries.plan.fingerprint}, the store under "
            f"{made}; collect the queries with the store's plan (store.plan, or "
            "Plan.load(store.path))"
        )
    if solver.plan.fingerprint != made:
        raise ValueError(
            f"{op}: the solver was fitted under plan {solver.plan.fingerprint}, the store was made "
            f"under {made}; fit it on rows of the store's plan"
        )
