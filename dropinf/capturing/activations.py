"""mode="activations": rows from each layer's input and output gradient, in one backward pass.

While the capture is open, `Meetings` watches every torch function. Where a tracked parameter meets
data the call is passed through an autograd function whose backward writes the sampled entries of
each example's gradient into the rows. Autograd is handed copies of the parameters that do not
require grad, so it never forms a weight gradient; one that comes nevertheless shows a use that
torch functions do not, and is refused.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from dropinf.capturing.entries import Entries
from dropinf.capturing.marks import Marks
from dropinf.capturing.meetings import Meetings
from dropinf.capturing.rowmap import RowMap
from dropinf.capturing.tap import Tap, sharded_modules
from dropinf.compression import ParamPlan, Plan
from dropinf.text_table import printable


class ActivationsTap(Tap):
    """Rows from each layer's input and output gradient."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        backend: str | None,
        per: str = "example",
        batch_dim: int | dict[str, int] | None = None,
    ) -> None:
        super().__init__(model, plan, backend)
        self._per, self._batch_dim = per, batch_dim
        self._loss_dims = (1,) if per == "example" else (1, 2)

    def _attach(self, undo: contextlib.ExitStack) -> None:
        slots = {id(p): s for s, p in zip(self.plan.slots, self.parameters, strict=True)}
        everything = [*self.model.parameters(), *self.model.buffers()]
        constants = [t for t in everything if id(t) not in slots]
        self._meetings = meetings = Meetings(constants, self._per)
        by_name = isinstance(self._batch_dim, dict)
        meetings.batch_dim = None if by_name else self._batch_dim
        self._outer_dims: list[int | None] = []
        for p in self.model.parameters():
            undo.callback(p.requires_grad_, p.requires_grad)
            # Of what is tracked autograd sees copies that do not require grad; if a gradient comes
            # nevertheless, the parameter went into something that torch functions do not show.
            p.requires_grad_(id(p) in slots)
        self._hooked: Marks[bool] = Marks()
        self._on_gradients = contextlib.ExitStack()
        undo.callback(self._on_gradients.close)
        for slot, p in zip(self.plan.slots, self.parameters, strict=True):
            self._track(p, slot)
        sharded = sharded_modules(self.model)
        for name, module in self.model.named_modules():
            own = [
                (owner, n, slots[id(p)])
                for owner in (module.modules() if module in sharded else [module])
                for n, p in owner._parameters.items()
                if id(p) in slots
            ]
            dims = [
                d
                for pattern, d in (self._batch_dim.items() if by_name else ())
                if fnmatchcase(name, pattern)
            ]
            enter = self._enter(module is self.model, dims[0] if dims else None)
            handles = [
                # First of the hooks that run before the forward, and last of them: a sharded module
                # gathers its parameters in one of its own.
                module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
                module.register_forward_hook(
                    self._leave(dims[0] if dims else None), always_call=True
                ),
            ]
            if own:
                handles.append(module.register_forward_pre_hook(self._look_up(own)))
            for handle in handles:
                undo.callback(handle.remove)
        if "torch._dynamo" in sys.modules:  # compiled code would bypass hooks and mode
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(meetings)  # last in and first out: it must not see the rest

    def _track(self, parameter: Tensor, slot: ParamPlan) -> None:
        self._meetings.track(parameter, slot)

        def unseen(p: Tensor) -> None:
            p.grad = None
            self._meetings.refused[slot.name] = (
                "handed to an autograd.Function or a scripted or transformed function, whose "
                "inside is not seen"
            )

        with torch._C.DisableTorchFunction():
            if parameter.requires_grad and self._hooked.get(parameter) is None:
                self._hooked.set(parameter, True)
                handle = parameter.register_post_accumulate_grad_hook(unseen)
                self._on_gradients.callback(handle.remove)

    def _look_up(self, own: list[tuple[nn.Module, str, ParamPlan]]) -> Callable[..., None]:
        def look_up(module: nn.Module, args: Any) -> None:
            for owner, name, slot in own:  # a sharded module swaps them at each call
                self._track(owner._parameters[name], slot)

        return look_up

    def _enter(self, is_root: bool, batch_dim: int | None) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            meetings = self._meetings
            meetings.depth += 1
            meetings.started = True
            if batch_dim is not None:
                self._outer_dims.append(meetings.batch_dim)
                meetings.batch_dim = batch_dim
            if is_root and meetings.entries is None:
                tensors = [a for a in tree_iter((args, kwargs)) if isinstance(a, Tensor)]
                meetings.inputs(tensors)

        return enter

    def _leave(self, batch_dim: int | None) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._meetings.depth -= 1
            if batch_dim is not None:
                self._meetings.batch_dim = self._outer_dims.pop()

        return leave

    def rows(
        self,
        losses: Tensor,
        *,
        segment_ids: Tensor | None = None,
        loss_scale: float = 1.0,
        retain_graph: bool = False,
    ) -> Tensor:
        """[B, R] rows of losses [B], from one backward pass over their sum.

        Args:
            losses: one for each example, [B]. Per token or segment, any shape: they are summed.
            segment_ids: [B, T] integers, for capture(per="segment"): which segment of its packed
                sequence each position belongs to, negative for none.
            loss_scale: what the losses were multiplied by (`GradScaler.get_scale()`); taken out.
            retain_graph: keep the graph, for the rows of another loss of the same pass.

        Returns:
            [B, R]; per="token" [B * T, R], example by example, the sum of whose rows is the
            example's; per="segment" [S, R], the segments in the order of (b, segment id).

        Raises:
            ValueError: losses are not one per example, or a layer's input does not have the
                examples in dimension 0.
            RuntimeError: a parameter met a function that this mode cannot take, or nothing did.
        """
        self.check(losses)
        meetings = self._meetings
        self._raise_refused()
        unconnected = RuntimeError(
            "rows: the losses do not depend on any tracked parameter; run the model inside "
            "`with dropinf.capture(...)`, with gradients enabled"
        )
        if not losses.requires_grad:
            raise unconnected
        row_map = self._row_map(losses, segment_ids)
        rows = self.empty_rows(losses, row_map.num_rows)
        if self.plan.has_entry_maps:
            rows.zero_()  # parameters add to entries that they share
        entries = Entries(rows, row_map, loss_scale, self.backend, self.plan.prepared)
        with torch._C.DisableTorchFunction():
            before = [p.grad for p in self.parameters]
            for p in self.parameters:
                p.grad = None
        meetings.entries = entries
        try:
            torch.autograd.backward(losses, torch.ones_like(losses), retain_graph=retain_graph)
        finally:
            meetings.entries = None
            meetings.started = False
            with torch._C.DisableTorchFunction():
                for p, grad in zip(self.parameters, before, strict=True):
                    p.grad = grad
        self._raise_refused()  # what a checkpoint ran in the backward pass
        if not entries.touched:
            raise unconnected
        self.met |= entries.touched
        self.plan.paths.update(meetings.paths)
        self.plan.paths.update(dict.fromkeys(entries.formed, "gradient formed"))
        for slot in self.plan.slots:
            # Did not meet this batch.
            if slot.entry_map is None and slot.name not in entries.touched:
                rows[:, slot.entries].zero_()
        return rows

    def _raise_refused(self) -> None:
        refused = self._meetings.refused
        if refused:
            listed = "\n".join(f"  {self._described(n)}{why}" for n, why in sorted(refused.items()))
            raise RuntimeError(
                f"rows: mode='activations' cannot take these parameters:\n{listed}\n"
                "Leave them out with Plan.make(..., exclude=[...]), freeze them with "
                "requires_grad_(False) before Plan.make, or use mode='grads'."
            )

    def _described(self, name: str) -> str:
        slot = next((slot for slot in self.plan.slots if slot.name == name), None)
        if slot is None:
            return f"{printable(name)}: "
        owner = self.model.get_submodule(name.rpartition(".")[0])
        return f"{printable(name)}: shape {slot.shape}, of {type(owner).__name__}, "

    def _row_map(self, losses: Tensor, segment_ids: Tensor | None) -> RowMap:
        """Which row each position belongs to; sets `num_examples` and `origin`."""
        if self._per != "segment" and segment_ids is not None:
            raise ValueError("rows: segment_ids need capture(..., per='segment')")
        if self._per == "example":
            self.num_examples = len(losses)
            return RowMap(len(losses))
        if self._per == "segment":
            if segment_ids is None:
                raise ValueError("rows: per='segment' needs segment_ids [B, T]")
            of_token, self.origin = _segments(segment_ids)
        else:
            batch = self._meetings.batch
            if batch is None or len(batch) < 2:
                raise ValueError("rows: per='token' needs a model whose first input is [B, T, ...]")
            B, T = (batch[1], batch[0]) if self._meetings.batch_dim == 1 else batch[:2]
            of_token = torch.arange(B * T).reshape(B, T)
            self.origin = torch.stack([of_token.flatten() // T, of_token.flatten() % T], 1)
        self.num_examples = len(of_token)
        return RowMap(len(of_token), of_token)


def _segments(segment_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T] row of each position, -1 for none, and [S, 2] the (b, segment id) of each row."""
    if segment_ids.dim() != 2 or segment_ids.is_floating_point():
        raise ValueError(
            f"rows: segment_ids must be integers [B, T], got {segment_ids.dtype} "
            f"{tuple(segment_ids.shape)}"
        )
    segment_ids = segment_ids.long().cpu()
    b = torch.arange(len(segment_ids))[:, None].expand_as(segment_ids)
    real = segment_ids >= 0
    pairs = torch.stack([b[real], segment_ids[real]], 1)
    origin, rows = pairs.unique(dim=0, return_inverse=True)
    of_token = torch.full_like(segment_ids, -1)
    of_token[real] = rows
    return of_token, origin
