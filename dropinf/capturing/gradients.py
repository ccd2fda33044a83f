"""mode="grads": rows gathered from the gradients of the parameters, whatever layer made them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dropinf import ops
from dropinf.capturing.passes import Used, only_these_require_grad, taken
from dropinf.capturing.tap import Tap
from dropinf.compression import DenseProjection, Plan, SignedSums


class GradsTap(Tap):
    """Rows from the .grad of the parameters, one backward pass an example."""

    def __init__(
        self, model: nn.Module, plan: Plan, backend: str | None, unfreeze: bool = False
    ) -> None:
        super().__init__(model, plan, backend)
        self._unfreeze = unfreeze

    def _attach(self, undo: contextlib.ExitStack) -> None:
        if self._unfreeze:
            only_these_require_grad(self.parameters, self.contents.everything(), undo)
        weighted = any(
            slot.is_scaled or isinstance(slot.entry_map, SignedSums) for slot in self.plan.slots
        )
        self._indices, parts = [], []
        for slot, p in zip(self.plan.slots, self.parameters, strict=True):
            index, numbers, signs = slot.index, None, torch.ones(()).expand(len(slot.index))
            if isinstance(slot.entry_map, SignedSums):
                numbers, signs = slot.entry_map.groups
                index = index[numbers]
            self._indices.append(index.to(p.device))
            if weighted:
                wide = torch.promote_types(p.dtype, torch.float32)
                parts.append(slot.scaled(signs.to(wide), numbers).flatten())
        self._packed: Tensor | None = None  # the weights of all parameters,
        self._weights: list[Tensor | None] = [None] * len(self._indices)  # and of each
        if parts:
            self._packed = torch.cat(parts).to(self._indices[0].device)
            views = self._packed.split([len(part) for part in parts])
            self._weights = [
                view.to(index.device, part.dtype)  # the view, unless the parameters are not alike
                for view, index, part in zip(views, self._indices, parts, strict=True)
            ]
        self._used = Used(self.contents, undo)

    def rows(
        self, losses: Tensor, *, loss_scale: float = 1.0, retain_graph: bool = False
    ) -> Tensor:
        """[B, R] rows of losses [B]: one backward pass an example, so small batches are best.

        Gradients are freed as the backward pass goes; those that were there are put back.
        `loss_scale` and `retain_graph` are as in mode="activations".
        """
        self.check(losses)
        for slot, p in zip(self.plan.slots, self.parameters, strict=True):
            if not p.requires_grad:
                raise ValueError(
                    f"rows: {slot.name!r} does not require grad, so mode='grads' sees no gradient "
                    "of it; unfreeze it, or leave it out of the plan with exclude="
                )
        rows = self.empty_rows(losses, len(losses)).zero_()
        self.num_examples = len(losses)
        if not losses.requires_grad:
            raise RuntimeError("rows: the losses carry no gradient; run the model with it enabled")
        number = {id(p): l for l, p in enumerate(self._used.of(self.parameters))}
        current = 0

        def take(p: Tensor) -> None:
            l = number.get(id(p))
            if l is None:
                return
            slot = self.plan.slots[l]
            part = self._entries([l], [p.grad], self._weights[l], loss_scale)
            rows[current, slot.entries] += part.to(rows.device)
            self.met.add(slot.name)
            self.plan.paths[slot.name] = ".grad"

        with taken(self._used.everything(), take):
            for current in range(len(losses)):  # `take` reads it
                losses[current].backward(retain_graph=retain_graph or current + 1 < len(losses))
        return rows

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """As of mode="activations"; there is nothing to pause."""
        yield

    def row(self, *, loss_scale: float = 1.0) -> Tensor:
        """[R] row of the gradients that are in .grad now, in one launch.

        For a loop of one's own, left untouched: after its `loss.backward()`, this is the row of
        that loss, whatever example or microbatch it was. Nothing is freed. `loss_scale` is what
        the loss was multiplied by (`GradScaler.get_scale()`).
        """
        if self.sharded:
            raise RuntimeError(
                "row: the .grad of a sharded model is the mean over all ranks, of one shard; "
                "use tap.rows(losses)"
            )
        slots, grads = self.plan.slots, [p.grad for p in self.parameters]
        weights = self._packed
        if weights is not None and all(g is None or g.dtype != torch.float64 for g in grads):
            weights = weights.float()  # wider only if of float64 parameters without a gradient
        entries = self._entries(range(len(slots)), grads, weights, loss_scale)
        if not self.plan.has_entry_maps:
            return entries
        row = entries.new_zeros(self.plan.width)  # parameters add to entries that they share
        for slot, part in zip(slots, entries.split([slot.r for slot in slots]), strict=True):
            row[slot.entries] += part
        return row

    @torch.no_grad()  # a backward pass with create_graph=True leaves gradients that require grad
    def _entries(
        self,
        numbers: Sequence[int],
        grads: Sequence[Tensor | None],
        weights: Tensor | None,
        loss_scale: float,
    ) -> Tensor:
        """The entries of the parameters of these numbers, side by side, of their gradients."""
        slots = [self.plan.slots[l] for l in numbers]
        if any(isinstance(slot.entry_map, DenseProjection) for slot in slots):
            wide = [
                p.detach().new_zeros(p.shape) if g is None else g
                for p, g in zip((self.parameters[l] for l in numbers), grads, strict=True)
            ]
            parts = zip(slots, wide, strict=True)
            return torch.cat([s.entry_map(g.reshape(1, -1) / loss_scale)[0] for s, g in parts])
        indices = [self._indices[l] for l in numbers]
        entries = ops.gather_grads(grads, indices, weights=weights, backend=self.backend)
        return entries if loss_scale == 1 else entries / loss_scale
