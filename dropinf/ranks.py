"""Ranks, for Spearman's correlation between two sets of scores."""

from __future__ import annotations

import torch
from torch import Tensor


def standard_ranks(scores: Tensor) -> Tensor:
    """[..., n] numbers -> their ranks in the last dimension, float64, of mean 0 and mean square 1.

    The mean of the product of two is Spearman's rank correlation. Ties share their mean rank; where
    all tie there are zeros, which agree with nothing.
    """
    scores = scores.contiguous()
    ordered = scores.sort(-1).values
    below = torch.searchsorted(ordered, scores)
    ranks = (below + torch.searchsorted(ordered, scores, right=True)).double()
    ranks -= ranks.mean(-1, keepdim=True)
    size = ranks.square().mean(-1, keepdim=True).sqrt()
    return torch.where(size > 0, ranks / size, 0.0)
