"""What a meeting leaves in the autograd graph: the nodes whose backward writes entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dropinf.capturing.entries import Entries


class Watch(Protocol):
    """Who knows the rows of the backward pass that is running."""

    entries: Entries | None


class Output(torch.autograd.Function):
    """The identity on the results of a call; its backward has their gradients and the saved data.

    The probe is a leaf that requires grad, so that autograd comes here although no parameter does.
    """

    @staticmethod
    def forward(
        ctx: Any, watch: Watch, write: Callable, probe: Tensor, num_saved: int, *tensors: Any
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:num_saved])
        ctx.watch, ctx.write, ctx.num_saved = watch, write, num_saved
        # Not views of the results: a later in-place activation would be refused on one.
        return tuple(y.data for y in tensors[num_saved:])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(dy is not None for dy in dys):
            saved = ctx.saved_tensors  # which a checkpoint may make anew, watched
            with torch._C.DisableTorchFunction():
                ctx.write(_running(ctx.watch), saved, list(dys))
        need = ctx.needs_input_grad[4 + ctx.num_saved :]
        passed = (dy if needed else None for dy, needed in zip(dys, need, strict=True))
        return (None,) * (4 + ctx.num_saved) + tuple(passed)


class Operand(torch.autograd.Function):
    """A parameter, expanded over the batch; its backward has the gradient of all of that."""

    @staticmethod
    def forward(
        ctx: Any, watch: Watch, write: Callable, probe: Tensor, p: Tensor, shape: tuple
    ) -> Tensor:
        ctx.watch, ctx.write = watch, write
        return p.detach().expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        with torch._C.DisableTorchFunction():
            ctx.write(_running(ctx.watch), grad)
        return None, None, None, None, None


def _running(watch: Watch) -> Entries:
    if watch.entries is None:
        raise RuntimeError("capture: the backward pass ran outside tap.rows(losses)")
    return watch.entries
