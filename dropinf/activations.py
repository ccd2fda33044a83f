"""mode="activations": rows from each layer's input and output gradient, in one backward pass.

Each tracked parameter is caught where it meets data: a TorchFunctionMode sees every torch function
that is handed a tracked parameter, in a module's forward or outside of one. For the functions of
`layers.FORMS` the output passes through `_Sample`, an identity whose backward has the call's input
and dy at hand and lets the op write the sampled entries into the rows. The parameters do not
require grad meanwhile, so autograd never forms a weight gradient.

Modes are off inside the backward pass, where activation checkpointing runs forwards again, so hooks
on the modules that own tracked parameters turn the mode on there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_iter

from dropinf import ops
from dropinf.layers import FORMS, Form
from dropinf.plan import Plan, Slot
from dropinf.tap import Tap


class ActivationsTap(Tap):
    """Rows from each layer's input and output gradient."""

    def __init__(self, model: nn.Module, plan: Plan, backend: str | None) -> None:
        super().__init__(model, plan, backend)
        self._coordinates: dict[Any, tuple[Tensor, ...]] = {}  # (o, i), see _index

    def _attach(self, undo: contextlib.ExitStack) -> None:
        slots = {id(p): s for s, p in zip(self.plan.slots, self.parameters, strict=True)}
        self._tracked = dict(slots)  # by id of the parameter
        self._mode = _Meetings(self)
        self._depth = 0  # of modules that run again inside the backward pass
        self._refused: dict[str, str] = {}  # parameter -> why it could not be captured
        self._batch: torch.Size | None = None  # shape of the model's first input
        self._rows: Tensor | None = None
        self._probe = torch.zeros((), requires_grad=True)
        for p in self.model.parameters():
            undo.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(False)
        for module in self.model.modules():
            own = {n: slots[id(p)] for n, p in module._parameters.items() if id(p) in slots}
            if own or module is self.model:
                enter = self._enter_root if module is self.model else self._enter
                handles = (
                    module.register_forward_pre_hook(enter(own), prepend=True, with_kwargs=True),
                    module.register_forward_hook(self._leave, always_call=True),
                )
                for handle in handles:
                    undo.callback(handle.remove)
        undo.enter_context(self._mode)  # last in and first out: it must not see the rest

    def _enter(self, own: dict[str, Slot]) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            # Looked up at each call: a sharded module swaps its parameter objects.
            for name, slot in own.items():
                self._tracked[id(module._parameters[name])] = slot
            if self._rows is not None:  # a recomputation inside the backward pass
                if self._depth == 0:
                    self._mode.__enter__()
                self._depth += 1

        return enter

    def _enter_root(self, own: dict[str, Slot]) -> Callable[..., None]:
        enter = self._enter(own)

        def enter_root(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = (a for a in tree_iter((args, kwargs)) if isinstance(a, Tensor) and a.dim())
            first = next(tensors, None)
            self._batch = None if first is None else first.shape
            enter(module, args, kwargs)

        return enter_root

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._depth:
            self._depth -= 1
            if self._depth == 0:
                self._mode.__exit__(None, None, None)

    def rows(self, losses: Tensor) -> Tensor:
        """[B, R] rows of losses [B], from one backward pass over their sum.

        Raises:
            ValueError: losses are not one per example, or a layer's input does not have the
                examples in dimension 0.
            RuntimeError: a parameter met a function that this mode cannot take, or nothing did.
        """
        self.check(losses)
        if self._refused:
            listed = "\n".join(f"  {name}: {why}" for name, why in sorted(self._refused.items()))
            raise RuntimeError(
                f"rows: mode='activations' cannot take these parameters:\n{listed}\n"
                "Leave them out with Plan.make(..., exclude=[...]), freeze them with "
                "requires_grad_(False) before Plan.make, or use mode='grads'."
            )
        unconnected = RuntimeError(
            "rows: the losses do not depend on any tracked parameter; run the model inside "
            "`with dropinf.capture(...)`, with gradients enabled"
        )
        if not losses.requires_grad:
            raise unconnected
        self._rows = rows = self.empty_rows(losses)
        self._written: set[str] = set()
        try:
            torch.autograd.backward(losses, torch.ones_like(losses))
        finally:
            self._rows = None
            self._depth = 0
        if not self._written:
            raise unconnected
        self.met |= self._written
        for slot in self.plan.slots:
            if slot.name not in self._written:  # it did not meet this batch
                rows[:, slot.entries].zero_()
        return rows

    def meet(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a torch function, and tap it if it takes a tracked parameter."""
        met = [t for t in _tensors(args, kwargs) if id(t) in self._tracked]
        if not met or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        form = FORMS[func](*args, **kwargs) if func in FORMS else None
        if form is None or not _only_as_parameters(form, met):
            return self._meet_unknown(func, met, args, kwargs)
        if args and args[0] is form.x:
            # One input shared by the batch (position ids [1, T]): a row for each example, so that
            # dy keeps the examples apart.
            shared = form.x.dim() - form.features[0] >= 2 and form.x.shape[0] == 1
            if shared and self._batch is not None and self._batch[0] > 1:
                x = form.x.expand(self._batch[0], *form.x.shape[1:])
                args = (x, *args[1:])
                form = FORMS[func](*args, **kwargs)
        y = func(*args, **kwargs)
        taps = [(self._tracked[id(p)], role) for p, role in form.roles if id(p) in self._tracked]
        return _Sample.apply(y, self._probe, form.x, self, form, taps)

    def _meet_unknown(self, func: Callable, met: list[Tensor], args: tuple, kwargs: dict) -> Any:
        """Call it; if its result would carry a gradient to the parameters, they are refused."""
        for p in met:
            p.requires_grad_(True)
        try:
            y = func(*args, **kwargs)
        finally:
            for p in met:
                p.requires_grad_(False)
        if any(t.requires_grad for t in _tensors((y,), {})):
            name = resolve_name(func) or getattr(func, "__name__", repr(func))
            for p in met:
                slot = self._tracked[id(p)]
                owner = self.model.get_submodule(slot.name.rpartition(".")[0])
                self._refused[slot.name] = (
                    f"shape {slot.shape}, of {type(owner).__name__}, handed to {name}"
                )
        return y

    def sample(self, x: Tensor, dy: Tensor, form: Form, taps: list[tuple[Slot, Callable]]) -> None:
        """Write the entries of one call's parameters into the rows (called in the backward)."""
        rows = self._rows
        if rows is None:
            raise RuntimeError("capture: the backward pass ran outside tap.rows(losses)")
        B = len(rows)
        square = self._batch is not None and self._batch[:2] == (B, B)
        if B > 1 and x.dim() == 1 and not form.flat and square:
            raise ValueError(
                f"rows: {taps[0][0].name!r} met {B} ids in a batch of {B} examples of {B} "
                "positions, one for each example or for each position; give ids as [B, T] or "
                "[1, T], or another batch size"
            )
        x, dy = form.prepare(
            _positions(x, B, form.features[0], form.flat, taps[0][0]),
            _positions(dy, B, form.features[1], True, taps[0][0]),
        )
        bias = {"bias": True} if form.op is ops.sampled_outer else {}
        for run in _runs(taps):
            first, last = run[0][0], run[-1][0]
            entries = slice(first.entries.start, last.entries.stop)
            names = tuple(slot.name for slot, _ in run)
            o_idx, i_idx = self._index(form, run, names, dy.device)
            arguments = {"scale": first.scale, "backend": self.backend, **bias}
            if dy.device == rows.device and not self._written.intersection(names):
                form.op(x, dy, o_idx, i_idx, out=rows[:, entries], **arguments)
            else:
                part = form.op(x, dy, o_idx, i_idx, **arguments).to(rows.device)
                for slot, _ in run:
                    here = slice(slot.offset - first.offset, slot.entries.stop - first.offset)
                    if slot.name in self._written:
                        rows[:, slot.entries] += part[:, here]
                    else:
                        rows[:, slot.entries] = part[:, here]
            self._written.update(names)

    def _index(
        self, form: Form, run: list, names: tuple[str, ...], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The (o, i) of a run of slots, computed once for each kind of call."""
        key = (form.op, tuple(id(role.__code__) for _, role in run), names, device)
        if key not in self._coordinates:
            pairs = [role(slot.index) for slot, role in run]
            self._coordinates[key] = tuple(
                torch.cat(part).to(device, torch.int32) for part in zip(*pairs, strict=True)
            )
        return self._coordinates[key]


class _Meetings(TorchFunctionMode):
    """Hands every torch function to the tap."""

    def __init__(self, tap: ActivationsTap) -> None:
        super().__init__()
        self._tap = tap

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return self._tap.meet(func, args, kwargs or {})


class _Sample(torch.autograd.Function):
    """The identity on y; its backward samples from x and dy.

    The probe is a leaf that requires grad, so that autograd comes here although no parameter does.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, probe: Tensor, x: Tensor, tap: ActivationsTap, form: Form, taps: list
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.tap, ctx.form, ctx.taps = tap, form, taps
        # Not a view of y: a later in-place activation would be refused on one.
        return y.data

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is not None:
            (x,) = ctx.saved_tensors
            ctx.tap.sample(x, dy, ctx.form, ctx.taps)
        return (dy if ctx.needs_input_grad[0] else None), None, None, None, None, None


def _tensors(args: tuple, kwargs: dict) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (v for v in tree_iter(value) if isinstance(v, Tensor))


def _only_as_parameters(form: Form, met: list[Tensor]) -> bool:
    """Whether the form accounts for every use of the tracked parameters in its call."""
    known = [p for p, _ in form.roles]
    return all(any(p is q for q in known) and p is not form.x for p in met)


def _positions(x: Tensor, B: int, features: int, flat: bool, slot: Slot) -> Tensor:
    """x with its dimensions flattened to [B, T, features]."""
    lead = x.shape[: x.dim() - features]
    apart = lead and (lead[0] == B or (flat and len(lead) == 1 and lead[0] % B == 0))
    if B > 1 and not apart:
        raise ValueError(
            f"rows: {slot.name!r} met data of shape {tuple(x.shape)} in a batch of {B}: "
            "dimension 0 is not the example, so rows would mix examples; give every input "
            "the batch dimension, leave the layer out with exclude=, or use mode='grads'"
        )
    width = x.shape[len(lead) :].numel()
    return x.reshape(B, lead.numel() // B, width)


def _runs(taps: list[tuple[Slot, Callable]]) -> list[list[tuple[Slot, Callable]]]:
    """The slots of one call, those that stand side by side in a row of one layer together."""
    runs: list[list[tuple[Slot, Callable]]] = []
    for tap in sorted(taps, key=lambda t: t[0].offset):
        adjoins = runs and runs[-1][-1][0].entries.stop == tap[0].offset
        if adjoins and runs[-1][-1][0].scale == tap[0].scale:
            runs[-1].append(tap)
        else:
            runs.append([tap])
    return runs
