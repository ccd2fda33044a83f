"""mode="grads": rows gathered from the gradients of the parameters, whatever layer made them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from torch import Tensor

from dropinf import ops
from dropinf.plan import Slot
from dropinf.tap import Tap


class GradsTap(Tap):
    """Rows from the .grad of the parameters, one backward pass an example."""

    def _attach(self, undo: contextlib.ExitStack) -> None:
        self._indices = [
            slot.index.to(p.device)
            for slot, p in zip(self.plan.slots, self.parameters, strict=True)
        ]

    def rows(self, losses: Tensor) -> Tensor:
        """[B, R] rows of losses [B]: one backward pass an example, so small batches are best.

        Gradients are freed as the backward pass goes; those that were there are put back.
        """
        self.check(losses)
        for slot, p in zip(self.plan.slots, self.parameters, strict=True):
            if not p.requires_grad:
                raise ValueError(
                    f"rows: {slot.name!r} does not require grad, so mode='grads' sees no gradient "
                    "of it; unfreeze it, or leave it out of the plan with exclude="
                )
        rows = self.empty_rows(losses).zero_()
        if not losses.requires_grad:
            raise RuntimeError("rows: the losses carry no gradient; run the model with it enabled")
        everything = list(self.model.parameters())
        before = [p.grad for p in everything]
        current = 0

        def take(slot: Slot, index: Tensor) -> Callable[[Tensor], None]:
            def gather(p: Tensor) -> None:
                part = ops.gather_grads(
                    [p.grad], [index], scales=[slot.scale], backend=self.backend
                )
                rows[current, slot.entries] += part.to(rows.device)
                p.grad = None
                self.met.add(slot.name)

            return gather

        with contextlib.ExitStack() as undo:
            for slot, p, index in zip(self.plan.slots, self.parameters, self._indices, strict=True):
                undo.callback(p.register_post_accumulate_grad_hook(take(slot, index)).remove)
            try:
                for p in everything:
                    p.grad = None
                for current in range(len(losses)):  # the hooks read it
                    losses[current].backward(retain_graph=current + 1 < len(losses))
            finally:
                for p, grad in zip(everything, before, strict=True):
                    p.grad = grad
        return rows

    def row(self) -> Tensor:
        """[R] row of the gradients that are in .grad now, in one launch.

        For a loop of one's own, left untouched: after its `loss.backward()`, this is the row of
        that loss, whatever example or microbatch it was. Nothing is freed.
        """
        return ops.gather_grads(
            [p.grad for p in self.parameters],
            self._indices,
            scales=[slot.scale for slot in self.plan.slots],
            backend=self.backend,
        )
