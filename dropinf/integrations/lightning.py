"""Lightning: rows from a `lightning.Trainer`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dropinf.compression import Plan
from dropinf.integrations.training import TrainingRows, in_order, rows_after, why_not_ranks
from dropinf.integrations.versions import tested
from dropinf.rows import LossFn, RowStore

with tested("lightning", "2.6"):
    from lightning import Callback
    from lightning.pytorch.strategies import DDPStrategy


class InfluenceCallback(Callback):
    """Rows of the training examples of a `lightning.Trainer`.

        callback = InfluenceCallback(plan, loss_fn, path="rows")
        lightning.Trainer(callbacks=[callback]).fit(module, loader)
        callback.store

    Rows are of each example's own loss in eval mode (without dropout), in a pass of their own.
    Training goes on as without the callback, to the bit.

    Args:
        plan: of the LightningModule.
        loss_fn: (module, batch) -> [B], one loss per example.
        path: a directory to make for the rows; None keeps them in memory. Several processes
            (strategy="ddp") need one, in a file system that all see, and write one store.
        when: "after" collects every example of the training data set once, in its order, when
            training has ended; "during" collects each batch as it comes, with the weights of that
            step, and `store.origin` [n, 2] says the step and the example, -1 without `index`;
            with it, that is the row's id too.
        index: batch -> [B] integers, the positions of its examples in the data set, which has to
            give them with each example, since Lightning does not say what its loaders drew.
        options: of `dropinf.collect`: mode, on_nonfinite, check, backend, batch_dim.

    Attributes:
        store: the rows, once training has ended.
    """

    def __init__(
        self,
        plan: Plan,
        loss_fn: LossFn,
        path: str | os.PathLike | None = None,
        when: str = "after",
        index: Callable[[Any], Tensor] | None = None,
        **options: Any,
    ) -> None:
        if when not in ("after", "during"):
            raise ValueError(f"InfluenceCallback: when must be 'after' or 'during', got {when!r}")
        if index is not None and when == "after":
            raise ValueError(
                "InfluenceCallback: index= goes with when='during'; rows after training are in the "
                "order of the data set"
            )
        self.plan, self.loss_fn, self.path, self.when = plan, loss_fn, path, when
        self.index, self.options = index, options
        self.store: RowStore | None = None
        self._rows: TrainingRows | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what gives no rows before training, and begin with them if "during"."""
        self.store = None
        _refuse_training(trainer, self.when, self.path)
        if self.when == "during":
            self._rows = TrainingRows(pl_module, self.plan, self.path, self.loss_fn, self.options)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """The rows of a batch that is on its device, before the step takes it."""
        if self._rows is not None:
            self._rows.add(batch, trainer.global_step, lambda n: self._positions(batch, n))

    def _positions(self, batch: Any, num_rows: int) -> list[int]:
        if self.index is None:
            return [-1] * num_rows
        found = torch.as_tensor(self.index(batch))
        if found.shape != (num_rows,) or found.dtype.is_floating_point:
            raise ValueError(
                f"InfluenceCallback: index must give an integer for each of {num_rows} examples, "
                f"got {found.dtype} {tuple(found.shape)}"
            )
        return found.tolist()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the rows in `store`."""
        if self._rows is not None:
            rows, self._rows = self._rows, None
            self.store = rows.finish()
            return
        given = trainer.train_dataloader
        loader = in_order(given, trainer.strategy.batch_to_device, given.batch_size)
        self.store = rows_after(pl_module, loader, self.loss_fn, self.plan, self.path, self.options)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the rows of a training that stopped with an error; `path` has those so far."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None


def _refuse_training(trainer: Any, when: str, path: str | os.PathLike | None) -> None:
    """Refuse a Trainer whose examples or weights the callback cannot reach."""
    loader, strategy = trainer.train_dataloader, type(trainer.strategy)
    if trainer.world_size > 1 and strategy is not DDPStrategy:
        why = (
            f"under {strategy.__name__} no process may have the whole module; of several "
            "processes, only DDPStrategy is taken: load the trained module on one device and call "
            "dropinf.collect"
        )
    elif trainer.precision != "32-true":
        why = (
            f"precision {trainer.precision!r} is not taken, only '32-true'; call dropinf.collect "
            "on the trained module, under torch.autocast"
        )
    elif when == "after" and not (isinstance(loader, DataLoader) and loader.batch_size):
        why = (
            f"when='after' needs one DataLoader with a batch_size, got {type(loader).__name__}; "
            "use when='during', or dropinf.collect after training"
        )
    elif trainer.world_size > 1 and (refused := why_not_ranks(loader, when, path)):
        why = refused
    else:
        return
    raise ValueError(f"InfluenceCallback: {why}")
