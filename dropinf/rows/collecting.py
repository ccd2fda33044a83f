"""A data set -> a store of rows: loader -> capture -> store."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dropinf.capturing import capture, check_examples
from dropinf.compression import Plan
from dropinf.rows.store import RowStore, RowWriter

LossFn = Callable[[Any, Any], Tensor]  # Any, so that a function of a user's own model class passes


def collect(
    model: nn.Module,
    loader: Iterable,
    loss_fn: LossFn,
    plan: Plan,
    path: str | os.PathLike | None = None,
    mode: str = "activations",
    progress: bool | str = True,
    *,
    per: str = "example",
    segment_ids: str | Callable[[Any], Tensor] | None = None,
    batch_dim: int | dict[str, int] | None = None,
    loss_scale: float = 1.0,
    on_nonfinite: str = "raise",
    check: bool = True,
    backend: str | None = None,
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
        per: "example", "token" or "segment", see `capture`; of a row of tokens or segments,
            `RowStore.origin` says the example and the token or segment.
        segment_ids: per="segment": batch -> [B, T] integers, or the key of the batch to find them;
            see `capture`.
        batch_dim: see `capture`.
        loss_scale: what loss_fn multiplies its losses by; taken out of the rows.
        on_nonfinite: what to do at a loss or gradient that is NaN or infinite: "raise", or "skip"
            to store a row of zeros that is marked invalid (mode="grads": in batches of one).
        check: compare the row of the first batch's example 0 with its row when it goes through the
            model alone, which shows a model that mixes examples; costs one batch of one.
        backend: see `capture`.

    Returns:
        A store of n rows. Nothing is left at `path` if an error stops the collection.

    Raises:
        ValueError: the loader is empty, the losses are not one per example, or not finite; or
            the model mixes the examples of a batch.
        FileExistsError: there is something at `path`.
    """
    if on_nonfinite not in ("raise", "skip"):
        raise ValueError(f"collect: on_nonfinite must be 'raise' or 'skip', got {on_nonfinite!r}")
    if (per == "segment") != (segment_ids is not None):
        raise ValueError("collect: per='segment' and segment_ids= go together")
    options = {} if loss_scale == 1.0 else {"loss_scale": loss_scale}
    num_examples, label = 0, progress if isinstance(progress, str) else "collect"
    with (
        capture(model, plan, mode, per=per, batch_dim=batch_dim, backend=backend) as tap,
        RowWriter(plan, path, _num_examples(loader) if per == "example" else 0) as writer,
        _bar(
            total=_num_examples(loader) or None, desc=label, unit="ex", disable=not progress
        ) as bar,
    ):

        def rows_of(batch: Any, losses: Tensor) -> Tensor:
            if segment_ids is None:
                return tap.rows(losses, **options)
            found = batch[segment_ids] if isinstance(segment_ids, str) else segment_ids(batch)
            return tap.rows(losses, segment_ids=found, **options)

        def first_row(rows: Tensor) -> Tensor:
            return rows[0] if per == "example" else rows[tap.origin[:, 0] == 0].sum(0)

        for batch in loader:
            losses = loss_fn(model, batch)
            tap.check(losses)
            finite = losses.detach().isfinite()
            if on_nonfinite == "raise" and not finite.all():
                at = int((~finite).nonzero()[0, 0])
                raise ValueError(_nonfinite("loss", num_examples + at, losses[at].tolist()))
            rows = rows_of(batch, losses)
            B = tap.num_examples
            valid = rows.isfinite().all(1)
            if per == "example":
                valid &= finite
            if not valid.all():
                if mode == "grads" and len(rows) > 1:
                    first, last = num_examples, num_examples + len(rows) - 1
                    raise ValueError(
                        f"collect: a loss or gradient among examples {first} to {last} is not "
                        "finite, and mode='grads' cannot keep the others apart from it; give "
                        "batches of one example"
                    )
                if on_nonfinite == "raise":
                    at = int((~valid).nonzero()[0])
                    at = at if per == "example" else int(tap.origin[at, 0])
                    raise ValueError(_nonfinite("gradient", num_examples + at, "not finite"))
                rows[~valid] = 0
            origin = None if per == "example" else tap.origin + torch.tensor([num_examples, 0])
            if check and not num_examples and bool(valid.all()):
                check_examples(
                    model,
                    batch,
                    B,
                    first_row(rows),
                    lambda b: first_row(rows_of(b, loss_fn(model, b))),
                    lambda b: loss_fn(model, b),
                    plan,
                    batch_dim if isinstance(batch_dim, int) else 0,
                )
            writer.append(rows, valid, origin)
            num_examples += B
            bar.update(B)
        if not num_examples:
            raise ValueError("collect: the loader is empty; it gave no batch")
        unmet = [slot.name for slot in plan.slots if slot.name not in tap.met]
        if unmet:
            warnings.warn(
                f"collect: no example had a gradient for {unmet}; their entries are zeros",
                stacklevel=2,
            )
        return writer.finish()


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


def _nonfinite(what: str, position: int, value: object) -> str:
    return (
        f"collect: the {what} of example {position} (in the loader's order) is {value}; mend or "
        "remove it, or store it as an invalid row with on_nonfinite='skip'"
    )
