"""Tap: what both modes of capture share."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dropinf.plan import Plan


class Tap:
    """One opened capture: the plan's parameters found in the model.

    Attributes:
        met: names of the parameters that had a gradient in some batch so far.
    """

    def __init__(self, model: nn.Module, plan: Plan, backend: str | None) -> None:
        self.model, self.plan, self.backend = model, plan, backend
        found = dict(model.named_parameters(remove_duplicate=False))
        for slot in plan.slots:
            shape = tuple(found[slot.name].shape) if slot.name in found else "none"
            if shape != slot.shape:
                raise ValueError(
                    f"capture: the plan has a parameter {slot.name!r} of shape {slot.shape}, "
                    f"the model {shape}; make a plan for this model with Plan.make"
                )
        self.parameters = [found[slot.name] for slot in plan.slots]
        self.met: set[str] = set()
        self._open = False
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Any:
        if self._open:
            raise RuntimeError("capture: this capture is open already; make one for each `with`")
        with contextlib.ExitStack() as undo:
            self._attach(undo)
            self._undo = undo.pop_all()
        self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = False
        self._undo.close()

    def _attach(self, undo: contextlib.ExitStack) -> None:
        """Change the model, and register on `undo` how to change it back."""

    def check(self, losses: Tensor) -> None:
        """Refuse losses that are not one per example of a batch that holds some."""
        if not self._open:
            raise RuntimeError("rows: call it inside `with dropinf.capture(...) as tap:`")
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"rows: need one loss per example, [B], got {got or 'a scalar'}; a mean or sum "
                "would mix examples, so use reduction='none' and sum over positions only"
            )
        if not len(losses):
            raise ValueError("rows: the batch holds no example")

    def empty_rows(self, losses: Tensor) -> Tensor:
        """[B, R] rows for losses [B]: float32, or float64 for float64 losses."""
        dtype = torch.promote_types(losses.dtype, torch.float32)
        return torch.empty(len(losses), self.plan.width, dtype=dtype, device=losses.device)
