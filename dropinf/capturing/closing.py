"""Closing: the calls in which parameters meet data in closed form.

A parameter stays what it is, a leaf of autograd's graph, in every call that is not understood.
Where it meets data in a function that has a rule, the function gets a detached copy, and a site in
the graph writes its entries in the backward pass. What is chosen here decides what a capture costs;
that rows are exact follows from the walk over the graph, whatever is chosen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from dropinf.capturing.call_args import (
    DESCRIBING,
    Meeting,
    in_place,
    name_of,
    named,
    swap,
    tensors_of,
)
from dropinf.capturing.checkpoints import Region, cut_off, region
from dropinf.capturing.extension import CPP
from dropinf.capturing.graph import FormSite, Operand, Passes, SpreadSite, with_output
from dropinf.capturing.hints import Constants, Hints
from dropinf.capturing.kept import Kept
from dropinf.capturing.known_calls import add_known
from dropinf.capturing.marks import Marks
from dropinf.capturing.notes import NOTES
from dropinf.capturing.notes import hook as HOOK
from dropinf.capturing.rules import COMPOSITES, ELEMENTWISE, FORMS, Form, RefusedError
from dropinf.capturing.sources import Source, View, lookup_of, source_of
from dropinf.capturing.spreading import expanded_shape, spread_shapes
from dropinf.capturing.tap import NotClosedError
from dropinf.compression import ParamPlan

# The second argument only says of what dtype, device or shape the result is to be.
_SHAPED_LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
_GRAD_FN = Tensor.grad_fn.__get__
_GRADIENTS = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
_SHOWN = _GRADIENTS | set(NOTES)  # functions of which every call is shown
_INPUT = torch.empty(0)  # stands for the input in what is kept of a call


class Closing(TorchFunctionMode):
    """Watches the functions of one capture.

    Attributes:
        hints: what its choices go by.
        froze: whether the capture froze parameters that are not in the plan.
        cut_off: parameters that a reentrant checkpoint used, which was given nothing with a
            gradient.
    """

    def __init__(
        self,
        tap: Passes,
        kept: Kept,
        constants: Sequence[Tensor],
        per: str,
        batch_dim: int,
        froze: bool,
    ) -> None:
        super().__init__()
        self.hints = Hints(
            batch_dim=batch_dim,
            per_token=per != "example",
            constants=Constants(constants),
            shared=kept.shared,
        )
        self.froze = froze
        self.cut_off: set[str] = set()
        self._tap, self._kept, self._per = tap, kept, per
        self._sources: Marks[tuple[Source, int | None]] = Marks(kept.sources)
        for p in kept.parameters:
            if p._backward_hooks:  # which plain autograd alone would call
                self._sources.forget(p)
        # Those of each region of a checkpoint, which runs again after others have come.
        self._hints: weakref.WeakKeyDictionary[Region, Hints] = weakref.WeakKeyDictionary()
        self._closed: set[int] = set()  # leaves that some site has a detached copy of
        self._hooked: set[int] = set()
        self._probe = tap.probe
        self._calls: Any = None
        if CPP is not None:
            known = self._sources.known
            watched = self, kept.table, known, _SHOWN, DESCRIBING, tap, tap.probe, froze
            self._calls = CPP.Calls(*watched)
            # Found before the method, which is the same for every call.
            self.__torch_function__ = self._calls

    def track(self, parameter: Tensor, slot: ParamPlan) -> None:
        """Follow a parameter that a sharded module has put in place, if nobody hooked it."""
        if not parameter._backward_hooks:
            self._sources.set(parameter, (View.of(slot, parameter), None))

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return self.called(func, args, kwargs or {})

    def called(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a function that the model calls."""
        if func in DESCRIBING:
            return func(*args, **kwargs)
        if func in _GRADIENTS:
            return self._tap.gradients(func, args, kwargs)
        if not torch.is_grad_enabled() and self.froze:
            self._note_cut_off(tensors_of(args, kwargs))
        if not torch.is_grad_enabled() or transformed():
            return func(*args, **kwargs)
        tensors = tensors_of(args, kwargs)
        sources = {}
        for t in tensors:
            source = self._source(t)
            if source is not None:
                sources[id(t)] = source
        met = Meeting(func, args, kwargs, tensors, sources) if sources else None
        y = func(*args, **kwargs) if met is None else self._meet(met)
        if func in NOTES:
            self._note(func, args, kwargs, y)
        return y

    def noted(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a function that is given no parameter, and leaves more behind than its node says."""
        if func in _GRADIENTS:
            return self._tap.gradients(func, args, kwargs)
        y = func(*args, **kwargs)
        if torch.is_grad_enabled() and not transformed():
            self._note(func, args, kwargs, y)
        return y

    def _note(self, func: Callable, args: tuple, kwargs: dict, y: Any) -> None:
        with torch._C.DisableTorchFunction():
            NOTES[func](args, kwargs, y)
            if NOTES[func] is HOOK and (func is not _GRAD_FN or y is not None):
                self.hooked(args[0])

    def __exit__(self, *_: Any) -> None:
        """Leave the stack of modes, wherever it is there: captures may be closed in any order."""
        if not any(mode is self for mode in _get_current_function_mode_stack()):
            return  # an interrupt came where `paused` had it left
        above = []
        while _get_current_function_mode() is not self:
            above.append(_pop_mode())
        _pop_mode()
        for mode in reversed(above):
            _push_mode(mode)

    def detached(self, t: Tensor) -> Source | None:
        """The parameter behind a tensor, of which a site has a copy from here on."""
        source = self._source(t)
        if source is not None:
            self._closed.update(map(id, source.leaves))
        return source

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
            closed = self._calls is not None and self._calls.has_closed(leaf)
            if closed or id(leaf) in self._closed:
                raise NotClosedError(slot.name)
            self._hooked.add(id(leaf))
            self._sources.forget(leaf)

    def plausible(self, x: Tensor, flat: bool) -> bool:
        """Whether data without a gradient may hold the batch; `flat` if flattened as well."""
        return self.hints.plausible(x, flat)

    def show_all(self, all: bool) -> None:
        """Whether no call is to be taken for one that is known."""
        if self._calls is not None:
            self._calls.show_all(all)

    def _note_cut_off(self, tensors: list[Tensor]) -> None:
        """A reentrant checkpoint gives no gradients where nothing that it is given has one."""
        found = [known[0] for t in tensors if (known := self._sources.get(t)) is not None]
        if found and cut_off():
            self.cut_off.update(slot.name for source in found for slot in source.slots)

    def refuse_cut_off(self, touched: set[str]) -> None:
        """Refuse rows without what a checkpoint withheld, which had it if nothing were frozen.

        Raises:
            RuntimeError: a parameter was used in such a one, and is not among those touched.
        """
        missed = sorted(self.cut_off - touched)
        self.cut_off.clear()
        if missed:
            raise RuntimeError(
                f"rows: {missed[0]!r} was used in a reentrant checkpoint whose inputs carry no "
                "gradient, as parameters that are not in the plan are frozen; checkpoint with "
                "use_reentrant=False, or leave nothing out of the plan"
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

    def _meet(self, met: Meeting) -> Any:
        again = self._tap.runs_again()
        if again is None:
            here = region()
            if here is not None:
                self._hints.setdefault(here, self.hints)
        elif not again[0]:
            return met.run()
        elif again[1] in self._hints:  # which are to decide as they did
            now, self.hints = self.hints, self._hints[again[1]]
            try:
                return self._close(met)
            finally:
                self.hints = now
        return self._close(met)

    def _close(self, met: Meeting) -> Any:
        func = met.func
        if func in COMPOSITES:
            with self:
                y = COMPOSITES[func](*met.args, **met.kwargs)
            if y is not NotImplemented:
                return y
        if name_of(func) in _SHAPED_LIKE and not met.first_is_source():
            return met.run()
        y = self._in_closed_form(met)
        if y is None:
            y = self._expanded(met)
        if y is not None:
            return y
        shapes = spread_shapes(met, self.hints)
        if shapes:
            return met.run({id(t): self._operand(met, t, shapes[id(t)]) for t in met.chosen})
        if met.activations:
            return met.run()
        # Not to be made anew by a checkpoint around it: it is of the parameters' size, not the
        # batch's, and is pulled back once for each example.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            y = met.run()
        made = func in ELEMENTWISE or (func is F.embedding and met.tensors[0].dim() == 1)
        if made or not any(map(self.hints.holds_batch, met.tensors)):
            self._mark(met, y)
        return y

    def _mark(self, met: Meeting, y: Any) -> None:
        """Note that the results are made of sources."""
        for t in tensors_of((met.args[0] if met.func is Tensor.__setitem__ else y,), {}):
            if t.requires_grad and not t.is_leaf and self._source(t) is None:
                lookup = met.func is F.embedding and len(met.args) > 1
                source = lookup_of(met, t) if lookup else None
                source = source or source_of(met.func, met.args, t, met.sources)
                self._sources.set(t, (source, t._version))

    def entered(self, inputs: list[Tensor]) -> torch.Size | None:
        """The model was called; returns the shape of the first of what it was given."""
        self.hints, batch = self.hints.given(inputs)
        return batch

    # Functions with a closed form.

    def _in_closed_form(self, met: Meeting) -> Tensor | None:
        if met.func not in FORMS or any(t.is_complex() for t in met.tensors):
            return None
        form = self._form(met)
        if form is None:
            return None
        x, sources = form.x, met.sources
        targets = [(sources[id(r.tensor)], r) for r in form.roles if id(r.tensor) in sources]
        for source, _ in targets:
            self._closed.update(map(id, source.leaves))
        y = met.run({id(r.tensor): r.tensor.detach() for r in form.roles})
        here = {id(x): _INPUT}  # x is autograd's to hold
        bare = Meeting(met.func, swap(met.args, here), swap(met.kwargs, here), [], {})
        form.x = None
        site = FormSite(
            named(met.func),
            targets,
            form,
            x.dim(),
            lambda x: bare.run({id(_INPUT): x}),
        )
        shared = self._kept.shared_by_nodes(site)
        again = region() is not None or self._tap.runs_again() is not None
        if shared is not None and not again:
            add_known(self._kept.table, met, site, shared, x)
        return with_output(self._tap, site, shared, x, y)

    def _form(self, met: Meeting) -> Form | None:
        try:
            for form in FORMS[met.func](*met.args, **met.kwargs):
                roles = {id(role.tensor) for role in form.roles}
                x = form.x
                if id(x) in met.sources or not roles & met.sources.keys():
                    continue
                # What carries a gradient is the input, and parameters: no bias computed from data.
                rest = (*met.activations, *met.chosen)
                if any(t is not x and not (id(t) in roles and id(t) in met.sources) for t in rest):
                    continue
                if self._per != "example" and met.func in ELEMENTWISE and form.num_lead < 2:
                    continue  # a scale of its own for every token
                if self.hints.shared and self._key(met, form) in self.hints.shared:
                    continue
                if x.requires_grad or self.hints.plausible(x, form.flat):
                    return form
        except (RefusedError, TypeError):  # the latter for arguments that the rule does not know
            pass
        return None

    def _key(self, met: Meeting, form: Form) -> tuple:
        mine = (met.sources.get(id(role.tensor)) for role in form.roles)
        return (named(met.func), *(slot.name for source in mine if source for slot in source.slots))

    # Parameters that are expanded over what they meet.

    def _expanded(self, met: Meeting) -> Tensor | None:
        """A source that is expanded over the batch, as learned queries are."""
        shape = expanded_shape(met, self.hints)
        if shape is None:
            return None
        y = self._operand(met, met.args[0], shape)
        return y.clone() if name_of(met.func) in ("repeat", "tile") else y

    def _operand(self, met: Meeting, t: Tensor, shape: torch.Size) -> Tensor:
        source = met.sources[id(t)]
        self._closed.update(map(id, source.leaves))
        own = torch.Size((1,) * (len(shape) - t.dim()) + t.shape)
        own = own[len(own) - len(shape) :]  # a write drops ones in front
        value = t.detach().reshape(own)
        value = value.clone() if in_place(met.func) else value  # may be of what is written to
        site = SpreadSite(named(met.func), [(source, None)], own)
        return Operand.apply(self._tap, site, self._probe, value, shape)


def transformed() -> bool:
    """Whether functions are being transformed: vmap, grad, jvp, forward-mode derivatives."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )
