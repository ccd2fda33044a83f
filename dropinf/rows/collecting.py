"""A data set -> a store of rows: loader -> capture -> store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from dropinf.capturing import ActivationsTap, GradsTap, capture, check_examples
from dropinf.compression import Plan
from dropinf.rows.store import RowStore, RowWriter
from dropinf.user_warning import warn_user

LossFn = Callable[[Any, Any], Tensor]  # Any, so that a function of a user's own model class passes


class CaptureOptions(TypedDict, total=False):
    """What `collect` hands to `capture`, which says what they mean."""

    per: str
    batch_dim: int | dict[str, int] | None
    backend: str | None


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
        check: compare the row of the first batch's example 0 with its row when it goes through the
            model alone, which shows a model that mixes examples; costs one batch of one.
        options: per=, batch_dim= and backend= of `capture`. Of a row of tokens or segments,
            `RowStore.origin` says the example and the token or segment.

    Returns:
        A store of n rows. Nothing is left at `path` if an error stops the collection.

    Raises:
        ValueError: the loader is empty, the losses are not one per example, or not finite; or
            the model mixes the examples of a batch.
        FileExistsError: there is something at `path`.
    """
    per = options.get("per", "example")
    if on_nonfinite not in ("raise", "skip"):
        raise ValueError(f"collect: on_nonfinite must be 'raise' or 'skip', got {on_nonfinite!r}")
    if (per == "segment") != (segment_ids is not None):
        raise ValueError("collect: per='segment' and segment_ids= go together")
    size, label = _num_examples(loader), progress if isinstance(progress, str) else "collect"
    with (
        capture(model, plan, mode, **options) as tap,
        RowWriter(plan, path, size if per == "example" else 0) as writer,
        _bar(total=size or None, desc=label, unit="ex", disable=not progress) as bar,
    ):
        batches = _Batches(model, loss_fn, tap, per, segment_ids, loss_scale, on_nonfinite)
        for batch in loader:
            rows, valid = batches.rows(batch)
            origin = None if per == "example" else tap.origin + torch.tensor([batches.seen, 0])
            B = tap.num_examples
            if check and not batches.seen and bool(valid.all()):
                batches.check_examples(batch, rows, options.get("batch_dim"))
            writer.append(rows, valid, origin)
            batches.seen += B
            bar.update(B)
        if not batches.seen:
            raise ValueError("collect: the loader is empty; it gave no batch")
        unmet = [slot.name for slot in plan.slots if slot.name not in tap.met]
        if unmet:
            warn_user(f"collect: no example had a gradient for {unmet}; their entries are zeros")
        return writer.finish()


@dataclass
class _Batches:
    """Batches of one collection, which become rows in an open capture; see `collect`.

    Attributes:
        seen: examples of the batches before.
    """

    model: nn.Module
    loss_fn: LossFn
    tap: ActivationsTap | GradsTap
    per: str
    segment_ids: str | Callable[[Any], Tensor] | None
    loss_scale: float
    on_nonfinite: str
    seen: int = 0

    def rows(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Rows, and which are valid [n] bool; those that are not are zeros."""
        losses = self.loss_fn(self.model, batch)
        self.tap.check(losses)
        finite = losses.detach().isfinite()
        if self.on_nonfinite == "raise" and not finite.all():
            at = int((~finite).nonzero()[0, 0])
            raise ValueError(_nonfinite("loss", self.seen + at, losses[at].tolist()))
        rows = self._backward(batch, losses)
        valid = rows.isfinite().all(1)
        if self.per == "example":
            valid &= finite
        if not valid.all():
            self._refuse(valid)
            rows[~valid] = 0
        return rows, valid

    def _backward(self, batch: Any, losses: Tensor) -> Tensor:
        given: dict[str, Any] = {} if self.loss_scale == 1.0 else {"loss_scale": self.loss_scale}
        if self.segment_ids is not None:
            by_key = isinstance(self.segment_ids, str)
            given["segment_ids"] = batch[self.segment_ids] if by_key else self.segment_ids(batch)
        return self.tap.rows(losses, **given)

    def _refuse(self, valid: Tensor) -> None:
        """Raise for rows that are not finite, unless they are to be skipped and stand alone."""
        if isinstance(self.tap, GradsTap) and len(valid) > 1:
            raise ValueError(
                f"collect: a loss or gradient among examples {self.seen} to "
                f"{self.seen + len(valid) - 1} is not finite, and mode='grads' cannot keep the "
                "others apart from it; give batches of one example"
            )
        if self.on_nonfinite == "raise":
            at = int((~valid).nonzero()[0])
            at = at if self.per == "example" else int(self.tap.origin[at, 0])
            raise ValueError(_nonfinite("gradient", self.seen + at, "not finite"))

    def check_examples(
        self, batch: Any, rows: Tensor, batch_dim: int | dict[str, int] | None
    ) -> None:
        """Raise if the model mixes the examples of this batch, whose rows these are."""

        def first_row(rows: Tensor) -> Tensor:
            return rows[0] if self.per == "example" else rows[self.tap.origin[:, 0] == 0].sum(0)

        def losses_of(batch: Any) -> Tensor:
            return self.loss_fn(self.model, batch)

        check_examples(
            self.model,
            batch,
            self.tap.num_examples,
            first_row(rows),
            lambda one: first_row(self._backward(one, losses_of(one))),
            losses_of,
            self.tap.plan,
            batch_dim if isinstance(batch_dim, int) else 0,
        )


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
