"""Scores [m, n] of m queries against n training examples, and the largest k of each query."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dropinf import ops
from dropinf.rows import (
    PART_BYTES,
    RowStore,
    Together,
    device_of,
    identity_of,
    kept_beside,
    mark_invalid,
    products,
    ranks_together,
    solved_for,
    valid_rows,
)
from dropinf.scoring.by_layer import layer_products
from dropinf.solvers import Solver, need_solver

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
    empirical Fisher matrix (see `solvers.Solver.fit`). Inside of `over_ranks` each rank scores its
    share of the training rows, and has all scores in the end.

        scores = dropinf.scores(asked, store, solver)  # [m, n]

    Args:
        queries: m rows.
        store: n training rows under the same plan.
        solver: fitted, usually on `store`.
        relative: divide by the square root of each training example's self-influence, so that
            outliers with large gradients do not come first for every query (RelatIF, arXiv
            2003.11630, section 4.2, l-relative influence); this does solve for the training rows,
            see `self_influence`.
        weights: "any" takes rows of other weights than the queries' or the solver's, which are an
            error otherwise.
        by: "layer" gives each layer's part of the score, [L, m, n], in the order of
            `store.plan.blocks`; they add up to the scores.

    Returns:
        [m, n] in the rows' dtype, of the ids `queries.ids` and `store.ids`; NaN where the query or
        the training row is invalid. Rows of tokens (`collect(per="token")`) on either side give
        scores of tokens, which add up to their examples'; `origin` says whose each is. They are on
        the GPU where rows of the queries or of the store are, which makes them, or on the CPU.

    Raises:
        TypeError: an argument is of another kind, as where two were swapped.
        ValueError: the three were not made under the same plan or weights, a self-influence is
            negative, or a score is beyond the range of the rows' dtype.
    """
    if by not in (None, "layer"):
        raise ValueError(
            f"scores: by must be 'layer' or None, got {by!r}; scores of tokens are of rows that "
            "were collected with per='token'"
        )
    need_solver("scores", solver)
    solver.check_plans("scores", queries, store, weights)
    _refuse_updates("scores", queries)
    ranks, own = _shared("scores", store, solver, queries, relative=relative, by=by)
    solved = solved_for(queries.rows.to(device_of(queries, store)), store, solver.solve)
    result = (products if by is None else layer_products)(solved, own).to(queries.read_dtype)
    factors = _factors("scores", own, solver, relative)
    if factors is not None:
        result *= factors.to(result.device)
    valid = queries.valid[:, None], own.valid
    solver.check_scores("scores", result, valid, lambda *at: (solved[at[-2]], own.at([at[-1]])[0]))
    result = mark_invalid(result, queries, own)
    return result if ranks is None else ranks.joined(result)


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

    Inside of `over_ranks` each rank takes those of its share of the training rows, and has the
    largest of all in the end.

        values, indices = dropinf.topk(asked, store, solver, k=5)  # [m, 5] each

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
        Values and indices are where `scores` would be; ids are on the CPU.

    Raises:
        TypeError: an argument is of another kind, as where two were swapped.
        ValueError: as in `scores`, or k is out of range.
    """
    need_solver("topk", solver)
    solver.check_plans("topk", queries, store, weights)
    _refuse_updates("topk", queries)
    num_valid = int(store.valid.sum())
    if not 1 <= k <= num_valid:
        raise ValueError(f"topk: k must be 1 to {num_valid}, the valid rows of the store, got {k}")
    ranks, own = _shared("topk", store, solver, queries, relative=relative, k=k, largest=largest)
    solved = solved_for(queries.rows.to(device_of(queries, store)), store, solver.solve)
    if not largest:
        solved = -solved
    values, indices = _largest_of(own, solved, k, _factors("topk", own, solver, relative))
    if ranks is not None:
        # Of equal ones the earlier row is first, as in one process.
        found, order = ranks.joined(values).sort(dim=1, descending=True, stable=True)
        values, indices = found[:, :k], ranks.joined(indices).gather(1, order[:, :k])
    values = values.to(queries.read_dtype)

    def terms(q: int, at: int) -> tuple[Tensor, Tensor]:
        entered = indices[q][indices[q] >= 0].cpu()
        left = store.valid.clone()
        left[entered] = False
        # A score of -inf never enters; then all that are left have it.
        row = entered[at] if at < len(entered) else left.nonzero()[0, 0]
        return solved[q], store.at(row[None])[0]

    solver.check_scores("topk", values, (queries.valid[:, None],), terms)
    if not largest:
        values = -values
    values[~queries.valid] = torch.nan
    indices[~queries.valid] = _NOWHERE
    return values, _ids_at(store, indices, queries.valid) if ids else indices


def _largest_of(
    store: RowStore, solved: Tensor, k: int, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Values and positions of the k largest scores, or of all valid rows if these are fewer."""
    num_valid = int(store.valid.sum())
    k = min(k, num_valid)
    values = solved.new_full((len(solved), k), -torch.inf)
    indices = torch.full((len(solved), k), -1, device=solved.device)
    for start, numbers, scales in kept_beside(store, solved) if k else ():
        part = slice(start, start + len(numbers))
        ops.score_topk(
            solved,
            numbers,
            values,
            indices,
            scales=scales,
            offsets=store.bounds,
            first=store.begins + start,
            factors=None if factors is None else factors[part].to(solved),
            valid=None if num_valid == len(store) else store.valid[part].to(solved.device),
        )
        del numbers, scales
    return values, indices


