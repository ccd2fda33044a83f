"""Scores of training examples for queries."""

from dropinf.scoring.ensembles import ensemble
from dropinf.scoring.influences import influence
from dropinf.scoring.one_query import mean_query
from dropinf.scoring.query_scores import scores, self_influence, topk
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
