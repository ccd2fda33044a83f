"""dropinf: dropout gradient compression for influence functions (arXiv 2509.15651)."""

from dropinf import ops, solvers
from dropinf.baselines import FJLT, SJLT, Gaussian, LoGra, Rademacher
from dropinf.capturing import capture
from dropinf.collecting import collect
from dropinf.compress import Dropout, FactoredDropout, Full, Sketch
from dropinf.dampings import choose_damping
from dropinf.dispatch import BackendError, backends
from dropinf.plan import Plan
from dropinf.projector import DropoutProjector
from dropinf.scoring import ensemble, influence, scores, self_influence, topk
from dropinf.store import RowStore

__version__ = "0.1.0"  # pyproject.toml reads it here, so that a checkout has it too

__all__ = [
    "FJLT",
    "SJLT",
    "BackendError",
    "Dropout",
    "DropoutProjector",
    "FactoredDropout",
    "Full",
    "Gaussian",
    "LoGra",
    "Plan",
    "Rademacher",
    "RowStore",
    "Sketch",
    "backends",
    "capture",
    "choose_damping",
    "collect",
    "ensemble",
    "influence",
    "ops",
    "scores",
    "self_influence",
    "solvers",
    "topk",
]
