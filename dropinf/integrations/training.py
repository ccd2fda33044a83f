"""What the callbacks of Trainers share: rows beside training that leave no trace in it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dropinf.compression import Plan
from dropinf.rows import LossFn, RowStore, RowWriter, collect


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients; afterwards modes and torch's random numbers are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def in_order(loader: Any, to_device: Callable[[Any], Any], batch_size: int) -> DataLoader:
    """The data set of a training loader in its own order, every example once, in this process."""
    collate = loader.collate_fn
    return DataLoader(
        loader.dataset, batch_size, collate_fn=lambda examples: to_device(collate(examples))
    )


class TrainingRows:
    """Rows of one batch after the other, each with the weights that the model has just then.

    `RowStore.origin` says of each row the training step and the example's position in the data
    set, -1 where that is not known.
    """

    def __init__(
        self, plan: Plan, path: str | os.PathLike | None, loss_fn: LossFn, options: dict[str, Any]
    ) -> None:
        self._plan, self._loss_fn, self._options = plan, loss_fn, options
        self._open = ExitStack()  # from here to `close`, over many calls
        self._writer = self._open.enter_context(RowWriter(plan, path))

    def add(
        self, model: nn.Module, batch: Any, step: int, positions: Callable[[int], list[int]]
    ) -> None:
        """The rows of a batch; of several batches in one step, each adds its own.

        Args:
            model: as it is at this step.
            batch: what `loss_fn` takes.
            step: the training step.
            positions: number of rows -> of each, where the data set has its example.
        """
        options = {"check": self._writer.num_rows == 0, "progress": False} | self._options
        with undisturbed(model), warnings.catch_warnings():
            # An expert that no token of one batch met is no news.
            warnings.filterwarnings("ignore", "collect: no example had a gradient")
            store = collect(model, [batch], self._loss_fn, self._plan, **options)
        examples = torch.tensor(positions(len(store)), dtype=torch.int64)
        origin = torch.stack([torch.full_like(examples, step), examples], 1)
        self._writer.append(store.rows, store.valid, origin)

    def finish(self) -> RowStore:
        """The store of all rows."""
        try:
            if not self._writer.num_rows:
                raise ValueError("InfluenceCallback: the training saw no batch, so there is no row")
            return self._writer.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Leave nothing half-written."""
        self._open.close()
