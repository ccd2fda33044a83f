"""The backward passes that give the rows of one batch of losses."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from dropinf.capturing.call_args import argument
from dropinf.capturing.checkpoints import Region, reentrant, runs_again
from dropinf.capturing.entries import Entries
from dropinf.capturing.graph import FormSite, Site, of_one
from dropinf.capturing.owners import Array
from dropinf.capturing.passes import taken
from dropinf.capturing.rowmap import TokensDiffer
from dropinf.capturing.rules import opened
from dropinf.capturing.sources import Derived, Lookup
from dropinf.capturing.walk import Found, walk
from dropinf.compression import ParamPlan

# Not shown to the mode, which stays on inside: a checkpoint runs its forward again there.
_BACKWARD = opened(torch.autograd.backward)


class Backward:
    """Fills `entries`, from one pass over all losses where owners are known, else one for each.

    Attributes:
        paths: parameter -> how it was captured.
        passes: parameter -> why it takes a pass for each loss.
        shared: functions and parameters whose results several examples share.
        reached: whether any parameter is in the graph.
    """

    def __init__(
        self,
        losses: Tensor,
        entries: Entries,
        slot_of: Mapping[int, ParamPlan],
        probe: Tensor,
        everything: Sequence[Tensor],
        sharded: bool,
    ) -> None:
        """`everything` is all parameters of the model, which `sharded` gathers for each forward."""
        self._losses, self._entries, self._slot_of = losses, entries, slot_of
        self._probe, self._everything, self._sharded = probe, everything, sharded
        self.paths: dict[str, str] = {}
        self.passes: dict[str, str] = {}
        self.shared: set[tuple] = set()
        self.reached = False
        self._found = Found()
        self._all = False  # sites write in the passes of one loss, whatever was found of them
        self._b: int | None = None
        self._tasks: set[int] = set()

    def run(self, retain_graph: bool) -> None:
        """All passes; the graph is kept if asked for."""
        losses, T = self._losses, self._entries.map.T
        B = losses.shape[0]
        with torch._C.DisableTorchFunction():
            self._found = walk([(losses, _seeds(losses, T))], T)
        one = B == 1 and T is None  # whose is everything
        self._read(one)
        if self._found.checkpoints and not self.passes and not one:
            self._all_losses(True)  # checkpoints show their inside in this pass
            if not self.passes:
                return
            self._entries.restart()
        if T is not None and self._found.opaque:
            self.passes.setdefault("(all parameters)", f"{self._found.opaque}, which is not known")
        if T is not None and self.passes:
            name, why = next(iter(self.passes.items()))
            raise ValueError(
                f"rows: {name!r} has no rows of its own for tokens ({why}); leave the layer out "
                "with exclude=, or take rows per example"
            )
        # What parameters were made into is pulled back from the same graph.
        retain_graph = retain_graph or (bool(self.passes) and self._pulls())
        self._all = one or bool(self._found.checkpoints)
        closed = not self._all and any(
            not isinstance(owners, str) for owners in self._found.owners.values()
        )
        if self.passes or self._all or self._found.opaque:
            with taken(self._leaves(), self._take):
                for b in range(B):
                    self._one_loss(b, retain_graph or closed or b + 1 < B)
        if self._all and not one:
            why = next(iter(self.passes.values()))
            self.paths = dict.fromkeys(self._entries.touched, f"a pass for each loss: {why}")
        if closed:
            self._all_losses(retain_graph)

    def _pulls(self) -> bool:
        return any(
            isinstance(source, Derived) and not isinstance(source, Lookup)
            for site in self._found.owners
            for source, _ in site.targets
        )

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

    def _read(self, one: bool = False) -> None:
        """What the walk says of each parameter, or for one example, that it is met."""
        for site, owners in self._found.owners.items():
            self._note(site, of_one(0, 1) if one else owners)
        for leaf, owners in self._found.leaves.values():
            slot = self._slot_of.get(id(leaf))
            if slot is not None and one:
                self.reached = True
                self.paths[slot.name] = "a pass for each loss"
            elif slot is not None:
                self.reached = True
                why = owners if isinstance(owners, str) else "no rule for where it meets data"
                self.passes.setdefault(slot.name, why)
        self.paths.update({n: f"a pass for each loss: {why}" for n, why in self.passes.items()})

    def _note(self, site: Site, owners: Array | str) -> None:
        self.reached = True
        if isinstance(owners, str):
            for slot in site.slots:
                self.passes.setdefault(slot.name, owners)
            if owners.endswith("share") or owners.endswith("several examples"):
                self.shared.add((site.name, *(slot.name for slot in site.slots)))
            return
        for source, _ in site.targets:
            pulled = isinstance(source, Derived) and not isinstance(source, Lookup)
            for slot in source.slots:
                if self.paths.get(slot.name) != "pulled back":
                    self.paths[slot.name] = "pulled back" if pulled else "closed form"

    # Passes.

    def _all_losses(self, retain_graph: bool) -> None:
        self._b = None
        with contextlib.nullcontext() if self._told() else taken(self._leaves(), self._take):
            self._pass(self._losses, retain_graph, [self._probe] if self._told() else None)

    def _one_loss(self, b: int, retain_graph: bool) -> None:
        self._b = b
        lost = any(isinstance(owners, str) for owners in self._found.owners.values())
        inputs = [*self._leaves(), *([self._probe] if lost or self._all else [])]
        self._pass(self._losses[b], retain_graph, inputs if self._told() else None)

    def _pass(self, losses: Tensor, retain_graph: bool, inputs: list[Tensor] | None) -> None:
        self._tasks.clear()
        with torch._C.DisableTorchFunction():
            handle = losses.register_hook(self._started)
        try:
            _BACKWARD(losses, torch.ones_like(losses), retain_graph=retain_graph, inputs=inputs)
        finally:
            handle.remove()
            self._tasks.clear()

    def _started(self, grad: Tensor) -> None:
        self._tasks.add(torch._C._current_graph_task_id())

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
            self.reached = True
            self._entries.add_gradient(slot, p.grad, self._b)
            self.paths.setdefault(slot.name, "a pass for each loss")

    def write(self, site: Site, x: Tensor | None, dy: Tensor) -> None:
        """A site has its gradient."""
        owners = self._found.owners.get(site)
        if self._b is None:
            if owners is None or isinstance(owners, str):
                return
        elif self._all or isinstance(owners, str):
            if self._all and owners is None:
                self._note(site, of_one(self._b, dy.dim()))
            owners = of_one(self._b, dy.dim())
        else:
            return
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
                self.passes.setdefault("(a reentrant checkpoint)", "its inside moves examples")
        self._found.owners.update(inner.owners)
        self._found.checkpoints.update(inner.checkpoints)
        self._found.leaves.update(inner.leaves)
        self._read()


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
