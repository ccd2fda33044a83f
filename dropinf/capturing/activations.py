"""mode="activations": rows from each layer's input and output gradient, in one backward pass.

A parameter's row is the sum of two parts. Where it meets data in closed form (`closing`), a site
writes the sampled entries of each example's gradient in one backward pass over all losses, if the
walk over the graph finds whose its output is. What plain autograd hands to the parameters
themselves, and what sites saw whose owners were lost, comes from a backward pass for each loss.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from dropinf.capturing.backward import Backward
from dropinf.capturing.call_args import argument
from dropinf.capturing.checkpoints import Region
from dropinf.capturing.closing import Closing
from dropinf.capturing.entries import Entries
from dropinf.capturing.kept import kept_of
from dropinf.capturing.passes import Used, only_these_require_grad
from dropinf.capturing.reading import A_PASS, Reading
from dropinf.capturing.rowmap import RowMap
from dropinf.capturing.rules import opened
from dropinf.capturing.segments import segments, tokens
from dropinf.capturing.tap import Entered, NotClosedError, Tap, eager
from dropinf.compression import ParamPlan, Plan
from dropinf.text_table import printable
from dropinf.user_warning import warn_user

# Passes that fill .grad, with the mode on inside of them.
_OUTSIDE = {f: opened(f) for f in (torch.autograd.backward, Tensor.backward)}


class ActivationsTap(Tap):
    """Rows from each layer's input and output gradient.

    Attributes:
        passes: parameters for which the last rows took a pass for each loss -> why.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        backend: str | None,
        per: str = "example",
        batch_dim: int | None = None,
    ) -> None:
        super().__init__(model, plan, backend)
        self._per, self._batch_dim = per, batch_dim or 0
        self._loss_dims = (1,) if per == "example" else (1, 2)
        self.probe = torch.zeros((), requires_grad=True)
        self._backward: Backward | None = None
        self._warned = False
        self.outside = False  # in a backward pass that fills .grad, and is not one of `rows`
        self.passes: dict[str, str] = {}

    def _attach(self, undo: contextlib.ExitStack) -> None:
        contents, options = self.contents, (self.backend, self._per, self._batch_dim)
        everything = contents.everything()
        self._kept = kept_of(self.model, self.plan, self.parameters, options)
        self._slot_of = dict(self._kept.slot_of)
        froze = any(p.requires_grad and id(p) not in self._slot_of for p in everything)
        constants = [*everything, *contents.buffers()]
        self._closing = Closing(self, self._kept, constants, self._per, self._batch_dim, froze)
        only_these_require_grad(self.parameters, everything, undo)
        self._used = Used(contents, undo)
        for module in contents.modules if self.sharded else ():
            swapped = [
                (owner, name, self._slot_of[id(p)])
                for owner in (module.modules() if module in contents.sharded else [module])
                for name, p in owner._parameters.items()
                if id(p) in self._slot_of
            ]
            if swapped:  # at each call, after its own hook, which gathers them
                handle = module.register_forward_pre_hook(self._look_up(swapped))
                undo.callback(handle.remove)
        self._batch: torch.Size | None = None
        handle = self.model.register_forward_pre_hook(Entered(self), prepend=True, with_kwargs=True)
        undo.callback(handle.remove)
        self._compiled = None  # what calls the model, if torch.compile was given all of it
        if "torch._dynamo" in sys.modules:  # compiled code would bypass the mode
            from dropinf.capturing.compiled.forward import compiled_forward

            if self._per == "example" and not self.sharded:
                self._compiled = compiled_forward(self.given, self.model)
            if self._compiled is not None:
                self._compiled.attach(self, self._closing, undo)
            eager(undo)
        undo.enter_context(self._closing)  # last in and first out: it must not see the rest

    def _look_up(self, swapped: list[tuple[nn.Module, str, ParamPlan]]) -> Callable[..., None]:
        def look_up(module: nn.Module, args: Any) -> None:
            for owner, name, slot in swapped:
                p = owner._parameters[name]
                self._slot_of[id(p)] = slot
                with torch._C.DisableTorchFunction():
                    self._closing.track(p, slot)

        return look_up

    def entered(self, args: Any, kwargs: Any) -> None:
        """The model was called: the shape of its first argument is the batch's."""
        if self._backward is None:  # no checkpoint, which runs it again
            tensors = [a for a in tree_iter((args, kwargs)) if isinstance(a, Tensor)]
            self._batch = self._closing.entered(tensors)

    @property
    def examples(self) -> int | None:
        """How many examples the model was last given, by its first argument; None: not known."""
        return self._closing.hints.examples

    def rows(
        self,
        losses: Tensor,
        *,
        segment_ids: Tensor | None = None,
        loss_scale: float = 1.0,
        retain_graph: bool = False,
    ) -> Tensor:
        """[B, R]: row b is the gradient of losses[b].

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
            ValueError: losses are not one per example, or a layer does not keep the tokens apart.
            RuntimeError: nothing tracked is in the graph of the losses.
        """
        with torch._C.DisableTorchFunction():
            run, entries = self._backward_of(losses, segment_ids)
        around, self._backward = self._backward, run  # a pass whose hook calls this
        self._closing.show_all(True)
        compiled = contextlib.nullcontext() if self._compiled is None else self._compiled.passes()
        try:
            with compiled:
                run.run(retain_graph)
        finally:
            self._backward = around
            self._closing.show_all(around is not None)
        with torch._C.DisableTorchFunction():
            rows = self._finished(run, entries)
            return rows if loss_scale == 1 else rows.div_(loss_scale)

    def _backward_of(self, losses: Tensor, segment_ids: Tensor | None) -> tuple[Backward, Entries]:
        self.check(losses)
        if not losses.requires_grad:
            self._closing.refuse_cut_off(set())
            raise _unconnected()
        row_map = self._row_map(losses, segment_ids)
        rows = self.empty_rows(losses, row_map.num_rows)
        if self.plan.has_entry_maps:
            rows.zero_()  # parameters add to entries that they share
        entries = Entries(rows, row_map, self.backend, self.plan.prepared)
        everything = self._used.everything()
        given = losses, entries, self._slot_of, self, everything, self.sharded, self._kept
        return Backward(*given), entries

    def _finished(self, run: Backward, entries: Entries) -> Tensor:
        """The rows, and what is to be said of them."""
        self._closing.refuse_cut_off(entries.touched)
        if not entries.touched and not run.reading.reached:
            raise _unconnected()
        self.met |= entries.touched
        self.passes = run.reading.passes
        if self._compiled is not None:
            self._compiled.judge(self.passes_said())
        self._note_paths(run.reading, entries, run.num_losses)
        for slot in self.plan.slots:
            # Did not meet this batch.
            if slot.entry_map is None and slot.name not in entries.touched:
                entries.rows[:, slot.entries].zero_()
        return entries.rows

    def _note_paths(self, reading: Reading, entries: Entries, B: int) -> None:
        """Keep how each parameter was captured, and say once what costs a pass for each loss."""
        for name, path in reading.paths.items():
            # Of a batch of one, which does not show why.
            if path != A_PASS or not self.plan.paths.get(name, "").startswith(f"{A_PASS}: "):
                self.plan.paths[name] = path
        self.plan.paths.update(dict.fromkeys(entries.formed, "gradient formed"))
        # Left to autograd for nothing, as after a loss that mixed the examples: back again.
        helped = {key for key in self._kept.shared if reading.passes.keys().isdisjoint(key[1:])}
        shared = helped | reading.shared
        if shared != self._kept.shared:
            self._kept.share_out(shared)
            self._closing.hints = replace(self._closing.hints, shared=self._kept.shared)
        if reading.passes and not self._warned and B > 1:
            self._warned = True
            warn_user(
                f"rows: a backward pass for each of the {B} losses, for {self.passes_said()}. Rows "
                "are exact, and slow; see plan.describe(), and dropinf.keeps_examples for kernels "
                "of your own"
            )

    def passes_said(self) -> str:
        """Some of `passes`, for people; empty if there are none."""
        some = [f"{printable(n)} ({printable(why)})" for n, why in list(self.passes.items())[:3]]
        more = f" and {len(self.passes) - 3} more" if len(self.passes) > 3 else ""
        return "; ".join(some) + more

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, functions run as if there were no capture."""
        self._closing.__exit__(None, None, None)
        try:
            yield
        finally:
            self._closing.__enter__()

    def as_written(self) -> contextlib.AbstractContextManager:
        """Inside, a compiled model runs as written."""
        return super().as_written() if self._compiled is None else self._compiled.as_written()

    # What the sites and the mode ask.

    def writer_now(self) -> Backward | None:
        """The pass of `rows` that asks; None in any other backward pass."""
        run = self._backward
        return run if run is not None and run.is_running() else None

    def gradients(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Calls of torch.autograd while the capture is open."""
        if self._backward is not None:
            if func is torch.autograd.backward:
                with self._closing:
                    return self._backward.inside(args, kwargs)
            return func(*args, **kwargs)
        if func is torch.autograd.grad:
            inputs = argument(args, kwargs, 1, "inputs", ())
            for t in inputs if isinstance(inputs, (list, tuple)) else [inputs]:
                leaf = t if isinstance(t, Tensor) else getattr(t.node, "variable", None)
                name = None if leaf is None else self._closing.asked(leaf)
                if name is not None:
                    raise NotClosedError(name)
            return func(*args, **kwargs)
        before, self.outside = self.outside, True
        try:
            with self._closing:
                return _OUTSIDE[func](*args, **kwargs)
        finally:
            self.outside = before

    def runs_again(self) -> tuple[bool, Region | None] | None:
        """None in a forward pass. In a backward pass of `rows`, whether it is torch's checkpoint
        that runs one again, and which."""
        return None if self._backward is None else Backward.runs_again()

    def refuse_outside(self) -> None:
        """A site is met by a backward pass that is not one of `rows`.

        Raises:
            RuntimeError: that pass fills .grad, of which the site would withhold a part.
        """
        if self._open and not self.outside:
            return
        raise RuntimeError(
            "capture: a backward pass of what was computed inside of a capture would miss "
            "gradients of its parameters; call tap.rows(losses) inside, and run the model again "
            "outside for other gradients, or use capture(..., closed=False)"
        )

    def _row_map(self, losses: Tensor, segment_ids: Tensor | None) -> RowMap:
        """The rows of these losses; sets `num_examples` and `origin`."""
        if self._per != "segment" and segment_ids is not None:
            raise ValueError("rows: segment_ids need capture(..., per='segment')")
        if self._per == "example":
            self.num_examples = len(losses)
            return RowMap(len(losses))
        if self._per == "segment":
            if segment_ids is None:
                raise ValueError("rows: per='segment' needs segment_ids [B, T]")
            of_token, self.origin = segments(segment_ids)
        else:
            if self._batch is None or len(self._batch) < 2:
                raise ValueError("rows: per='token' needs a model whose first input is [B, T, ...]")
            B, T = self._batch[:2] if self._batch_dim == 0 else self._batch[1::-1]
            of_token, self.origin = tokens(B, T)
        self.num_examples = len(of_token)
        return RowMap(len(of_token), of_token)


def _unconnected() -> RuntimeError:
    return RuntimeError(
        "rows: the losses do not depend on any tracked parameter; run the model inside "
        "`with dropinf.capture(...)`, with gradients enabled"
    )
