"""Are scores right? Against models that are trained anew, wrong labels, and known sources."""

from dropinf.evaluate.datamodels import lds
from dropinf.evaluate.estimates import Estimate
from dropinf.evaluate.labels import mislabeled_auc
from dropinf.evaluate.left_out import LeaveOneOut, leave_one_out
from dropinf.evaluate.lexical import bm25
from dropinf.evaluate.removals import Removal, removal
from dropinf.evaluate.retraining import retrain
from dropinf.evaluate.sources import Recall, recall
from dropinf.evaluate.subsets import halves, random_subsets, without

__all__ = [
    "Estimate",
    "LeaveOneOut",
    "Recall",
    "Removal",
    "bm25",
    "halves",
    "lds",
    "leave_one_out",
    "mislabeled_auc",
    "random_subsets",
    "recall",
    "removal",
    "retrain",
    "without",
]
