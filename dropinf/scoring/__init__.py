"""Scores of training examples for queries."""

from dropinf.scoring.between_masks import Agreement, agreement
from dropinf.scoring.by_size import Stability, stability
from dropinf.scoring.ensembles import ensemble
from dropinf.scoring.influences import influence
from dropinf.scoring.one_query import mean_query
from dropinf.scoring.query_scores import scores, self_influence, topk
from dropinf.scoring.updates import optimizer_updates

__all__ = [
    "Agreement",
    "Stability",
    "agreement",
    "ensemble",
    "influence",
    "mean_query",
    "optimizer_updates",
    "scores",
    "self_influence",
    "stability",
    "topk",
]
