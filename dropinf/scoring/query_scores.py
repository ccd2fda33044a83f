"""Scores [m, n] of m queries against n training examples, and the largest k of each query."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dropinf import losses, ops
from dropinf.compression import Compression, Dropout, Plan
from dropinf.rows import (
    LossFn,
    RowStore,
    collect,
    mark_invalid,
    products,
    solved_for,
    valid_rows,
)
from dropinf.scoring.by_layer import layer_products
from dropinf.solvers import Cholesky, Solver

_NOWHERE = torch.iinfo(torch.int64).max  # an index that is an error everywhere


def scores(
    queries: RowStore,
    store: RowStore,
    solver: Solver,
    *,
    relative: bool = False,
    weights: str = "same",
    by: str | None = None,
) -> Tensor:
    """scores[q, i] = Σ_l g_q,l · (F_l + λ_l)⁻¹ · g_i,l: the influence of example i on query q.

    Positive: more of training example i lowers query q's loss. Solves for the m queries, never for
    the n training rows. F is what the solver was fitted on: of the training rows themselves the
    empirical Fisher matrix (see `solvers.Solver.fit`).

    Args:
        queries: m rows.
        store: n training rows under the same plan.
        solver: fitted, usually on `store`.
        relative: divide by the square root of each training example's self-influence, so that
            outliers with large gradients do not come first for every query (RelatIF, arXiv
            2003.11630, section 4.2, l-relative influence); this does solve for the training rows.
        weights: "any" takes rows of other weights than the queries' or the solver's, which are an
            error otherwise.
        by: "layer" gives each layer's part of the score, [L, m, n], in the order of
            `store.plan.blocks`; they add up to the scores.

    Returns:
        [m, n] in the rows' dtype, of the ids `queries.ids` and `store.ids`; NaN where the query or
        the training row is invalid. Rows of tokens (`collect(per="token")`) on either side give
        scores of tokens, which add up to their examples'; `origin` says whose each is.

    Raises:
        ValueError: the three were not made under the same plan or weights, a self-influence is
            negative, or a score is beyond the range of the rows' dtype.
    """
    if by not in (None, "layer"):
        raise ValueError(
            f"scores: by must be 'layer' or None, got {by!r}; scores of tokens are of rows that "
            "were collected with per='token'"
        )
    solver.check_plans("scores", queries, store, weights)
    solved = solved_for(queries.rows, store, solver.solve)
    result = (products if by is None else layer_products)(solved, store).to(queries.rows.dtype)
    factors = _factors("scores", store, solver, relative, weights)
    if factors is not None:
        result *= factors
    valid = queries.valid[:, None], store.valid
    solver.check_scores(
        "scores", result, valid, lambda *at: (solved[at[-2]], store.at([at[-1]])[0])
    )
    return mark_invalid(result, queries, store)


def topk(
    queries: RowStore,
    store: RowStore,
    solver: Solver,
    k: int = 10,
    *,
    relative: bool = False,
    weights: str = "same",
    ids: bool = False,
    largest: bool = True,
) -> tuple[Tensor, Any]:
    """The k training examples of largest score for each query, without forming [m, n].

    Args:
        queries, store, solver, relative, weights: as in `scores`.
        k: 1 to the number of valid training rows.
        ids: return ids of training examples for their positions: [m, k] int64, or lists of strings.
        largest: False takes the smallest scores, the smallest first: those of examples that raise
            the query's loss.

    Returns:
        values [m, k], largest first, and indices [m, k] int64, positions in the store. Invalid
        training rows are never among them; an invalid query has NaN, and 2^63 - 1 for index or id
        (for a string, None), with which no list or tensor can be indexed by mistake, as with -1.

    Raises:
        ValueError: as in `scores`, or k is out of range.
    """
    solver.check_plans("topk", queries, store, weights)
    num_valid = int(store.valid.sum())
    if not 1 <= k <= num_valid:
        raise ValueError(f"topk: k must be 1 to {num_valid}, the valid rows of the store, got {k}")
    solved = solved_for(queries.rows, store, solver.solve)
    if not largest:
        solved = -solved
    factors = _factors("topk", store, solver, relative, weights)
    values = solved.new_full((len(queries), k), -torch.inf)
    indices = torch.full((len(queries), k), -1, device=solved.device)
    for start, chunk in store.chunks():
        part = slice(start, start + len(chunk))
        ops.score_topk(
            solved,
            chunk.to(solved),
            values,
            indices,
            first=start,
            factors=None if factors is None else factors[part].to(solved),
            valid=store.valid[part].to(solved.device),
        )
    values = values.to(queries.rows.dtype)
    valid = (queries.valid[:, None],)
    solver.check_scores(
        "topk", values, valid, lambda q, at: (solved[q], store.at(indices[q, at : at + 1])[0])
    )
    if not largest:
        values = -values
    values[~queries.valid] = torch.nan
    indices[~queries.valid] = _NOWHERE
    return values, _ids_at(store, indices, queries.valid) if ids else indices


def self_influence(store: RowStore, solver: Solver, *, weights: str = "same") -> Tensor:
    """[n]: scores[i, i] of every training example, without forming [n, n].

    Large for what a model fits with few other examples: memorised, mislabelled, rare. Solves for
    all n rows, some at a time; `weights` is as in `scores`.

    Returns:
        [n] in the rows' dtype; NaN where the row is invalid.

    Raises:
        ValueError: store and solver were not made under the same plan, or a self-influence is
            beyond the range of the rows' dtype.
    """
    solver.check_plans("self_influence", store, store, weights)
    parts = []
    for rows in valid_rows(store):
        solved = solved_for(rows, store, solver.solve)
        own = (solved * rows).sum(1).to(rows.dtype)
        scale = solver.scale(rows)
        parts.append(own if scale is None else own * scale)
        solver.check_scores(
            "self_influence", parts[-1], (), lambda i, x=solved, g=rows: (x[i], g[i])
        )
    result = torch.full((len(store),), torch.nan, dtype=parts[0].dtype)
    result[store.valid] = torch.cat(parts)
    return result


class Ensemble(NamedTuple):
    """What `ensemble` returns."""

    mean: Tensor  # [m, n], weighted
    error: Tensor  # [m, n] standard error of the mean


def ensemble(
    parts: Iterable[tuple[RowStore, RowStore, Solver]],
    *,
    relative: bool = False,
    weights: str | Iterable[float] = "same",
) -> Ensemble:
    """Scores averaged over checkpoints and masks, with error bars.

    Averaging over several trained models is what helps most (TRAK, arXiv 2303.14186, section 3.2);
    several masks (`Dropout(seed=)`) of one model show how much of a score is the compression.

    Args:
        parts: (queries, store, solver) of each checkpoint and mask, for the same queries and
            training examples in the same order; a generator makes them one at a time.
        relative: as in `scores`.
        weights: of the parts, a number each, such as learning rates of checkpoints: the mean is
            Σ_k w_k scores_k / Σ_k w_k, and TracIn's sum over checkpoints, Σ_k w_k scores_k
            (TracInCP, arXiv 2002.08484; also definition 3.1 of LESS, arXiv 2402.04333), is that
            times sum(weights). Or "same" or "any", as in `scores`, for a plain mean.

    Returns:
        mean [m, n], and error [m, n], the standard error of that mean: the standard deviation over
        the parts divided by the square root of their number, NaN for a single part; with weights
        sqrt(K / (K - 1) Σ w_k² (scores_k - mean)²) / Σ w_k over the K parts. NaN where the query
        or training row is invalid in any part.

    Raises:
        ValueError: there are no parts, they differ in m or n, or weights are not one positive
            number for each.
    """
    given = None if isinstance(weights, str) else _part_weights(weights)
    same = weights if isinstance(weights, str) else "same"
    count, mean, squares, linear = 0, torch.empty(0), torch.empty(0), torch.empty(0)
    total = total_squares = 0.0
    for queries, store, solver in parts:
        if given is not None and count == len(given):
            raise ValueError(f"ensemble: there are more parts than the {count} weights")
        w = 1.0 if given is None else given[count]
        found = scores(queries, store, solver, relative=relative, weights=same)
        if count == 0:
            mean, squares, linear = (torch.zeros_like(found) for _ in range(3))
        if found.shape != mean.shape:
            raise ValueError(
                f"ensemble: part {count} has scores {list(found.shape)}, those before it "
                f"{list(mean.shape)}; give the same queries and training examples to all"
            )
        # Welford's update of Σ w² (s - mean)² and Σ w² (s - mean): no large sums cancel.
        count, total = count + 1, total + w
        off = found - mean
        step = off * (w / total)
        mean += step
        squares += step * (step * total_squares - 2 * linear) + w**2 * (found - mean).square()
        linear += w**2 * (found - mean) - step * total_squares
        total_squares += w**2
    if count == 0:
        raise ValueError("ensemble: no parts were given")
    if given is not None and count < len(given):
        raise ValueError(f"ensemble: {len(given)} weights were given for {count} parts")
    more = count / (count - 1) if count > 1 else torch.nan
    return Ensemble(mean, (more * squares.clamp(min=0)).sqrt() / total)


def _part_weights(weights: Iterable[float]) -> list[float]:
    found = [float(w) for w in weights]
    if not all(0 < w < float("inf") for w in found):
        raise ValueError(f"ensemble: weights must be positive numbers, one a part, got {found}")
    return found


def influence(
    model: nn.Module,
    train_loader: Iterable,
    query_loader: Iterable,
    loss_fn: LossFn,
    compression: Compression | None = None,
    damping: float = 0.1,
    *,
    mode: str = "activations",
    progress: bool = True,
    fisher: str = "empirical",
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
        fisher: what F is made of: "empirical", the training rows themselves; "sampled", rows of
            labels drawn from the model (`losses.sampled`), the Fisher matrix in expectation;
            "gauss-newton", rows of the outputs (`losses.gauss_newton`), the Gauss-Newton matrix,
            which for a squared error of one output is exact. These two need a loss_fn of
            `dropinf.losses`, or made with `losses.likelihood`, and read train_loader twice.

    Returns:
        scores [m, n], see `scores`.

    Raises:
        ValueError: `fisher` is none of these, or loss_fn does not say what the outputs are.
    """
    curvature = _curvature_loss(fisher, loss_fn)
    plan = Plan.make(model, Dropout(r=1024) if compression is None else compression)

    def rows(loader: Iterable, loss: LossFn, label: str) -> RowStore:
        return collect(model, loader, loss, plan, mode=mode, progress=progress and label)

    store = rows(train_loader, loss_fn, "train rows")
    fitted = store if curvature is None else rows(train_loader, curvature, "curvature rows")
    queries = rows(query_loader, loss_fn, "query rows")
    return scores(queries, store, Cholesky(damping).fit(fitted))


