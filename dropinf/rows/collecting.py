"""A data set -> a store of rows: loader -> capture -> store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from dropinf.argument_kinds import need, need_loss_fn
from dropinf.compression import Plan
from dropinf.progress import progress_bar
from dropinf.rows.batches import CaptureOptions, LossFn
from dropinf.rows.collection import Collection
from dropinf.rows.ids import GivenIds
from dropinf.rows.loaders import refuse_dataset
from dropinf.rows.shared_writing import written_by_ranks
from dropinf.rows.shares import num_examples, share_of
from dropinf.rows.stopping import Sigterm
from dropinf.rows.store import RowStore
from dropinf.user_warning import warn_user
from dropinf.world import World, in_group, refuse_timeout


def collect(
    model: nn.Module,
    loader: Iterable,
    loss_fn: LossFn,
    plan: Plan,
    path: str | os.PathLike | None = None,
    mode: str = "activations",
    progress: bool | str = True,
    *,
    resume: bool = False,
    ids: GivenIds | None = None,
    segment_ids: str | Callable[[Any], Tensor] | None = None,
    loss_scale: float = 1.0,
    on_nonfinite: str = "raise",
    check: bool = True,
    dtype: torch.dtype | None = None,
    updates: torch.optim.Optimizer | None = None,
    timeout: float = 600.0,
    **options: Unpack[CaptureOptions],
) -> RowStore:
    """The rows of every example of a loader, in its order.

    With `path`, rows are on the disk once a batch or every five seconds, whichever is later, so
    that a kill, SIGTERM, an interrupt or an error leaves a store that `resume` goes on with.

    Where torch.distributed is initialised and there is a `path`, all ranks call this, each with a
    share of the examples (see `split`), and write parts of one store, which each of them gets. Of
    `split`, its rows are in the order of one process; of a DistributedSampler, rank after rank, and
    what pads it is left out. Without a `path`, each rank has its own rows.

        store = dropinf.collect(model, loader, loss_fn, plan, "rows", resume=True)

    Args:
        model: used as it is, on the device and in the training mode that it is in.
        loader: gives batches, of any type that `loss_fn` takes. Tensors in tuples, lists, mappings
            and dataclasses are moved to a GPU that the whole model is on.
        loss_fn: (model, batch) -> [B], one loss per example, of whose sum the gradient is taken.
        plan: the coordinates to keep.
        path: a directory to make; None keeps the rows in memory, on the CPU whatever device the
            model is on, as [n, R] may not fit beside it: `RowStore.to("cuda")` takes them to a GPU.
        mode: "activations" or "grads", see `capture`.
        progress: show a bar with examples per second and time left; a string is its label.
        resume: go on behind the rows that are at `path`, if there are any, under the same plan,
            weights, options and data. The model does not run for what is done: a data set with
            indices is cut (of a loader that shuffles anew, what is left is drawn), a stream is read
            past. With the same batches, rows are those of a run that was never stopped.
        ids: of the examples of a batch, integers or strings: the key of the batch to find them, or
            batch -> [B]. None takes what the loader's sampler draws, as positions in the data set;
            of a loader that does not tell, the order in which examples come.
        segment_ids: per="segment": batch -> [B, T] integers, or the key of the batch to find them;
            see `capture`.
        loss_scale: what loss_fn multiplies its losses by; taken out of the rows.
        on_nonfinite: what to do at a loss or gradient that is NaN or infinite: "raise", or "skip"
            to store a row of zeros that is marked invalid (mode="grads": in batches of one).
        check: compare rows with plain autograd of the same batch, on the first batch and then ever
            more seldom (`RowStore.proof` says on how many examples), and an example of the first
            batch that has two with its row when it goes through the model alone.
        dtype: in which rows are kept: torch.float32, bfloat16, float16 or int8, and read as float32
            again; None is that in which they are computed. float16 and int8 have a scale for each
            row and layer, so that nothing is beyond their range.
        updates: an optimizer, as it was when the model had these weights: rows are of the update
            that it would make of each example's gradient, see `optimizer_updates`, which under
            `Dropout`, `FactoredDropout` and `Full` does so afterwards. Here any plan will do, as
            the update is made of the coordinates before they are summed up or projected. A batch
            then takes a row of coordinates an example: s r of each layer for `Sketch`, all P for
            projections. Collect queries without it.
        timeout: seconds without a sign of life (a batch) until another rank counts as lost.
        options: per=, batch_dim=, closed= and backend= of `capture`. Of a row of tokens or
            segments, `RowStore.origin` says the example and the token or segment.

    Returns:
        A store of n rows; `RowStore.ids` says whose they are.

    Raises:
        TypeError: a data set or a single batch was given for a loader, a compression for a plan,
            or a loss of torch.nn for a loss function.
        ValueError: the loader is empty, the losses are not one per example, or not finite; or
            `updates` is not known, is sharded, or has no state of a parameter.
        RuntimeError: gradients are disabled.
        ProofError: rows are not what plain autograd gives.
        FileExistsError: there is something at `path`, and `resume` is False.
        LockedError: another process writes there.
        RuntimeError: another rank is gone, or failed; what is there can be gone on with, also by
            another number of ranks.
    """
    refuse_dataset("collect", loader)
    need("collect", "plan", plan, Plan, "make one: dropinf.Plan.make(model, compression)")
    need_loss_fn("collect", loss_fn)
    refuse_timeout("collect", timeout)
    size, label = _num_examples(loader), progress if isinstance(progress, str) else "collect"
    expected = size if options.get("per", "example") == "example" else 0
    with (
        Sigterm() as sigterm,
        _world(path, resume, timeout) as world,
        Collection(
            model if world is None else _sending_nothing(model),
            loss_fn,
            plan,
            path,
            expected,
            resume=resume,
            mode=mode,
            segment_ids=segment_ids,
            loss_scale=loss_scale,
            on_nonfinite=on_nonfinite,
            check=check,
            dtype=dtype,
            updates=updates,
            world=world,
            **options,
        ) as collection,
        contextlib.closing(collection.source(loader, ids)) as source,
        collection.capturing() as batches,
        progress_bar(total=size or None, desc=label, unit="ex", disable=not progress) as bar,
    ):
        bar.update(batches.seen)
        for batch in batches.drawn(source):
            with sigterm.held():
                collection.add(batch, source=source)
            bar.update(batches.num_examples)
        if not batches.seen and world is None:
            raise ValueError(
                "collect: the loader is empty; it gave no batch (a generator gives them once)"
            )
        store = collection.finish()
    if ids is not None and options.get("per", "example") == "example":
        _warn_of_equal_ids(store)
    return store


def _warn_of_equal_ids(store: RowStore) -> None:
    ids = store.ids
    others = len(ids.unique() if isinstance(ids, Tensor) else set(ids))
    if others < len(store):
        warn_user(
            f"collect: {len(store):,} rows have {others:,} different ids; ids= must give each "
            "example its own in the whole data set, not in the batch, unless you mean it"
        )


def _world(path: Any, resume: bool, timeout: float) -> Any:
    """The ranks that write one store, None where one process does."""
    if path is not None and (in_group() or (resume and written_by_ranks(path))):
        return World("collect", timeout)
    return contextlib.nullcontext()


def _sending_nothing(model: nn.Module) -> nn.Module:
    """The model that DistributedDataParallel wraps: it sends buffers with the first batch, which a
    rank may not have."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _num_examples(loader: Iterable) -> int:
    """Examples that a DataLoader will give, 0 if that is not known."""
    if share_of(loader) is not None:
        return num_examples(loader)
    sampler = getattr(loader, "sampler", None)
    if isinstance(loader, torch.utils.data.DataLoader) and hasattr(sampler, "__len__"):
        return len(sampler)
    return 0
