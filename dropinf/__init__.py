"""dropinf: dropout gradient compression for influence functions (arXiv 2509.15651)."""

from dropinf import evaluate, losses, ops, solvers
from dropinf.capturing import ProofError, capture, keeps_examples, verify
from dropinf.compression import (
    FJLT,
    SJLT,
    Dropout,
    DropoutProjector,
    Energies,
    FactoredDropout,
    Full,
    Gaussian,
    LoGra,
    Plan,
    Rademacher,
    Sketch,
    energies_from_adam,
)
from dropinf.ops import BackendError, backends
from dropinf.reporting import write_report
from dropinf.results import Attribution, ScoreTable, attribute
from dropinf.rows import LockedError, RowStore, collect, energies, over_ranks, split
from dropinf.scoring import (
    agreement,
    ensemble,
    influence,
    mean_query,
    optimizer_updates,
    scores,
    self_influence,
    stability,
    topk,
)
from dropinf.solvers import choose_damping
from dropinf.version import __version__ as __version__

__all__ = [
    "FJLT",
    "SJLT",
    "Attribution",
    "BackendError",
    "Dropout",
    "DropoutProjector",
    "Energies",
    "FactoredDropout",
    "Full",
    "Gaussian",
    "LoGra",
    "LockedError",
    "Plan",
    "ProofError",
    "Rademacher",
    "RowStore",
    "ScoreTable",
    "Sketch",
    "agreement",
    "attribute",
    "backends",
    "capture",
    "choose_damping",
    "collect",
    "energies",
    "energies_from_adam",
    "ensemble",
    "evaluate",
    "influence",
    "keeps_examples",
    "losses",
    "mean_query",
    "ops",
    "optimizer_updates",
    "over_ranks",
    "scores",
    "self_influence",
    "solvers",
    "split",
    "stability",
    "topk",
    "verify",
    "write_report",
]
