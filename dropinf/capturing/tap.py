"""Tap: what both modes of capture share."""

from __future__ import annotations

import contextlib
import threading
import weakref
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dropinf.capturing.contents import Contents
from dropinf.compression import Plan

Self = TypeVar("Self", bound="Tap")

# Parameters of captures that are open, by id: a second one would take the first one's gradients.
_OPEN: set[int] = set()
_LOCK = threading.Lock()


_EAGER: list[Any] = []  # what puts the compiler's stance back, once for each open capture


class NotClosedError(RuntimeError):
    """The forward pass or the loss asks for the gradient of a parameter."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"capture: the forward pass or the loss asks for the gradient of {name!r} itself, or "
            "hooks it, which layers in closed form do not show; use capture(..., closed=False), as "
            "collect does"
        )


class NotCompiledError(RuntimeError):
    """A batch that compiled code cannot take; the capture runs the model as written from now on."""

    def __init__(self) -> None:
        super().__init__(
            "rows: the losses hold a gradient of a gradient, which torch.compile does not support; "
            "run the model on this batch again, which is captured as written from here on, as "
            "collect does"
        )


class Tap:
    """One opened capture: the plan's parameters found in the model.

    Attributes:
        met: names of the parameters that had a gradient in some batch so far.
        num_examples: of the last rows.
        sharded: whether the model gathers its parameters for each forward pass.
        origin: [n, 2] the example in its batch, and the token or segment, of each of the last rows;
            None if they are the examples.
    """

    def __init__(self, model: nn.Module, plan: Plan, backend: str | None) -> None:
        self.given, self.plan, self.backend = model, plan, backend
        self._look()
        self.met: set[str] = set()
        self.num_examples = 0
        self.origin: Tensor | None = None
        self._open = self._was_open = False
        self._thread = 0
        self._undo = contextlib.ExitStack()

    def _look(self) -> None:
        """Find the plan's parameters in the model."""
        self.contents = Contents(self.given)
        self.model, self.sharded = self.contents.model, bool(self.contents.sharded)
        found = self.contents.parameters
        for slot in self.plan.slots:
            shape = tuple(found[slot.name].shape) if slot.name in found else "none"
            if shape != slot.shape:
                raise ValueError(
                    f"capture: the plan has a parameter {slot.name!r} of shape {slot.shape}, "
                    f"the model {shape}; make a plan for this model with Plan.make"
                )
        self.parameters = [found[slot.name] for slot in self.plan.slots]
        self.contents.refuse_offloaded()

    def __enter__(self: Self) -> Self:
        if self._open:
            raise RuntimeError("capture: this capture is open already; make one for each `with`")
        if self._was_open:
            self._look()  # the model may be another inside by now
        self._was_open = True
        with contextlib.ExitStack() as undo:
            self._claim(undo)
            self.contents.unsynchronised(undo)
            self.contents.reshard()
            undo.callback(self.contents.reshard)
            self._attach(undo)
            self._undo = undo.pop_all()
        self._open, self._thread = True, threading.get_ident()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread != threading.get_ident():  # whose modes and hooks are others
            raise RuntimeError("capture: close it in the thread that opened it")
        self._open = False
        self._undo.close()

    def _claim(self, undo: contextlib.ExitStack) -> None:
        """Refuse a model that is captured already, in this thread or another."""
        mine = set(map(id, self.contents.parameters.values()))
        with _LOCK:
            if mine & _OPEN:
                raise RuntimeError(
                    "capture: this model, or a part of it, is in a capture that is open; close "
                    "that one first, or capture a copy of the model made outside of it"
                )
            _OPEN.update(mine)
        undo.callback(_OPEN.difference_update, mine)

    def as_written(self) -> contextlib.AbstractContextManager:
        """Inside, a compiled model runs as written."""
        return contextlib.nullcontext()

    def __deepcopy__(self, memo: dict) -> Any:
        raise TypeError("capture: an open capture cannot be copied; make another for the copy")

    def __reduce__(self) -> Any:
        raise TypeError("capture: a capture cannot be pickled; pickle the rows, or its plan")

    def _attach(self, undo: contextlib.ExitStack) -> None:
        """Change the model, and register on `undo` how to change it back."""

    _loss_dims: tuple[int, ...] = (1,)

    def check(self, losses: Tensor) -> None:
        """Refuse losses that are not one per example of a batch that holds some."""
        if not self._open:
            raise RuntimeError("rows: call it inside `with dropinf.capture(...) as tap:`")
        if not isinstance(losses, Tensor) or losses.dim() not in self._loss_dims:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"rows: need one loss per example, [B], got {got or 'a scalar'}; {_way_out(losses)}"
            )
        if not len(losses):
            raise ValueError("rows: the batch holds no example")

    def empty_rows(self, losses: Tensor, num_rows: int) -> Tensor:
        """[num_rows, R] for these losses: float32, or float64 for float64 losses."""
        dtype = torch.promote_types(losses.dtype, torch.float32)
        return torch.empty(num_rows, self.plan.width, dtype=dtype, device=losses.device)


def _way_out(losses: Any) -> str:
    """How losses of another shape become one for each example."""
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else ()
    if len(shape) == 2 and shape[1] == 1:
        return "take losses[:, 0]"
    if shape:
        return "sum over all dimensions but the example's"
    return (
        "a mean or sum is of all examples together, so use reduction='none' and sum over positions "
        "only; for a model of transformers, whose .loss is a mean, see loss_fn_for in "
        "dropinf.integrations.transformers"
    )


def eager(undo: contextlib.ExitStack) -> None:
    """Have compiled functions run as written until `undo`, in whatever order captures close."""
    with _LOCK:
        _EAGER.append(_EAGER[0] if _EAGER else torch.compiler.set_stance("force_eager"))

    def put_back() -> None:
        with _LOCK:
            stance = _EAGER.pop()
            if not _EAGER:
                stance.__exit__(None, None, None)

    undo.callback(put_back)


class Entered:
    """A hook that tells a tap what its model was given; that of a copied model tells nobody."""

    def __init__(self, tap: Any = None) -> None:
        self._tap = (lambda: None) if tap is None else weakref.ref(tap)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tap = self._tap()
        if tap is not None and module is tap.model:
            tap.entered(args, kwargs)

    def __reduce__(self) -> Any:
        return Entered, ()
