"""What the callbacks of Trainers share: rows beside training that leave no trace in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dropinf.compression import Plan
from dropinf.rows import Collection, LossFn, RowStore


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
    set, -1 where that is not known; ids are those positions, if the first batch knows its own.

    The capture is opened for each batch, and closed when training goes on: open, it would take
    requires_grad from parameters that are not in the plan, and compiled code from the training.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        path: str | os.PathLike | None,
        loss_fn: LossFn,
        options: dict[str, Any],
    ) -> None:
        self._model = model
        self._open = ExitStack()  # from here to `close`, over many calls
        with torch.enable_grad():
            self._collection = Collection(model, loss_fn, plan, path, trained=True, **options)
        self._open.enter_context(self._collection)

    def add(self, batch: Any, step: int, positions: Callable[[int], list[int]]) -> None:
        """The rows of a batch; of several batches in one step, each adds its own.

        Args:
            batch: what `loss_fn` takes.
            step: the training step.
            positions: number of rows -> of each, where the data set has its example.
        """

        def origin(num_rows: int) -> Tensor:
            examples = torch.tensor(positions(num_rows), dtype=torch.int64)
            return torch.stack([torch.full_like(examples, step), examples], 1)

        with undisturbed(self._model), self._collection.capturing():
            self._collection.add(batch, origin)

    def finish(self) -> RowStore:
        """The store of all rows."""
        try:
            if not self._collection.num_rows:
                raise ValueError("InfluenceCallback: the training saw no batch, so there is no row")
            return self._collection.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Leave a store of the rows so far, if there is a path."""
        self._open.close()
