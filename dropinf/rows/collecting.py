"""A data set -> a store of rows: loader -> capture -> store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from dropinf.compression import Plan
from dropinf.rows.batches import Batches, CaptureOptions, LossFn
from dropinf.rows.checks import Checks
from dropinf.rows.store import RowStore, RowWriter
from dropinf.user_warning import warn_user


def collect(
    model: nn.Module,
    loader: Iterable,
    loss_fn: LossFn,
    plan: Plan,
    path: str | os.PathLike | None = None,
    mode: str = "activations",
    progress: bool | str = True,
    *,
    segment_ids: str | Callable[[Any], Tensor] | None = None,
    loss_scale: float = 1.0,
    on_nonfinite: str = "raise",
    check: bool = True,
    **options: Unpack[CaptureOptions],
) -> RowStore:
    """The rows of every example of a loader, in its order.

    Args:
        model: used as it is, on the device and in the training mode that it is in.
        loader: gives batches, of any type that `loss_fn` takes.
        loss_fn: (model, batch) -> [B], one loss per example, of whose sum the gradient is taken.
        plan: the coordinates to keep.
        path: a directory to make; None keeps the rows in memory.
        mode: "activations" or "grads", see `capture`.
        progress: show a bar with examples per second and time left; a string is its label.
        segment_ids: per="segment": batch -> [B, T] integers, or the key of the batch to find them;
            see `capture`.
        loss_scale: what loss_fn multiplies its losses by; taken out of the rows.
        on_nonfinite: what to do at a loss or gradient that is NaN or infinite: "raise", or "skip"
            to store a row of zeros that is marked invalid (mode="grads": in batches of one).
        check: compare rows with plain autograd of the same batch, on the first batch and then ever
            more seldom (`RowStore.proof` says on how many examples), and an example of the first
            batch that has two with its row when it goes through the model alone.
        options: per=, batch_dim=, closed= and backend= of `capture`. Of a row of tokens or
            segments, `RowStore.origin` says the example and the token or segment.

    Returns:
        A store of n rows. Nothing is left at `path` if an error stops the collection.

    Raises:
        TypeError: a Dataset was given for a loader.
        ValueError: the loader is empty, the losses are not one per example, or not finite.
        RuntimeError: gradients are disabled.
        ProofError: rows are not what plain autograd gives.
        FileExistsError: there is something at `path`.
    """
    if isinstance(loader, torch.utils.data.Dataset) and hasattr(loader, "__getitem__"):
        raise TypeError(
            "collect: a Dataset gives examples, not batches; give "
            "torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    size, label = _num_examples(loader), progress if isinstance(progress, str) else "collect"
    expected = size if options.get("per", "example") == "example" else 0
    with (
        Collection(
            model,
            loss_fn,
            plan,
            path,
            expected,
            mode=mode,
            segment_ids=segment_ids,
            loss_scale=loss_scale,
            on_nonfinite=on_nonfinite,
            check=check,
            **options,
        ) as collection,
        collection.capturing() as batches,
        _bar(total=size or None, desc=label, unit="ex", disable=not progress) as bar,
    ):
        for batch in batches.drawn(loader):
            collection.add(batch)
            bar.update(batches.num_examples)
        if not batches.seen:
            raise ValueError("collect: the loader is empty; it gave no batch")
        return collection.finish()


class Collection:
    """A store in the making: rows of one batch after the other, which are checked as they come.

    A context, that leaves nothing half-written. The capture is open inside of `capturing` alone,
    again and again if need be.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        plan: Plan,
        path: str | os.PathLike | None = None,
        expected: int = 0,
        *,
        mode: str = "activations",
        segment_ids: str | Callable[[Any], Tensor] | None = None,
        loss_scale: float = 1.0,
        on_nonfinite: str = "raise",
        check: bool = True,
        **options: Unpack[CaptureOptions],
    ) -> None:
        """`expected` rows, 0 if that is not known; all else as of `collect`."""
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "collect: gradients are disabled; call it outside of torch.no_grad() and "
                "torch.inference_mode()"
            )
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(
                f"collect: on_nonfinite must be 'raise' or 'skip', got {on_nonfinite!r}"
            )
        if (options.get("per", "example") == "segment") != (segment_ids is not None):
            raise ValueError("collect: per='segment' and segment_ids= go together")
        self._batches = Batches(
            model, loss_fn, plan, mode, options, segment_ids, loss_scale, on_nonfinite
        )
        self._checks = Checks(self._batches) if check else None
        self._writer = RowWriter(plan, path, expected)
        self._number = 0

    def __enter__(self) -> Collection:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return self._writer.num_rows

    @contextlib.contextmanager
    def capturing(self) -> Iterator[Batches]:
        """Opens the capture, for `add`."""
        with self._batches.opened():
            yield self._batches

    def add(self, batch: Any, origin: Callable[[int], Tensor] | None = None) -> None:
        """The rows of a batch; `origin` gives [n, 2] of n rows if it is not the rows' own."""
        checks, batches = self._checks, self._batches
        if checks is not None:
            checks.before(self._number)
        rows, valid = batches.rows(batch)
        if checks is not None:
            checks.after(batch, rows, valid)
        self._writer.append(rows, valid, batches.origin() if origin is None else origin(len(rows)))
        batches.seen += batches.num_examples
        self._number += 1

    def finish(self) -> RowStore:
        """The store."""
        slots, met = self._batches.plan.slots, self._batches.met
        unmet = [slot.name for slot in slots if slot.name not in met]
        if unmet:
            warn_user(f"collect: no example had a gradient for {unmet}; their entries are zeros")
        return self._writer.finish(None if self._checks is None else self._checks.proof)


def _bar(**options: Any) -> Any:
    """tqdm's; without tqdm none, since `make gpu` runs beside what a CUDA build of torch brings."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return contextlib.nullcontext(SimpleNamespace(update=lambda num_examples: None))
    return tqdm(**options)


def _num_examples(loader: Iterable) -> int:
    """Examples that a DataLoader will give, 0 if that is not known."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(loader, torch.utils.data.DataLoader) and hasattr(sampler, "__len__"):
        return len(sampler)
    return 0