def self_influence(store: RowStore, solver: Solver, *, weights: str = "same") -> Tensor:
    """[n]: scores[i, i] of every training example, without forming [n, n].

    Large for what a model fits with few other examples: memorised, mislabelled, rare. Solves for
    all n rows, as many at a time as have room within the solver's `max_bytes`, or else in 256 MB;
    `weights` is as in `scores`. Inside of `over_ranks` each rank does so for its share of them, and
    has all in the end.

        own = dropinf.self_influence(store, solver)  # [n]

    Returns:
        [n] in the rows' dtype, on their device; NaN where the row is invalid.

    Raises:
        TypeError: an argument is of another kind, as where two were swapped.
        ValueError: store and solver were not made under the same plan, a self-influence is
            beyond the range of the rows' dtype, or a row takes more than `max_bytes`.
    """
    need_solver("self_influence", solver)
    solver.check_plans("self_influence", store, store, weights)
    ranks, own = _shared("self_influence", store, solver)
    found = _own_influence(own, solver)
    return found if ranks is None else ranks.joined(found)


def _own_influence(store: RowStore, solver: Solver) -> Tensor:
    # A quarter is for the rows: two parts in memory, or one and its solutions, in float64.
    room, R = solver.room("self_influence", whole_store=True), store.plan.width
    here, there = room.share(1 / 4), room.share(3 / 4)
    here.need(f"a row of width R={R}", 24 * R)
    solve = partial(solver.solve_within, room=there)
    parts = []
    for rows in valid_rows(store, part_bytes=here.count(24 * R) * R * 4):
        solved = solved_for(rows, store, solve, min(PART_BYTES, int(there.num_bytes / 2)))
        own = (solved * rows).sum(1).to(rows.dtype)
        scale = solver.scale(rows)
        parts.append(own if scale is None else own * scale)
        solver.check_scores(
            "self_influence", parts[-1], (), lambda i, x=solved, g=rows: (x[i], g[i])
        )
    result = torch.full((len(store),), torch.nan, dtype=store.read_dtype, device=store.device)
    if parts:
        result[store.valid] = torch.cat(parts)
    return result


def _ids_at(store: RowStore, indices: Tensor, valid: Tensor) -> Any:
    own = store.ids
    if isinstance(own, Tensor):
        found = own[indices.cpu().where(valid[:, None], 0)]
        found[~valid] = _NOWHERE
        return found
    return [[None if i == _NOWHERE else own[i] for i in row] for row in indices.tolist()]


def _shared(
    op: str, store: RowStore, solver: Solver, queries: RowStore | None = None, **arguments: Any
) -> tuple[Together | None, RowStore]:
    """The ranks of `over_ranks` and this one's rows; else None and the store."""
    ranks = ranks_together()
    if ranks is None:
        return None, store
    about = {"arguments": arguments, "solver": repr(solver)}
    for name, of in (("store", store), ("queries", queries), ("fit", solver.store)):
        if of is not None:
            about |= {f"{what} of the {name}": value for what, value in identity_of(of).items()}
    ranks.agree(op, about)
    return ranks, ranks.share_of(store)


def _factors(op: str, store: RowStore, solver: Solver, relative: bool) -> Tensor | None:
    """[n] factors of the training rows' scores, None for one each."""
    scaled = len(store) > 0 and solver.scale(torch.empty(0, store.plan.width)) is not None
    if not relative:
        return torch.cat([solver.scale(chunk) for _, chunk in store.chunks()]) if scaled else None
    if scaled:
        raise ValueError(f"{op}: relative=True with cosine=True would normalise twice; take one")
    own = _own_influence(store, solver)
    if (own < 0).any():
        at = int((own < 0).nonzero()[0])
        raise ValueError(
            f"{op}: the self-influence of example {store.begins + at} is {float(own[at]):.3g}, "
            "which no positive definite inverse gives; raise the solver's accuracy or its damping"
        )
    return torch.where(own == 0, 0.0, own.rsqrt())  # a row of zeros has scores of zero


def _refuse_updates(op: str, queries: RowStore) -> None:
    """Of an update there is no change of a loss."""
    if queries.updates is not None:
        raise ValueError(
            f"{op}: the queries are updates (of {queries.updates}); collect them as gradients, "
            "without updates="
        )
