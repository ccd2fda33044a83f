"""Batches of one collection, which become rows in an open capture."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from dropinf.argument_kinds import need_loss_fn
from dropinf.capturing import (
    ActivationsTap,
    GradsTap,
    NotClosedError,
    NotCompiledError,
    capture,
    example_at,
    moved_to,
    size_at,
)
from dropinf.compression import Plan
from dropinf.rows.packing import finite_rows
from dropinf.user_warning import warn_user

LossFn = Callable[[Any, Any], Tensor]  # Any, so that a function of a user's own model class passes


class CaptureOptions(TypedDict, total=False):
    """What `collect` hands to `capture`, which says what they mean."""

    per: str
    batch_dim: int | dict[str, int] | None
    closed: bool
    backend: str | None


class Batches:
    """Rows of one batch after another; arguments as of `collect`.

    Attributes:
        seen: examples of the batches before.
        losses: of the last batch, without their graph; None if its examples ran singly.
        num_examples: of the last batch.
        met: names of the parameters that had a gradient so far.
        places: which leaves of a batch hold examples that were found not to be mixed, so that they
            may run singly.
        keep_graph: keep that of the next batch, whose losses are then `kept`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        plan: Plan,
        mode: str,
        options: CaptureOptions,
        segment_ids: str | Callable[[Any], Tensor] | None,
        loss_scale: float,
        on_nonfinite: str,
        op: str = "collect",
    ) -> None:
        """`op` is what people called."""
        need_loss_fn(op, loss_fn)
        self.model, self.loss_fn, self.plan = model, loss_fn, plan
        self.per: str = options.get("per", "example")
        self._mode, self._options = mode, options
        self._segment_ids, self._on_nonfinite, self._op = segment_ids, on_nonfinite, op
        self.loss_scale = loss_scale
        self.tap: ActivationsTap | GradsTap = capture(model, plan, mode, **options)
        self._open = contextlib.ExitStack()
        self.seen = self.num_examples = 0
        self.losses: Tensor | None = None
        self._origin: Tensor | None = None
        self.met: set[str] = set()
        self.places: list[int] = []
        self.keep_graph = False
        self.kept: Tensor | None = None
        self._seconds: dict[bool, float] = {}  # of an example, singly or in its batch
        self._passes = ""  # which parameters take a pass for each loss, and why
        self._said = self._doubted = False

    @property
    def batch_dim(self) -> int:
        """Where the examples of a batch are."""
        dim = self._options.get("batch_dim")
        return dim if isinstance(dim, int) else 0

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Opens the capture, which may change for another one inside."""
        with self._open:
            self._open.enter_context(self.tap)
            yield

    def drawn(self, loader: Iterable) -> Iterator[Any]:
        """The batches of a loader, on the model's device where it has one.

        The loader runs as without a capture: watched, it would be slow.
        """
        end = object()
        devices = {p.device for p in self.model.parameters()}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            raise TypeError(
                f"{self._op}: the loader must be what batches can be taken from, such as a "
                f"DataLoader or a list of batches, got {type(loader).__name__}"
            )
        with self.tap.paused():
            left = iter(loader)
        while True:
            with self.tap.paused():
                batch = next(left, end)
                if batch is end:
                    return
                if device.type != "cpu":  # hooks of a model on several devices do it themselves
                    batch = moved_to(device, batch)
            yield batch

    def rows(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Rows, and which are valid [n] bool; those that are not are zeros."""
        singly = self._singly(batch)
        start = time.perf_counter()
        if singly is not None:
            parts = [self._of(one) for one in singly]
            rows = torch.cat([part for part, _ in parts])
            losses, self.losses = torch.cat([part for _, part in parts]), None
        else:
            rows, losses = self._of(batch)
            self.losses = losses
        self.num_examples = self.tap.num_examples if singly is None else len(rows)
        if singly is None and isinstance(self.tap, ActivationsTap) and self.num_examples > 1:
            self._passes = self.tap.passes_said()
        if self._passes and not self.keep_graph and self.num_examples > 1:
            seconds = (time.perf_counter() - start) / self.num_examples
            self._seconds.setdefault(singly is not None, seconds)
        self.met |= self.tap.met
        self._origin = self.tap.origin
        # Behind the backward pass, so that a device is waited for once.
        finite, valid = losses.isfinite(), finite_rows(rows)
        if self._on_nonfinite == "raise" and not finite.all():
            at = int((~finite).nonzero()[0, 0])
            raise ValueError(_nonfinite("loss", self.seen + at, losses[at].tolist()))
        if self.per == "example":
            valid &= finite
        if not valid.all():
            self._refuse(valid)
            rows[~valid] = 0
        return rows, valid

    def origin(self) -> Tensor | None:
        """The example and the token or segment of each of the last rows; None of examples."""
        return None if self._origin is None else self._origin + torch.tensor([self.seen, 0])

    def row_of(self, batch: Any, b: int) -> Tensor:
        """[R] of example b of a batch."""
        with self.tap.as_written():  # not compiled anew for a batch of one
            rows = self.backward(batch, self.loss_fn(self.model, batch))
        return _of_example(rows, b, self.tap.origin)

    def of_example(self, rows: Tensor, b: int) -> Tensor:
        """[R] of example b, of the rows of the last batch: a sum over its tokens or segments."""
        return _of_example(rows, b, self._origin)

    def backward(self, batch: Any, losses: Tensor, retain_graph: bool = False) -> Tensor:
        """Rows of losses of a batch."""
        given: dict[str, Any] = {"loss_scale": self.loss_scale, "retain_graph": retain_graph}
        if self._segment_ids is not None:
            by_key = isinstance(self._segment_ids, str)
            given["segment_ids"] = batch[self._segment_ids] if by_key else self._segment_ids(batch)
        return self.tap.rows(losses, **given)

    def _of(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Rows and losses of a batch, which is taken again without closed forms if need be."""
        try:
            losses = self.loss_fn(self.model, batch)
        except NotClosedError as error:
            if self.per != "example":
                raise
            warn_user(f"{self._op}: {error}, from here on")
            self._open.close()
            self._options = CaptureOptions(**{**self._options, "closed": False})
            self.tap = capture(self.model, self.plan, self._mode, **self._options)
            self._open.enter_context(self.tap)
            losses = self.loss_fn(self.model, batch)
        try:
            return self._backward_of(batch, losses)
        except NotCompiledError as error:  # the tap does not compile again
            warn_user(f"{self._op}: {error}")
            return self._backward_of(batch, self.loss_fn(self.model, batch))

    def _backward_of(self, batch: Any, losses: Tensor) -> tuple[Tensor, Tensor]:
        self.tap.check(losses)
        self._doubt_one(losses)
        rows = self.backward(batch, losses, self.keep_graph)
        self.kept = losses if self.keep_graph else None
        return rows, losses.detach()

    def _doubt_one(self, losses: Tensor) -> None:
        """Warn of a mean that has the shape of one example's loss."""
        given = getattr(self.tap, "examples", None)
        inputs = getattr(self.loss_fn, "inputs", 1)  # 2 of a pair
        if losses.shape[0] == 1 and given not in (None, inputs) and not self._doubted:
            self._doubted = True
            warn_user(
                f"{self._op}: one loss for a batch whose first input holds {given} examples; if it "
                "is their mean or sum, use reduction='none', as its row is one of all of them"
            )

    def _singly(self, batch: Any) -> list[Any] | None:
        """The examples of a batch one by one, where a pass for each loss would cost more.

        The first batch that was timed and not to be compared is followed by one that is run singly,
        and timed against it.
        """
        alone, together = (self._seconds.get(singly) for singly in (True, False))
        # Not where this batch is to be compared, or where all ranks must run the same passes.
        if self.keep_graph or self.tap.sharded:
            return None
        if not self.places or together is None:
            return None
        if alone is not None and not self._said:
            self._said = True
            ratio, how = together / alone, "singly" if alone < together else "so"
            warn_user(
                f"{self._op}: {self._passes} take a pass for each loss, {ratio:.1f} times the time "
                f"of examples run singly; they run {how}"
            )
        if alone is not None and alone >= together:
            return None
        B = size_at(batch, self.places, self.batch_dim)
        if B is None:
            return None
        return [example_at(batch, b, self.places, self.batch_dim) for b in range(B)]

    def _refuse(self, valid: Tensor) -> None:
        """Raise for rows that are not finite, unless they are to be skipped and stand alone."""
        if isinstance(self.tap, GradsTap) and len(valid) > 1:
            raise ValueError(
                f"{self._op}: a loss or gradient among examples {self.seen} to "
                f"{self.seen + len(valid) - 1} is not finite, and mode='grads' cannot keep the "
                "others apart from it; give batches of one example"
            )
        if self._on_nonfinite == "raise":
            at = int((~valid).nonzero()[0])
            at = at if self.per == "example" else int(self.tap.origin[at, 0])
            raise ValueError(_nonfinite("gradient", self.seen + at, "not finite"))


def _of_example(rows: Tensor, b: int, origin: Tensor | None) -> Tensor:
    return rows[b] if origin is None else rows[origin[:, 0] == b].sum(0)


def _nonfinite(what: str, position: int, value: object) -> str:
    return (
        f"collect: the {what} of example {position} (in the loader's order) is {value}; mend or "
        "remove it, or store it as an invalid row with on_nonfinite='skip'"
    )
