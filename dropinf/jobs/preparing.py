"""A job made ready: its model, loss and data, of a directory or of a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dropinf.jobs.entry import ready_of
from dropinf.jobs.examples import Examples
from dropinf.jobs.job import Job


@dataclass
class Ready:
    """What `prepare` gives.

    Attributes:
        model: in eval mode on its device, if it is of a directory; else as the function gave it.
        loss_fn: (model, batch) -> [B].
        train, queries: `queries` may be None.
        notes: sentences that people should read, as of examples that were cut.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    train: Examples
    queries: Examples | None = None
    notes: list[str] = None


def prepare(job: Job) -> Ready:
    """Load the model, the tokenizer and the data of a job; nothing comes from a network.

    Raises:
        FileNotFoundError: a file or directory is not there.
        ValueError: anything else is wrong, in one sentence.
    """
    raise NotImplementedError