def _curvature_loss(fisher: str, loss_fn: LossFn) -> LossFn | None:
    """What makes the rows of F; None for the training rows."""
    kinds = {"empirical": None, "sampled": losses.sampled, "gauss-newton": losses.gauss_newton}
    if fisher not in kinds:
        raise ValueError(f"influence: fisher must be one of {list(kinds)}, got {fisher!r}")
    return None if kinds[fisher] is None else kinds[fisher](loss_fn)


def _ids_at(store: RowStore, indices: Tensor, valid: Tensor) -> Any:
    own = store.ids
    if isinstance(own, Tensor):
        found = own[indices.cpu().where(valid[:, None], 0)]
        found[~valid] = _NOWHERE
        return found
    return [[None if i == _NOWHERE else own[i] for i in row] for row in indices.tolist()]


def _factors(
    op: str, store: RowStore, solver: Solver, relative: bool, weights: str
) -> Tensor | None:
    """[n] factors of the training rows' scores, None for one each."""
    if not relative:
        parts = [solver.scale(chunk) for _, chunk in store.chunks()]
        return None if not parts or parts[0] is None else torch.cat(parts)
    if solver.scale(store.at([0])) is not None:
        raise ValueError(f"{op}: relative=True with cosine=True would normalise twice; take one")
    own = self_influence(store, solver, weights=weights)
    if (own < 0).any():
        at = int((own < 0).nonzero()[0])
        raise ValueError(
            f"{op}: the self-influence of example {at} is {float(own[at]):.3g}, which no positive "
            "definite inverse gives; raise the solver's accuracy or its damping"
        )
    return torch.where(own == 0, 0.0, own.rsqrt())  # a row of zeros has scores of zero
