"""Are scores right? Against models that are trained anew, wrong labels, and known sources."""

from dropinf.evaluate.datamodels import lds
from dropinf.evaluate.estimates import Estimate
from dropinf.evaluate.labels import mislabeled_auc
from dropinf.evaluate.retraining import retrain
from dropinf.evaluate.sources import Recall, recall
from dropinf.evaluate.subsets import halves, random_subsets, without

__all__ = [
    "Estimate",
    "Recall",
    "halves",
    "lds",
    "mislabeled_auc",
    "random_subsets",
    "recall",
    "retrain",
    "without",
]
