"""Agreement between masks: how far scores are the model's, and how far the mask's."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from dropinf.ranks import standard_ranks
from dropinf.rows import Ids, RowStore
from dropinf.rows import ids as id_lists
from dropinf.scoring.query_scores import scores
from dropinf.solvers import Solver, triples


class Agreement(NamedTuple):
    """What `agreement` returns; errors are standard errors over the queries, NaN for one query."""

    correlation: float  # Spearman's, over the training examples
    correlation_error: float
    overlap: float  # the share of a query's k largest that two masks have in common
    overlap_error: float


def agreement(
    parts: Iterable[tuple[RowStore, RowStore, Solver]], k: int = 10, *, weights: str = "same"
) -> Agreement:
    """How alike the scores of several masks are.

    Each value is the mean over queries and over pairs of masks. What a mask makes up differs from
    mask to mask, so that a top text on which two masks do not agree is not the model's yet: take a
    larger r, or average over masks (`ensemble`).

        print(dropinf.agreement(parts, k=10))  # parts: two masks or more

    Args:
        parts: (queries, store, solver) of two masks or more, of the same queries and training
            examples by their ids (of another order, as of a loader that shuffles, it is seen to),
            under plans that differ in their seed.
        k: of the top-k; all valid rows if there are fewer.
        weights: as in `scores`.

    Raises:
        TypeError: a part is something else.
        ValueError: there are fewer than two masks, two are the same, or they differ in queries or
            training examples; k is not positive.
    """
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"agreement: k must be positive, got {k!r}")
    plans, found = set(), []
    ids: list[list[Ids]] = []  # of queries and of examples
    for queries, store, solver in triples("agreement", parts):
        if store.plan.fingerprint in plans:
            raise ValueError(
                "agreement: two parts have the same plan, so they agree at any r; collect them "
                "with another seed"
            )
        plans.add(store.plan.fingerprint)
        own = scores(queries, store, solver, weights=weights)
        found.append(own.to(found[0].device) if found else own)
        ids.append([queries.ids, store.ids])
    if len(found) < 2:
        raise ValueError(
            f"agreement: need (queries, store, solver) of two masks or more, got {len(found)}; "
            "collect with Dropout(seed=0), Dropout(seed=1), ..."
        )
    if len({tuple(each.shape) for each in found}) > 1:
        shapes = [list(each.shape) for each in found]
        raise ValueError(f"agreement: the parts differ in queries or examples: {shapes}")
    found = [_as_first(each, own, ids[0]) for each, own in zip(found, ids, strict=True)]
    return _agreement(torch.stack(found), k)


def _as_first(found: Tensor, own: list[Ids], first: list[Ids]) -> Tensor:
    """Scores [m, n] with queries and examples in the order of the first part's.

    Raises:
        ValueError: they are other ones.
    """
    names = ("queries", "examples")
    for dim, (name, these, those) in enumerate(zip(names, own, first, strict=True)):
        if id_lists.same(these, those):
            continue
        here, there = id_lists.in_order(these), id_lists.in_order(those)
        if not id_lists.same(id_lists.picked(these, here), id_lists.picked(those, there)):
            raise ValueError(
                f"agreement: a part has {name} of other ids than the first; give the same ones "
                "to all"
            )
        at = torch.empty_like(here)
        at[there] = here
        found = found.index_select(dim, at.to(found.device))
    return found


def _agreement(found: Tensor, k: int) -> Agreement:
    """Of [masks, m, n] scores."""
    valid = ~found.isnan().any(0)
    kept = found[:, valid.any(1)][:, :, valid.any(0)]
    if not kept.numel():
        raise ValueError("agreement: no query and training example is valid under all masks")
    k = min(k, kept.shape[-1])
    ranks = standard_ranks(kept)
    entered = torch.zeros_like(kept, dtype=torch.bool).scatter_(-1, kept.topk(k).indices, True)
    if k < kept.shape[-1]:  # where all tie, there is no top, which would agree by its order
        entered &= (kept.amax(-1) > kept.amin(-1))[..., None]
    pairs = list(itertools.combinations(range(len(kept)), 2))
    correlations = torch.stack([(ranks[a] * ranks[b]).mean(-1) for a, b in pairs]).mean(0)
    overlaps = torch.stack([(entered[a] & entered[b]).sum(-1) / k for a, b in pairs]).mean(0)
    each = (correlations.double(), overlaps.double())
    return Agreement(*(value for of_queries in each for value in _mean_error(of_queries)))


def _mean_error(values: Tensor) -> tuple[float, float]:
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(torch.nan)
    return float(values.mean()), float(error)
