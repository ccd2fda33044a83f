"""What the callbacks of Trainers share: rows beside training that leave no trace in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, IterableDataset

from dropinf.compression import Plan
from dropinf.rows import Collection, LossFn, RowStore, collect, split
from dropinf.world import World, in_group

_TIMEOUT = 600.0  # seconds, as of `collect`


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


def why_not_ranks(loader: DataLoader, when: str, path: str | os.PathLike | None) -> str | None:
    """Why several processes cannot write the rows of a training, None if they can."""
    if path is None:
        return (
            "several processes write one store; give path=, in a file system that all of them see"
        )
    if when == "after" and isinstance(loader.dataset, IterableDataset):
        return (
            "the examples of an IterableDataset cannot be shared out again; use when='during', or "
            "dropinf.collect after training"
        )
    return None


def rows_after(
    model: nn.Module,
    loader: DataLoader,
    loss_fn: LossFn,
    plan: Plan,
    path: str | os.PathLike | None,
    options: dict[str, Any],
) -> RowStore:
    """Rows of what `in_order` gave, of a model that was trained; its ranks share them out."""
    if in_group():
        loader = split(loader)
    with undisturbed(model), _buffers_of_rank_0(model):
        return collect(model, loader, loss_fn, plan, path, **options)


@contextmanager
def _buffers_of_rank_0(model: nn.Module) -> Iterator[None]:
    """Meanwhile all ranks have rank 0's buffers; in training each has its own, as of BatchNorm."""
    own = [(buffer, buffer.clone()) for buffer in model.buffers()] if in_group() else []
    try:
        for buffer, kept in own:
            shared = kept.clone(memory_format=torch.contiguous_format)
            distributed.broadcast(shared.reshape(-1).view(torch.uint8), 0)
            buffer.copy_(shared)
        yield
    finally:
        for buffer, kept in own:
            buffer.copy_(kept)


class TrainingRows:
    """Rows of one batch after the other, each with the weights that the model has just then.

    Several ranks write one store, each the batches that it has.

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
        options = dict(options)
        timeout = options.pop("timeout", _TIMEOUT)
        self._world = World("InfluenceCallback", timeout) if in_group() else None
        if self._world is not None:
            self._open.enter_context(self._world)
        with torch.enable_grad():
            self._collection = Collection(
                model, loss_fn, plan, path, trained=True, world=self._world, **options
            )
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
        with self._open:
            if self._world is None and not self._collection.num_rows:
                raise ValueError("InfluenceCallback: the training saw no batch, so there is no row")
            return self._collection.finish()

    def close(self) -> None:
        """Leave a store of the rows so far, if there is a path."""
        self._open.close()
