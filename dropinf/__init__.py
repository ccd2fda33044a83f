"""dropinf: dropout gradient compression for influence functions (arXiv 2509.15651)."""

from dropinf import ops, solvers
from dropinf.capturing import capture
from dropinf.collecting import collect
from dropinf.compress import Dropout, Full
from dropinf.dispatch import BackendError, backends
from dropinf.plan import Plan
from dropinf.scoring import influence, scores, topk
from dropinf.store import RowStore

__all__ = [
    "BackendError",
    "Dropout",
    "Full",
    "Plan",
    "RowStore",
    "backends",
    "capture",
    "collect",
    "influence",
    "ops",
    "scores",
    "solvers",
    "topk",
]
