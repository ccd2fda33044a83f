"""Jobs: a model, data and a loss that come of flags or one file, without a line of Python."""

from dropinf.jobs.estimating import CARDS, Estimate, estimate, largest_batch, token_batch
from dropinf.jobs.examples import Examples
from dropinf.jobs.job import Job
from dropinf.jobs.preparing import Ready, prepare

__all__ = [
    "CARDS",
    "Estimate",
    "Examples",
    "Job",
    "Ready",
    "estimate",
    "largest_batch",
    "prepare",
    "token_batch",
]
