"""captum: influence with dropout compression behind the calls of captum's TracInCP."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dropinf.compression import Compression, Plan
from dropinf.integrations.versions import tested
from dropinf.rows import RowStore, collect
from dropinf.scoring import scores, self_influence, topk
from dropinf.solvers import Cholesky, Solver

with tested("captum", "0.9"):
    from captum.influence import DataInfluence
    from captum.influence._utils.common import KMostInfluentialResults

Loss = Callable[[Tensor, Any], Tensor]  # (outputs, labels) -> losses


class DropoutInfluence(DataInfluence):
    """Influence functions on sampled gradients, called as `captum.influence.TracInCP` is.

    A batch is a tuple as captum has it: `model(*batch[:-1])` are the outputs and `batch[-1]` the
    labels. The rows of the training set are collected, and the solver fitted, when it is made.

    Attributes:
        plan: the coordinates that are kept.
        store: rows [n, R] of the training set.
        solver: fitted on them.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset | DataLoader,
        loss_fn: nn.Module | Loss,
        compression: Compression,
        *,
        solver: Solver | None = None,
        batch_size: int | None = None,
        test_loss_fn: nn.Module | Loss | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        path: str | os.PathLike | None = None,
        mode: str = "activations",
        show_progress: bool = False,
    ) -> None:
        """Collect the rows of the training set and fit the solver.

        Args:
            model: used as it is, with the parameters that it has now; there are no checkpoints.
            train_dataset: n examples, or a DataLoader of batches in a fixed order.
            loss_fn: (outputs, labels) -> [B], one loss per example; or a torch loss of
                reduction="sum", of which the summands of each example are taken. A mean is refused.
            compression: which coordinates to keep, `dropinf.Dropout(r=...)`.
            solver: not fitted yet; None is `dropinf.solvers.Cholesky()`. With
                `dropinf.solvers.Identity()` scores are TracIn's, of one checkpoint and rate 1.
            batch_size: of a Dataset, None is 32; a DataLoader has its own.
            test_loss_fn: the loss of test examples, if it is another one.
            include, exclude: the layers to track, as in `dropinf.Plan.make`.
            path: a directory to make for the rows; None keeps them in memory.
            mode: "activations" or "grads", see `dropinf.capture`.
            show_progress: show a bar over the training set.

        Raises:
            ValueError: the loss is a mean or no function, or the DataLoader shuffles; or as in
                `dropinf.collect`.
        """
        self.model, self.train_dataset, self.mode = model, train_dataset, mode
        self.loss_fn = _per_example("loss_fn", loss_fn)
        self.test_loss_fn = (
            self.loss_fn if test_loss_fn is None else _per_example("test_loss_fn", test_loss_fn)
        )
        self.train_dataloader = _loader(train_dataset, batch_size)
        self.plan = Plan.make(model, compression, include, exclude)
        self.store = self._collect(self.train_dataloader, self.loss_fn, show_progress, path)
        self.solver = (Cholesky() if solver is None else solver).fit(self.store)

    def influence(
        self,
        inputs: tuple[Any, ...] | DataLoader,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> Tensor | KMostInfluentialResults:
        """The influence of every training example on each test example, or the k largest.

        Args:
            inputs: a batch of m test examples, features and labels; or a DataLoader of batches.
            k: 1 to n; None for all.
            proponents: with k, the k of highest score, highest first; False takes the k of lowest
                score, lowest first.
            show_progress: show a bar over the test examples.
            aggregate: the sum of the scores over the test examples, as one test example.

        Returns:
            scores [m, n], m = 1 with `aggregate`; positive if more of the training example lowers
            the test example's loss. With k, KMostInfluentialResults(indices, influence_scores) of
            [m, k] each, as captum returns it.

        Raises:
            ValueError: `inputs` is no batch, or k is out of range.
        """
        asked = self._rows(inputs, self.test_loss_fn, show_progress)
        if aggregate:
            total = scores(asked, self.store, self.solver).sum(0, keepdim=True)  # [1, n]
            return total if k is None else _largest(total, k, proponents)
        if k is None:
            return scores(asked, self.store, self.solver)
        values, indices = topk(asked, self.store, self.solver, k, largest=proponents)
        return KMostInfluentialResults(indices, values)

    def self_influence(
        self, inputs: tuple[Any, ...] | DataLoader | None = None, show_progress: bool = False
    ) -> Tensor:
        """[n] the influence of each training example on itself; of `inputs`, [m], if given."""
        if inputs is None:
            return self_influence(self.store, self.solver)
        return self_influence(self._rows(inputs, self.loss_fn, show_progress), self.solver)

    def _rows(self, inputs: Any, loss_fn: Loss, show_progress: bool) -> RowStore:
        loader = inputs if isinstance(inputs, DataLoader) else [inputs]
        return self._collect(loader, loss_fn, show_progress)

    def _collect(
        self,
        loader: Iterable,
        loss_fn: Loss,
        show_progress: bool,
        path: str | os.PathLike | None = None,
    ) -> RowStore:
        def losses(model: nn.Module, batch: Any) -> Tensor:
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                raise ValueError(
                    "DropoutInfluence: a batch must be a tuple of features and labels, "
                    f"(x, labels), got {_kind(batch)}"
                )
            return loss_fn(model(*batch[:-1]), batch[-1])

        return collect(self.model, loader, losses, self.plan, path, self.mode, show_progress)


def _kind(batch: Any) -> str:
    kind = type(batch).__name__
    return f"a {kind} of {len(batch)}" if isinstance(batch, tuple | list) else f"a {kind}"


def _per_example(name: str, loss_fn: nn.Module | Loss) -> Loss:
    """`loss_fn` as one that returns a loss per example, [B]."""
    if not callable(loss_fn):
        raise ValueError(
            f"DropoutInfluence: {name} must be a loss module or a function (outputs, labels) -> "
            f"[B], got {_kind(loss_fn)}; there are no checkpoints, and a model that returns its "
            "own losses goes with lambda losses, labels: losses"
        )
    reduction = getattr(loss_fn, "reduction", "none")
    if reduction == "none":
        return loss_fn
    if reduction != "sum" or not isinstance(loss_fn, nn.Module):
        raise ValueError(
            f"DropoutInfluence: {name} must give one loss per example, got reduction="
            f"{reduction!r}, of which the examples' own losses cannot be told; give a loss module "
            "with reduction='none' or 'sum', or a function (outputs, labels) -> [B]"
        )
    unreduced = copy.copy(loss_fn)
    unreduced.reduction = "none"

    def summed(outputs: Tensor, labels: Any) -> Tensor:
        losses = unreduced(outputs, labels)
        return losses.flatten(1).sum(1) if losses.dim() > 1 else losses  # [B, ...] -> [B]

    return summed


def _loader(train_dataset: Dataset | DataLoader, batch_size: int | None) -> DataLoader:
    if not isinstance(train_dataset, DataLoader):
        return DataLoader(train_dataset, batch_size=32 if batch_size is None else batch_size)
    if batch_size is not None:
        raise ValueError(
            f"DropoutInfluence: batch_size={batch_size} goes with a Dataset, and train_dataset is "
            "a DataLoader, which has its own; leave batch_size out"
        )
    sampler = train_dataset.sampler
    if isinstance(train_dataset.batch_sampler, BatchSampler):
        sampler = train_dataset.batch_sampler.sampler
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        raise ValueError(
            "DropoutInfluence: train_dataset shuffles, so that no index would name an example; "
            "make the DataLoader with shuffle=False"
        )
    return train_dataset


def _largest(total: Tensor, k: int, proponents: bool) -> KMostInfluentialResults:
    """The k largest or smallest of scores [1, n]."""
    n = total.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"DropoutInfluence: k must be 1 to {n}, the training examples, got {k}")
    values, indices = total.topk(k, largest=proponents)
    return KMostInfluentialResults(indices, values)
