"""Jobs: a model, data and a loss that come of flags or one file, without a line of Python."""

from dropinf.jobs.estimating import CARDS, Estimate, estimate, largest_batch, token_batch

__all__ = ["CARDS", "Estimate", "estimate", "largest_batch", "token_batch"]
