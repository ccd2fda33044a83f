"""Closing: the calls in which parameters meet data in closed form.

A parameter stays what it is, a leaf of autograd's graph, in every call that is not understood.
Where it meets data in a function that has a rule, the function gets a detached copy, and a site in
the graph writes its entries in the backward pass. What is chosen here decides what a capture costs;
that rows are exact follows from the walk over the graph, whatever is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _pop_mode,
    _push_mode,
    resolve_name,
)

from dropinf.capturing.backward import cut_off
from dropinf.capturing.call_args import argument, in_place, name_of, swap, tensors_of
from dropinf.capturing.graph import FormSite, Operand, Output, SpreadSite, Tap, edge_of
from dropinf.capturing.marks import Marks
from dropinf.capturing.notes import NOTES
from dropinf.capturing.notes import hook as HOOK
from dropinf.capturing.rules import COMPOSITES, ELEMENTWISE, FORMS, Form, RefusedError
from dropinf.capturing.sources import Lookup, Source, View, lookup_of, source_of
from dropinf.capturing.tap import NotClosedError
from dropinf.compression import ParamPlan

_JOIN = {torch.cat, torch.concat, torch.concatenate, torch.stack}
_SET = Tensor.__setitem__
# The second argument only says of what dtype, device or shape the result is to be.
_LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
_GRAD_FN = Tensor.grad_fn.__get__
_REPEATS = {"expand", "expand_as", "broadcast_to", "repeat", "tile"}
_GRADIENTS = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


_INPUT = torch.empty(0)  # stands for the input in what is kept of a call


class Closing(TorchFunctionMode):
    """Watches the functions of one capture.

    Attributes:
        examples: how many the model was given, as far as its first argument shows; None: not known.
        froze: whether the capture froze parameters that are not in the plan.
        shared: functions and parameters whose results turned out to be shared by examples, so that
            they are left to autograd from then on.
    """

    def __init__(self, tap: Tap, constants: Sequence[Tensor], per: str) -> None:
        super().__init__()
        self.examples: int | None = None
        self.batch_dim = 0
        self.shared: set[tuple] = set()
        self.froze = False
        self._tap, self._per = tap, per
        self._sources: Marks[tuple[Source, int | None]] = Marks()
        self._constants: set[int | None] = {_memory(t) for t in constants}
        self._inputs: set[int | None] = set()
        self._closed: set[int] = set()  # leaves that sites of this forward have detached copies of
        self._hooked: set[int] = set()
        self._probe = tap.probe

    def track(self, parameter: Tensor, slot: ParamPlan) -> None:
        """Follow a parameter."""
        self._sources.set(parameter, (View.of(slot, parameter), None))

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _GRADIENTS:
            return self._tap.gradients(func, args, kwargs)
        if not torch.is_grad_enabled() and self.froze:
            self._refuse_cut_off(tensors_of(args, kwargs))
        if not torch.is_grad_enabled() or _transformed():
            return func(*args, **kwargs)
        tensors = tensors_of(args, kwargs)
        sources = {}
        for t in tensors:
            source = self._source(t)
            if source is not None:
                sources[id(t)] = source
        mine = sources and (args, kwargs, tensors, sources)
        y = self._meet(func, *mine) if mine else func(*args, **kwargs)
        if func in NOTES:
            with torch._C.DisableTorchFunction():
                NOTES[func](args, kwargs, y)
                if NOTES[func] is HOOK and (func is not _GRAD_FN or y is not None):
                    self.hooked(args[0])
        return y

    def __exit__(self, *_: Any) -> None:
        """Leave the stack of modes, wherever it is there: captures may be closed in any order."""
        above = []
        while _get_current_function_mode() is not self:
            above.append(_pop_mode())
        _pop_mode()
        for mode in reversed(above):
            _push_mode(mode)

    def asked(self, t: Tensor) -> str | None:
        """The parameter behind a tensor whose gradient is asked for, or hooked."""
        source = self._source(t)
        return source.slots[0].name if source is not None else None

    def hooked(self, t: Tensor) -> None:
        """A hook may change the gradient of a parameter, which is autograd's from here on.

        Raises:
            NotClosedError: a site has a detached copy of it already.
        """
        source = self._source(t)
        if source is None:
            return
        for leaf, slot in zip(source.leaves, source.slots, strict=True):
            if id(leaf) in self._closed:
                raise NotClosedError(slot.name)
            self._hooked.add(id(leaf))

    def _refuse_cut_off(self, tensors: list[Tensor]) -> None:
        """A reentrant checkpoint gives no gradients where nothing that it is given has one.

        Raises:
            RuntimeError: a parameter is used in such a one, and might have had a gradient if what
                is not in the plan had not been frozen.
        """
        found = next((known[0] for t in tensors if (known := self._sources.get(t))), None)
        if found is not None and cut_off():
            raise RuntimeError(
                f"capture: {found.slots[0].name!r} is used in a reentrant checkpoint whose inputs "
                "carry no gradient, as parameters that are not in the plan are frozen; checkpoint "
                "with use_reentrant=False, or leave nothing out of the plan"
            )

    def _source(self, t: Tensor) -> Source | None:
        if not t.requires_grad:
            return None
        known = self._sources.get(t)
        # Since a write into it, a tensor is what autograd's graph says.
        if known is None or known[1] not in (None, t._version):
            return None
        if self._hooked and any(id(leaf) in self._hooked for leaf in known[0].leaves):
            return None
        return known[0]

    def _meet(
        self, func: Callable, args: tuple, kwargs: dict, tensors: list[Tensor], sources: dict
    ) -> Any:
        if not self._tap.may_close():
            return func(*args, **kwargs)
        if func in COMPOSITES:
            with self:
                y = COMPOSITES[func](*args, **kwargs)
            if y is not NotImplemented:
                return y
        if name_of(func) in _LIKE and (not args or id(args[0]) not in sources):
            return func(*args, **kwargs)
        activations = [t for t in tensors if t.requires_grad and id(t) not in sources]
        y = self._in_closed_form(func, args, kwargs, tensors, sources, activations)
        if y is None:
            y = self._expanded(func, args, kwargs, sources)
        if y is not None:
            return y
        spread = self._spread(func, args, kwargs, tensors, sources, activations)
        if spread is not None:
            return func(*spread[0], **spread[1])
        if activations:
            return func(*args, **kwargs)
        # Not to be made anew by a checkpoint around it: it is of the parameters' size, not the
        # batch's, and is pulled back once for each example.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            y = func(*args, **kwargs)
        made = func in ELEMENTWISE or (func is F.embedding and tensors[0].dim() == 1)
        if made or not any(map(self._holds_batch, tensors)):
            self._mark(func, args, kwargs, sources, y)
        return y

    def _mark(self, func: Callable, args: tuple, kwargs: dict, sources: dict, y: Any) -> None:
        """Note that the results are made of sources."""
        for t in tensors_of((args[0],) if func is _SET else (y,), {}):
            if not t.requires_grad or t.is_leaf or self._source(t) is not None:
                continue
            table = sources.get(id(args[1])) if func is F.embedding and len(args) > 1 else None
            plain = argument(args, kwargs, 3, "max_norm", None) is None and not argument(
                args, kwargs, 5, "scale_grad_by_freq", False
            )
            if isinstance(table, View) and plain:
                padding = argument(args, kwargs, 2, "padding_idx", None)
                source: Source = lookup_of(args[0], table, padding, t, len(args[1]))
            else:
                source = source_of(func, args, t, sources)
            self._sources.set(t, (source, t._version))

    # What data may be. Wrong answers cost time, not rows.

    def _holds_batch(self, t: Tensor) -> bool:
        """Whether data without a gradient look like the batch, by their first dimension."""
        if self.examples in (None, 1) or not t.dim() or t.requires_grad:
            return False
        dim = self.batch_dim if t.dim() > 1 else 0
        return t.shape[dim] == self.examples and self._plausible(t)

    def _plausible(self, x: Tensor, flat: bool = True) -> bool:
        """Whether data without a gradient may hold the batch; `flat` if flattened as well."""
        memory = _memory(x)
        if not x.dim() or memory in self._constants:
            return False
        if not flat and x.dim() == 1 and self._per != "example":
            return memory in self._inputs  # and not the positions of a text
        if self.examples in (None, 1):
            return flat or x.dim() > 1 or self.examples == 1
        size = x.shape[self.batch_dim if x.dim() > 1 else 0]
        if size == self.examples or (memory in self._inputs and size != 1):
            return True
        return flat and (size != 1 or x.shape[0] != 1)

    def entered(self, inputs: Sequence[Tensor]) -> torch.Size | None:
        """The model was called; returns the shape of the first of what it was given."""
        self._inputs = {_memory(t) for t in inputs}
        batch = next((t.shape for t in inputs if t.dim()), None)
        if batch is not None:
            self.examples = batch[self.batch_dim if len(batch) > 1 else 0]
        return batch

    # Functions with a closed form.

    def _in_closed_form(
        self,
        func: Callable,
        args: tuple,
        kwargs: dict,
        tensors: list[Tensor],
        sources: dict,
        activations: list[Tensor],
    ) -> Tensor | None:
        if func not in FORMS or any(t.is_complex() for t in tensors):
            return None
        form = self._form(func, args, kwargs, tensors, sources, activations)
        if form is None:
            return None
        x = form.x
        targets = [(sources[id(r.tensor)], r) for r in form.roles if id(r.tensor) in sources]
        for source, _ in targets:
            self._closed.update(map(id, source.leaves))
        plain = {id(r.tensor): r.tensor.detach() for r in form.roles}
        y = func(*swap(args, plain), **swap(kwargs, plain))
        here = id(x)
        bare = swap(args, {here: _INPUT}), swap(kwargs, {here: _INPUT})  # x is autograd's to hold

        def again(x: Tensor) -> Tensor:
            there = {id(_INPUT): x}
            return func(*swap(bare[0], there), **swap(bare[1], there))

        form.x = None
        site = FormSite(_named(func), targets, form, edge_of(x), x.dim(), again)
        return Output.apply(self._tap, site, self._probe, x, y)

    def _form(
        self,
        func: Callable,
        args: tuple,
        kwargs: dict,
        tensors: list[Tensor],
        sources: dict,
        activations: list[Tensor],
    ) -> Form | None:
        try:
            for form in FORMS[func](*args, **kwargs):
                if self._per != "example" and func in ELEMENTWISE and form.num_lead < 2:
                    continue  # a scale of its own for every token
                roles = {id(role.tensor) for role in form.roles}
                x = form.x
                if id(x) in roles or not roles & sources.keys():
                    continue
                if any(t is not x for t in activations):
                    continue  # a bias that is computed from data
                if self.shared and self._key(func, form, sources) in self.shared:
                    continue
                if id(x) not in sources and (x.requires_grad or self._plausible(x, form.flat)):
                    return form
        except (RefusedError, TypeError):  # the latter for arguments that the rule does not know
            pass
        return None

    def _key(self, func: Callable, form: Form, sources: dict) -> tuple:
        names = [s.name for r in form.roles for s in self._slots(r.tensor, sources)]
        return (_named(func), *names)

    def _slots(self, t: Tensor, sources: dict) -> Sequence[ParamPlan]:
        source = sources.get(id(t))
        return () if source is None else source.slots

    # Parameters that are expanded over what they meet.

    def _spread(
        self,
        func: Callable,
        args: tuple,
        kwargs: dict,
        tensors: list[Tensor],
        sources: dict,
        activations: list[Tensor],
    ) -> tuple[tuple, dict] | None:
        """The arguments with operands in place of sources, if that keeps examples apart."""
        if in_place(func) and args and id(args[0]) in sources:
            return None
        chosen = [t for t in tensors if id(t) in sources]
        others = [t for t in tensors if id(t) not in sources]
        shape = None
        if name_of(func).startswith("masked_fill"):
            return None  # which takes a number
        if func in ELEMENTWISE:
            shape = torch.broadcast_shapes(*(t.shape for t in tensors))
            if not activations and not self._grow(chosen, others, sources, shape):
                return None
        elif func is _SET:
            shape = _shape_at(args[0], args[1])
        elif not (func in _JOIN or func is F.scaled_dot_product_attention) or not (
            activations or any(map(self._holds_batch, others))
        ):
            return None
        swapped: dict[int, Tensor] = {}
        for t in chosen:
            target = t.shape if shape is None else shape
            if func is F.scaled_dot_product_attention:
                target = _attention_shape(t, args, kwargs)
            (swapped[id(t)],) = self._operands([t], sources, target, func)
        return swap(args, swapped), swap(kwargs, swapped)

    def _grow(
        self, chosen: list[Tensor], others: list[Tensor], sources: dict, shape: torch.Size
    ) -> bool:
        """Whether a product of sources and data without a gradient is one of the batch."""
        if all(t.shape == shape for t in chosen):
            return False
        if any(map(self._holds_batch, others)):
            return True
        direct = all(isinstance(sources[id(t)], (View, Lookup)) for t in chosen)
        return direct and any(self._plausible(t) and t.dim() == len(shape) for t in others)

    def _expanded(self, func: Callable, args: tuple, kwargs: dict, sources: dict) -> Tensor | None:
        """A source that is expanded over the batch, as learned queries are."""
        known = name_of(func) in _REPEATS and len(sources) == 1
        if not known or not args or id(args[0]) not in sources:
            return None
        t = args[0]
        with torch.no_grad():
            shape = func(t.detach(), *args[1:], **kwargs).shape
        own = torch.Size((1,) * (len(shape) - t.dim()) + t.shape)
        grown = {b for a, b in zip(own, shape, strict=True) if a != b}
        whole = all(a in (1, b) for a, b in zip(own, shape, strict=True))
        if not whole or self.examples in (None, 1) or self.examples not in grown:
            return None
        (y,) = self._operands([t], sources, shape, func)
        return y.clone() if name_of(func) in ("repeat", "tile") else y

    def _operands(
        self, some: Sequence[Tensor], sources: dict, shape: torch.Size, func: Callable
    ) -> list[Tensor]:
        found = []
        for t in some:
            self._closed.update(map(id, sources[id(t)].leaves))
            own = torch.Size((1,) * (len(shape) - t.dim()) + t.shape)
            own = own[len(own) - len(shape) :]  # a write drops ones in front
            site = SpreadSite(_named(func), [(sources[id(t)], None)], own)
            value = t.detach().reshape(own)
            value = value.clone() if in_place(func) else value  # which may be of what is written to
            found.append(Operand.apply(self._tap, site, self._probe, value, shape))
        return found


def _transformed() -> bool:
    """Whether functions are being transformed: vmap, grad, jvp, forward-mode derivatives."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def _memory(t: Tensor) -> int | None:
    """What tells a tensor's memory from others; None of one that has none of its own."""
    try:
        return t.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


@lru_cache(maxsize=1024)
def _named(func: Callable) -> str:
    return resolve_name(func) or getattr(func, "__name__", repr(func))


def _shape_at(x: Tensor, index: Any) -> torch.Size | None:
    with torch.no_grad():
        shape = x.detach()[index].shape
    return shape


def _attention_shape(t: Tensor, args: tuple, kwargs: dict) -> torch.Size:
    """A mask as large as the products of queries and keys; the rest as it is."""
    q, k, v = (argument(args, kwargs, i, n, None) for i, n in enumerate(("query", "key", "value")))
    if t is argument(args, kwargs, 3, "attn_mask", None):
        lead = torch.broadcast_shapes(q.shape[:-2], t.shape[:-2])
        return torch.Size((*lead, q.shape[-2], k.shape[-2]))
    B = max(a.shape[0] for a in (q, k, v))
    return torch.Size((B, *t.shape[1:])) if t.shape[0] == 1 else t.shape
