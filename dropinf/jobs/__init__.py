"""Jobs: a model, data and a loss that come of flags or one file, without a line of Python."""

from dropinf.jobs.examples import Examples
from dropinf.jobs.job import Job
from dropinf.jobs.preparing import Ready, prepare

__all__ = ["Examples", "Job", "Ready", "prepare"]
