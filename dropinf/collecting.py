"""A data set -> a store of rows: loader -> capture -> store."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dropinf.capturing import capture
from dropinf.plan import Plan
from dropinf.store import RowStore, RowWriter

LossFn = Callable[[nn.Module, Any], Tensor]


def collect(
    model: nn.Module,
    loader: Iterable,
    loss_fn: LossFn,
    plan: Plan,
    path: str | os.PathLike | None = None,
    mode: str = "activations",
    progress: bool | str = True,
    *,
    on_nonfinite: str = "raise",
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
        on_nonfinite: what to do at a loss or gradient that is NaN or infinite: "raise", or "skip"
            to store a row of zeros that is marked invalid (mode="grads": in batches of one).
        backend: see `capture`.

    Returns:
        A store of n rows. Nothing is left at `path` if an error stops the collection.

    Raises:
        ValueError: the loader is empty, the losses are not one per example, or not finite.
        FileExistsError: there is something at `path`.
    """
    if on_nonfinite not in ("raise", "skip"):
        raise ValueError(f"collect: on_nonfinite must be 'raise' or 'skip', got {on_nonfinite!r}")
    batches, label = 0, progress if isinstance(progress, str) else "collect"
    with (
        capture(model, plan, mode, backend=backend) as tap,
        RowWriter(plan, path, _num_examples(loader)) as writer,
        tqdm(
            total=_num_examples(loader) or None, desc=label, unit="ex", disable=not progress
        ) as bar,
    ):
        for batch in loader:
            losses = loss_fn(model, batch)
            tap.check(losses)
            finite = losses.detach().isfinite()
            if on_nonfinite == "raise" and not finite.all():
                at = int((~finite).nonzero()[0])
                raise ValueError(_nonfinite("loss", writer.num_rows + at, losses[at].item()))
            rows = tap.rows(losses)
            valid = finite & rows.isfinite().all(1)
            if not valid.all():
                if mode == "grads" and len(rows) > 1:
                    first, last = writer.num_rows, writer.num_rows + len(rows) - 1
                    raise ValueError(
                        f"collect: a loss or gradient among examples {first} to {last} is not "
                        "finite, and mode='grads' cannot keep the others apart from it; give "
                        "batches of one example"
                    )
                if on_nonfinite == "raise":
                    at = int((~valid).nonzero()[0])
                    raise ValueError(_nonfinite("gradient", writer.num_rows + at, "not finite"))
                rows[~valid] = 0
            writer.append(rows, valid)
            batches += 1
            bar.update(len(rows))
        if not batches:
            raise ValueError("collect: the loader is empty; it gave no batch")
        unmet = [slot.name for slot in plan.slots if slot.name not in tap.met]
        if unmet:
            warnings.warn(
                f"collect: no example had a gradient for {unmet}; their entries are zeros",
                stacklevel=2,
            )
        return writer.finish()


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
