"""Scores of training examples for queries."""

from dropinf.scoring.one_query import mean_query
from dropinf.scoring.query_scores import ensemble, influence, scores, self_influence, topk
from dropinf.scoring.updates import optimizer_updates

__all__ = [
    "ensemble",
    "influence",
    "mean_query",
    "optimizer_updates",
    "scores",
    "self_influence",
    "topk",
]
