"""The linear datamodeling score: do sums of scores rank retrained models?"""

from __future__ import annotations

import torch
from torch import Tensor

from dropinf.evaluate.estimates import Estimate, losses_of, mask_of, over_queries, scores_of
from dropinf.ranks import standard_ranks


def lds(scores: Tensor, members: Tensor, losses: Tensor) -> Estimate:
    """The linear datamodeling score (arXiv 2303.14186, section 2).

    For each query, Spearman's rank correlation, over the subsets, between the sum of the scores of
    a subset's members and minus the query's loss by the model that was trained on that subset. 1 if
    sums rank the models as training does, 0 by chance. Ties share their mean rank; a query whose
    sums or losses all tie has 0.

        print(dropinf.evaluate.lds(scores, members, losses))

    Args:
        scores: [m, n], positive where more of an example lowers the query's loss. Queries that are
            NaN throughout are left out; examples that are count as 0 in every sum.
        members: [h, n] bool, which examples each subset has; see `halves`.
        losses: [h, m] of the queries by each retrained model, or [seeds, h, m], of which the mean
            over seeds is taken; see `retrain`.

    Returns:
        The mean over queries; `error` over queries, `runs_error` over subsets (by the jackknife).

    Raises:
        ValueError: shapes do not agree, there are fewer than two subsets, or losses are not finite.
    """
    found, valid, _ = scores_of("lds", scores)
    m, n = found.shape
    members = mask_of("lds", "members", members, ("h", n))
    losses = losses_of("lds", "losses", losses, m).mean(0)
    if len(losses) != len(members) or len(members) < 2:
        raise ValueError(
            f"lds: members and losses must be of the same two subsets or more, got {len(members)} "
            f"and {len(losses)}"
        )
    sums = found @ members.double().T
    each = _correlations(sums, -losses.T).where(valid, torch.nan)
    return over_queries("lds", each, _jackknife(sums[valid], -losses.T[valid]))


def _correlations(a: Tensor, b: Tensor) -> Tensor:
    """[m] of [m, h]: Spearman's."""
    return (standard_ranks(a) * standard_ranks(b)).mean(-1)


def _jackknife(sums: Tensor, targets: Tensor) -> float:
    """The standard error, over subsets, of the mean correlation; NaN for fewer than three."""
    h = sums.shape[1]
    if h < 3 or not len(sums):
        return torch.nan
    without = [_without_each(a, b) for a, b in zip(sums, targets, strict=True)]
    means = torch.stack(without).mean(0)
    return float(((h - 1) * means.var(correction=0)).sqrt())


def _without_each(a: Tensor, b: Tensor) -> Tensor:
    """[h]: Spearman's correlation of a and b [h] without each of their entries.

    The rank of i, less its mean, is half the sum over k of sign(a_i - a_k), so that leaving j out
    takes sign(a_i - a_j) / 2 from it.
    """
    s, t = (torch.sign(x[:, None] - x) / 2 for x in (a, b))

    def products(s: Tensor, t: Tensor) -> Tensor:
        x, y = s.sum(1), t.sum(1)
        return x @ y - x @ t - y @ s + (s * t).sum(0) - x * y

    size = (products(s, s) * products(t, t)).sqrt()
    return torch.where(size > 0, products(s, t) / size, 0.0)
