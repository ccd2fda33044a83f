"""How to choose the damping: by what agrees over masks, or by a measure of the user's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dropinf.ranks import standard_ranks
from dropinf.rows import RowStore
from dropinf.solvers.cholesky import Cholesky
from dropinf.solvers.eigen import Eigen
from dropinf.user_warning import warn_user


class DampingChoice(NamedTuple):
    """What `choose_damping` returns; one value and error for each damping, in their order."""

    damping: float
    values: Tensor  # [k] float64, larger is better
    errors: Tensor  # [k] float64, standard errors


def choose_damping(
    dampings: Sequence[float],
    parts: Sequence[tuple[RowStore, RowStore, Cholesky | Eigen]],
    metric: Callable[[Tensor], float] | None = None,
) -> DampingChoice:
    """Pick a damping by held-out consistency over masks, or by a metric.

    Without a metric: the scores of each held-out query order the training examples; a damping is
    worth the Spearman correlation of that order between two masks (`Dropout(seed=)`), the mean over
    queries and pairs of masks. What a mask makes up differs from mask to mask; what the gradients
    say does not. Too small a damping inverts the noise of the sample, and the masks disagree.
    Too large a one is consistent too, as all scores become dot products. So the smallest damping is
    taken that is within one standard error (over the queries) of the best. With a measure of what
    you want the scores for (labels that are known to be wrong, retrained models), give `metric`.

    Args:
        dampings: k numbers to choose from, of the kind that the solvers take (relative or not).
        parts: (queries, store, solver) of each mask: the same held-out queries and training
            examples under plans that differ in their seed; each solver fitted on its store.
        metric: scores [m, n] -> a number, larger is better; the best mean over the parts wins.

    Returns:
        The damping, with a warning if it is the smallest or largest given; values [k] and their
        standard errors [k] (over queries; with a metric over parts, NaN for one part). Holds
        k x m x n scores of every part at once.

    Raises:
        ValueError: no damping, fewer than two masks without a metric, or parts that differ.
    """
    if not dampings:
        raise ValueError("choose_damping: no dampings were given")
    if not parts or (metric is None and len(parts) < 2):
        raise ValueError(
            f"choose_damping: need (queries, store, solver) of two masks or more, got "
            f"{len(parts)}; collect with Dropout(seed=0), Dropout(seed=1), ..., or give metric="
        )
    if metric is None and len({store.plan.fingerprint for _, store, _ in parts}) < len(parts):
        raise ValueError(
            "choose_damping: two parts have the same plan, so they agree at any damping; collect "
            "them with another seed"
        )
    found = [solver.sweep(dampings, queries, store) for queries, store, solver in parts]
    if len({scores.shape for scores in found}) > 1:
        shapes = [list(scores.shape[1:]) for scores in found]
        raise ValueError(f"choose_damping: the parts differ in queries or examples: {shapes}")
    if metric is not None:
        each = torch.tensor([[float(metric(s)) for s in scores] for scores in found]).double()
    else:
        ranks = [_ranks(scores) for scores in found]
        agreement = [(a * b).mean(-1) for a, b in itertools.combinations(ranks, 2)]  # [k, m]
        each = torch.stack(agreement).mean(0).T  # [m, k]
    values = each.mean(0)
    errors = each.std(0) / len(each) ** 0.5 if len(each) > 1 else torch.full_like(values, torch.nan)
    best = int(values.argmax())
    if metric is None and len(each) > 1:
        near = values >= values[best] - errors[best]
        best = min(near.nonzero().flatten().tolist(), key=lambda j: dampings[j])
    if len(dampings) > 1 and dampings[best] in (min(dampings), max(dampings)):
        warn_user(
            f"choose_damping: {dampings[best]:g} is at the end of the dampings given; give some "
            "beyond it, as the best may be there"
        )
    return DampingChoice(float(dampings[best]), values, errors)


def _ranks(scores: Tensor) -> Tensor:
    """[k, m, n] -> ranks over the valid training examples, of the valid queries."""
    valid_rows = ~scores[0].isnan().all(0)
    valid_queries = ~scores[0].isnan().all(1)
    return standard_ranks(scores[:, valid_queries][:, :, valid_rows])
