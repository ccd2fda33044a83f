"""Passes of one loss each: what the leaves of autograd's graph get, taken as it comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dropinf.capturing.contents import Contents


@contextlib.contextmanager
def taken(everything: Sequence[Tensor], take: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, `take` is called with each leaf of `everything` that has got a gradient.

    Gradients are freed as they come; the user's, and the user's hooks, which may be an optimizer's
    step, are put back.
    """

    def free(p: Tensor) -> None:
        if p.grad is not None:  # as it is where it is zero for sure
            p.grad = p.grad.to_dense()
            take(p)
            p.grad = None

    with torch._C.DisableTorchFunction():
        leaves = list({id(p): p for p in everything if p.requires_grad}.values())
    undo: list[Callable[[], None]] = []
    try:
        with torch._C.DisableTorchFunction():
            for p in leaves:
                undo.append(_give_way(p, free))
        yield
    finally:
        with torch._C.DisableTorchFunction():
            for put_back in undo:
                put_back()


def _give_way(p: Tensor, free: Callable[[Tensor], None]) -> Callable[[], None]:
    """Have `free` called with p's gradient in place of its own hooks; returns what undoes that."""
    grad, hooks = p.grad, p._post_accumulate_grad_hooks
    p.grad = None
    if hooks is not None:
        # The next one makes a list of them; after torch.utils.swap_tensors nobody reads an old one.
        p._post_accumulate_grad_hooks = None
    handle = p.register_post_accumulate_grad_hook(free)

    def put_back() -> None:
        handle.remove()
        if hooks:
            p._post_accumulate_grad_hooks = hooks
        p.grad = grad

    return put_back


def only_these_require_grad(
    these: Sequence[Tensor], everything: Sequence[Tensor], undo: contextlib.ExitStack
) -> None:
    """Set requires_grad of a model's parameters, until `undo`."""
    mine = set(map(id, these))
    before = [(p, p.requires_grad) for p in everything]

    def put_back() -> None:
        for p, required in before:
            if p.requires_grad != required:
                p.requires_grad_(required)

    undo.callback(put_back)
    for p, required in before:
        if required != (id(p) in mine):
            p.requires_grad_(not required)


class Used:
    """What the forward pass has in place of each parameter: a sharded module swaps them."""

    def __init__(self, contents: Contents, undo: contextlib.ExitStack) -> None:
        self._used = {id(p): p for p in contents.parameters.values()}
        for sharded in contents.sharded:
            below = [
                (id(p), module, name)
                for module in sharded.modules()
                for name, p in module._parameters.items()
                if p is not None
            ]
            handle = sharded.register_forward_pre_hook(self._note(below))  # behind its own
            undo.callback(handle.remove)

    def _note(self, below: list[tuple[int, nn.Module, str]]) -> Callable[..., None]:
        def note(*_: Any) -> None:
            for key, module, name in below:
                self._used[key] = module._parameters[name]

        return note

    def of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """In their order."""
        return [self._used[id(p)] for p in parameters]

    def everything(self) -> list[Tensor]:
        """All of the model's."""
        return list(self._used.values())
