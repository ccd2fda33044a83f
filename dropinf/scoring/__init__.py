"""Scores of training examples for queries."""

from dropinf.scoring.query_scores import ensemble, influence, scores, self_influence, topk

__all__ = ["ensemble", "influence", "scores", "self_influence", "topk"]
