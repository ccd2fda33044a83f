"""The backward passes that give the rows of one batch of losses."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropinf.capturing.call_args import argument
from dropinf.capturing.checkpoints import Region, reentrant, runs_again
from dropinf.capturing.entries import Entries
from dropinf.capturing.graph import FormSite, Passes, of_one
from dropinf.capturing.kept import Kept, Record, calls_in
from dropinf.capturing.owners import Array
from dropinf.capturing.passes import taken
from dropinf.capturing.reading import A_PASS, Reading
from dropinf.capturing.rowmap import TokensDiffer
from dropinf.capturing.rules import opened
from dropinf.capturing.streams import Streams
from dropinf.capturing.walk import Found, walk
from dropinf.capturing.writes import writing_of
from dropinf.compression import ParamPlan

# Not shown to the mode, which stays on inside: a checkpoint runs its forward again there.
_BACKWARD = opened(torch.autograd.backward)


class Backward:
    """Fills `entries`, from one pass over all losses where owners are known, else one for each.

    Attributes:
        reading: how each parameter was captured.
        num_losses: B.
    """

    def __init__(
        self,
        losses: Tensor,
        entries: Entries,
        slot_of: Mapping[int, ParamPlan],
        tap: Passes,
        everything: Sequence[Tensor],
        sharded: bool,
        kept: Kept,
    ) -> None:
        """`everything` is all parameters of the model, which `sharded` gathers for each forward."""
        self._losses, self._entries, self._slot_of = losses, entries, slot_of
        self._tap, self._everything, self._sharded = tap, everything, sharded
        self._kept, self._T = kept, entries.map.T
        self.num_losses = len(losses)
        self._one = self.num_losses == 1 and self._T is None  # whose is everything
        self.reading = Reading()
        self._found = Found()
        self._trace: Any = None
        self._record: Record | None = None
        self._calls: list[Any] = []  # of compiled code
        self._all = False  # sites write in the passes of one loss, whatever was found of them
        self._b: int | None = None
        self._tasks: set[int] = set()
        self._streams = Streams(entries.rows)

    def run(self, retain_graph: bool) -> None:
        """All passes; the graph is kept if asked for."""
        T, one = self._T, self._one
        with torch._C.DisableTorchFunction():
            self._read()
        passes, found = self.reading.passes, self._found
        if found.checkpoints and not passes and not one:
            self._all_losses(True)  # checkpoints show their inside in this pass
            if not passes:
                return
            self._entries.restart()
        if T is not None and found.opaque:
            passes.setdefault("(all parameters)", f"{found.opaque}, which is not known")
        if T is not None and passes:
            name, why = next(iter(passes.items()))
            raise ValueError(
                f"rows: {name!r} has no rows of its own for tokens ({why}); leave the layer out "
                "with exclude=, or take rows per example"
            )
        # What parameters were made into is pulled back from the same graph.
        retain_graph = retain_graph or (bool(passes) and self.reading.pulls)
        self._all = one or bool(found.checkpoints)
        closed = self.reading.closed and not self._all
        if passes or self._all or found.opaque:
            with taken(self._leaves(), self._take):
                for b in range(self.num_losses):
                    self._one_loss(b, retain_graph or closed or b + 1 < self.num_losses)
        if self._all and not one:
            why = next(iter(passes.values()))
            self.reading.paths = dict.fromkeys(self._entries.touched, f"{A_PASS}: {why}")
        if closed:
            self._all_losses(retain_graph)

    def _read(self) -> None:
        """Find out whose what is: as it was for such a graph, or by a walk."""
        losses, T = self._losses, self._T
        trace = None if self._sharded else self._kept.trace(losses, self._tap)
        record = None if trace is None else self._kept.recall(trace, T)
        if record is None:
            self._found = walk([(losses, _seeds(losses, T))], T)
            ours = self._only_ours()
            self.reading.add(self._found, self._slot_of, self._one)
            if trace is not None and ours:
                writing = partial(writing_of, self._found, self._slot_of, self._entries)
                record = self._kept.remember(trace, T, self._found, self.reading, writing)
        else:
            self._found = self._kept.found(trace, record)
            self.reading = record.reading.copy()
        self._trace = trace  # by which nodes are found as long as it lives
        if record is not None and record.written:
            self._record, self._calls = record, calls_in(trace)

    def _only_ours(self) -> bool:
        """Whether all sites are of this capture; those of others write nothing.

        Raises:
            RuntimeError: some are of a capture that is closed.
        """
        others = [node for node in self._found.owners if node.tap is not self._tap]
        for node in others:
            node.tap.refuse_outside()
            del self._found.owners[node]
        return not others

    def _told(self) -> bool:
        """Whether a pass is told what it is for, so that it forms nothing else.

        The backward of a reentrant checkpoint, and that of sharded parameters, must not be.
        """
        return not (self._sharded or self._found.checkpoints or self._found.opaque)

    def _leaves(self) -> list[Tensor]:
        """The parameters that a pass may give a gradient to."""
        if not self._told():
            return [*self._everything, *(leaf for leaf, _ in self._found.leaves.values())]
        return [leaf for leaf, _ in self._found.leaves.values() if id(leaf) in self._slot_of]

    # Passes.

    def _all_losses(self, retain_graph: bool) -> None:
        self._b = None
        with contextlib.nullcontext() if self._told() else taken(self._leaves(), self._take):
            self._pass(self._losses, retain_graph, [self._tap.probe] if self._told() else None)

    def _one_loss(self, b: int, retain_graph: bool) -> None:
        self._b = b
        inputs = [*self._leaves(), *([self._tap.probe] if self.reading.lost or self._all else [])]
        self._pass(self._losses[b], retain_graph, inputs if self._told() else None)

    def _pass(self, losses: Tensor, retain_graph: bool, inputs: list[Tensor] | None) -> None:
        self._tasks.clear()
        writes = self._record is not None and (self._b is None or self._one)
        with torch._C.DisableTorchFunction():
            handle = losses.register_hook(self._started)
            ones = torch.ones_like(losses)
        if writes:
            self._trace.begin(self._entries.rows, self._record.writing)
            for call, of in zip(self._calls, self._record.inside, strict=True):
                self._trace.begin_call(call.native, of)
        try:
            _BACKWARD(losses, ones, retain_graph=retain_graph, inputs=inputs)
            if writes:
                self._note_written()
        finally:
            handle.remove()
            self._tasks.clear()
            self._streams.end()
            if writes:
                self._trace.end()

    def _note_written(self) -> None:
        """The parameters whose sites wrote by themselves."""
        silent = [self._trace.sites[k] for k in self._trace.silent()]
        for call in self._calls:
            silent += [call.sites[k] for k in call.native.silent()]
        idle = {slot.name for node in silent for slot in node.site.slots}
        self._entries.touched |= self._record.written - idle

    def _started(self, grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        self._tasks.add(task)
        if self._record is not None and (self._b is None or self._one):
            self._trace.started(task)

    def is_running(self) -> bool:
        """Whether the backward pass that asks is one of these, and not one inside of a hook."""
        return torch._C._current_graph_task_id() in self._tasks

    @classmethod
    def runs_again(cls) -> tuple[bool, Region | None]:
        """Whether torch's checkpoint runs a forward pass again inside of these, and which."""
        return runs_again(cls._pass.__code__)

    def _take(self, p: Tensor) -> None:
        """A leaf has got its gradient."""
        slot = self._slot_of.get(id(p))
        if slot is not None and self._b is not None:
            self.reading.reached = True
            self._streams.enter()
            self._entries.add_gradient(slot, p.grad, self._b)
            self.reading.paths.setdefault(slot.name, A_PASS)

    def write(self, node: Any, x: Tensor | None, dy: Tensor) -> None:
        """The node of a site has its gradient."""
        site, owners = node.site, self._found.owners_of(node)
        if self._b is None:
            if owners is None or isinstance(owners, str):
                return
        elif self._all or isinstance(owners, str):
            if self._all and owners is None:
                self.reading.add_site(site, None)
            owners = of_one(self._b, dy.dim())
        else:
            return
        self._streams.enter()
        try:
            if isinstance(site, FormSite):
                self._entries.sample(site.form, site.targets, x, dy, owners)
            else:
                ((source, _),) = site.targets
                self._entries.pull(source, site.shape, dy, owners)
        except TokensDiffer as error:
            raise ValueError(
                f"rows: {site.slots[0].name!r} met {error}; leave the layer out with exclude="
            ) from None

    # Reentrant checkpoints, which run a forward and a backward pass inside of a backward pass.

    def inside(self, args: tuple, kwargs: dict) -> None:
        """A backward pass that was started inside of one of these."""
        frame = reentrant(Backward._pass.__code__)
        if frame is None or not self.is_running():
            _BACKWARD(*args, **kwargs)
            return
        if self._b is None:
            self._walk_inside(frame)
        tensors = argument(args, kwargs, 0, "tensors", ())
        with torch._C.DisableTorchFunction():
            handles = [t.register_hook(self._started) for t in tensors]
        try:
            _BACKWARD(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _walk_inside(self, frame: FrameType) -> None:
        """Find the owners inside of a checkpoint, and whether those of its arguments were right."""
        node, outputs = frame.f_locals["ctx"], frame.f_locals["outputs"]
        given, claims = self._found.checkpoints.get(node, ((), ()))
        starts = [
            (t, owners)
            for t, owners in zip(outputs, given, strict=False)
            if isinstance(t, Tensor) and t.requires_grad and owners is not None
        ]
        with torch._C.DisableTorchFunction():
            inner = walk(starts, self._entries.map.T)
        inputs = [t for t in frame.f_locals["detached_inputs"] if isinstance(t, Tensor)]
        for t, claim in zip(inputs, claims, strict=False):
            _, owners = inner.leaves.pop(id(t), (t, claim))
            if t.requires_grad and not _same(owners, claim):
                self.reading.passes.setdefault(
                    "(a reentrant checkpoint)", "its inside moves examples"
                )
        self._found.owners.update(inner.owners)
        self._found.checkpoints.update(inner.checkpoints)
        self._found.leaves.update(inner.leaves)
        self.reading.add(self._found, self._slot_of, one=False)


def _same(one: Array | str, other: Array | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return False
    return np.array_equal(*np.broadcast_arrays(one, other))


def _seeds(losses: Tensor, T: int | None) -> Array:
    """The owners of the losses themselves."""
    B = len(losses)
    if T is None:
        return np.arange(B)
    if losses.dim() == 2 and losses.shape[1] == T:
        return np.arange(B * T).reshape(B, T)
    return (-2 - np.arange(B)).reshape(B, *(1,) * (losses.dim() - 1))
