"""Meetings: every torch function that runs under capture, and the parameters that it is handed.

A parameter is caught where it meets data, whatever module owns it. For that the tensors of a pass
are told apart as they come up:

- sources carry tracked parameters: those themselves, and what is made of them without data;
- constants do not depend on the batch: buffers, frozen parameters, what a module's forward makes
  from nothing, and what is made of constants;
- everything else is data, with the example in the batch dimension, or with a `Route` to it if rows
  were picked by an index.

Sources and constants alone give a new source. Sources and data are a meeting: the call is passed on
to autograd so that the rows are written in the backward pass (see `activations`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_map, tree_unflatten

from dropinf.capturing import per_example
from dropinf.capturing.call_args import argument, in_place, name_of, swap, tensors_of
from dropinf.capturing.entries import Entries, Where
from dropinf.capturing.graph import Operand, Output
from dropinf.capturing.marks import Marks
from dropinf.capturing.routes import LOST, Routes
from dropinf.capturing.rowmap import MixedExamples, TokensDiffer
from dropinf.capturing.rules import COMPOSITES, ELEMENTWISE, FORMS, Form, RefusedError, opened
from dropinf.capturing.sources import Derived, Lookup, Source, View, source_of
from dropinf.compression import ParamPlan

_JOIN = {torch.cat, torch.concat, torch.concatenate}
_SET = {Tensor.__setitem__}
# The second argument only says of what dtype, device or shape the result is to be.
_LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
# Every argument has the batch in dimension 0, or 1 there.
_BATCHED = {F.scaled_dot_product_attention}

# Watched inside as well: activation checkpointing runs forwards again there.
_BACKWARD = opened(torch.autograd.backward)


class Meetings(TorchFunctionMode):
    """Watches the functions of one capture.

    Attributes:
        entries: the rows of the backward pass that is running; None outside of one.
        depth: module forwards that are running.
        started: whether one has run since the last rows; before that, batches are being made.
        batch: shape of the model's first input.
        examples: how many those are.
        batch_dim: of the data; None is 0, unless in doubt.
        refused: parameter or function -> why it cannot be captured.
        paths: parameter -> how it was captured.
    """

    def __init__(self, constants: list[Tensor], per: str) -> None:
        super().__init__()
        self.entries: Entries | None = None
        self.depth = 0
        self.started = False
        self.batch: torch.Size | None = None
        self.examples: int | None = None
        self.batch_dim: int | None = None
        self.refused: dict[str, str] = {}
        self.paths: dict[str, str] = {}
        self._per = per
        self._sources: Marks[Source] = Marks()
        self._constants: Marks[tuple[ParamPlan, ...]] = Marks()  # and what they were made of
        self._routes = Routes()
        self._checked: set[tuple] = set()
        self._probe = torch.zeros((), requires_grad=True)
        for tensor in constants:
            self._constants.set(tensor, ())

    def track(self, parameter: Tensor, slot: ParamPlan) -> None:
        """Follow a parameter."""
        self._sources.set(parameter, View.of(slot))

    def inputs(self, tensors: list[Tensor]) -> None:
        """What the model is given is data, whoever made it."""
        for t in tensors:
            self._constants.discard(t)
        self.batch = next((t.shape for t in tensors if t.dim()), None)
        if self.batch is not None:
            dim = self.batch_dim if self.batch_dim and len(self.batch) > 1 else 0
            self.examples = self.batch[dim]

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.backward:  # also of a checkpoint, inside of another
            with self:
                return _BACKWARD(*args, **kwargs)
        tensors = list(tensors_of(args, kwargs))
        if torch.is_grad_enabled():
            for t in tensors:
                if self._sources.get(t) is not None:
                    return self._meet(func, args, kwargs, tensors)
                if t.requires_grad and self._constants.get(t):
                    self._refuse_summed(t)
        if func is F.batch_norm and tensors:
            self._refuse_batch_statistics(args, kwargs)
        y = func(*args, **kwargs)
        self._follow(func, args, kwargs, tensors, y)
        return y

    def _refuse_batch_statistics(self, args: tuple, kwargs: dict) -> None:
        x = args[0]
        if argument(args, kwargs, 5, "training", False) and len(x) > 1:
            self.refused[f"(BatchNorm of an input {tuple(x.shape)})"] = (
                "in train mode it mixes the examples of a batch; call .eval() on it"
            )

    def _refuse_summed(self, t: Tensor) -> None:
        for slot in self._constants.get(t):
            self.refused[slot.name] = (
                "what was made of it left a reentrant checkpoint, so that its gradient is summed "
                "over the batch; checkpoint with use_reentrant=False"
            )

    # Data and constants.

    def _is_constant(self, t: Tensor) -> bool:
        return self._constants.get(t) is not None or self._sources.get(t) is not None

    def _is_data(self, t: Tensor) -> bool:
        # A number that happens to be a tensor, such as the index of an expert, is no data.
        number = t.dim() == 0 and not t.is_floating_point()
        return not number and not self._is_constant(t)

    def _follow(self, func: Callable, args: tuple, kwargs: dict, tensors: list, y: Any) -> None:
        """Note what the results of a function without a meeting are."""
        if all(map(self._is_constant, tensors)):
            inside = self.depth or self.entries is not None  # which a checkpoint runs again
            if isinstance(y, (Tensor, tuple, list)) and (tensors or inside):
                made_of = tuple({s.name: s for t in tensors for s in self._made_of(t)}.values())
                for t in tensors_of((y,), {}):
                    self._constants.set(t, made_of)
            return
        for t in tensors:
            if t is y or (func in _SET and t is args[0]):
                self._now_data(t)
        if not isinstance(y, (Tensor, tuple, list)):
            return
        if self.started and self.batch_dim != 1:
            data = [t for t in tensors if not self._is_constant(t)]
            self._routes.follow(func, args, kwargs, data, y)

    def _made_of(self, t: Tensor) -> tuple[ParamPlan, ...]:
        """The parameters that a constant was made of, where gradients were disabled."""
        source = self._sources.get(t)
        return self._constants.get(t) or (() if source is None else tuple(source.slots))

    def _now_data(self, t: Tensor) -> None:
        """Data were written into a constant."""
        self._constants.discard(t)
        if t._base is not None:
            self._constants.discard(t._base)

    # Meetings.

    def _meet(self, func: Callable, args: tuple, kwargs: dict, tensors: list[Tensor]) -> Any:
        sources: dict[int, Source] = {}
        plain: dict[int, Tensor] = {}  # what stands for a parameter that requires grad
        for i, t in enumerate(tensors):
            source = self._sources.get(t)
            if source is None:
                continue
            if t.requires_grad:
                tensors[i] = plain.setdefault(id(t), t.detach())
                self._sources.set(tensors[i], source)
            sources[id(tensors[i])] = source
        if plain:
            args, kwargs = swap(args, plain), swap(kwargs, plain)
        if in_place(func) and args and id(args[0]) in sources:
            self._note_refusal(func, sources, "it is changed in place")
            return func(*args, **kwargs)
        data = [t for t in tensors if id(t) not in sources and self._is_data(t)]
        if not data and in_place(func) and args:
            # A parameter is written into a fresh tensor, which must be one of the batch.
            target, dim = args[0], self.batch_dim or 0
            if target.dim() <= dim or target.shape[dim] != self.examples:
                self._note_refusal(func, sources, "it is written into a tensor without the batch")
                return func(*args, **kwargs)
            self._now_data(target)
            data = [target]
        if not data or (name_of(func) in _LIKE and id(args[0]) in sources):
            return self._derive(func, args, kwargs, sources)
        if name_of(func) in _LIKE:
            return func(*args, **kwargs)
        if func in COMPOSITES:
            rewritten, batch_dim = COMPOSITES[func]
            with self._inside(batch_dim), self:
                return rewritten(*args, **kwargs)
        try:
            y = self._in_closed_form(func, args, kwargs, sources)
            if y is not None:
                return y[0]
            if func in ELEMENTWISE or func in _JOIN or func in _BATCHED or func in _SET:
                return self._spread(func, args, kwargs, sources, data)
            return self._in_general(func, args, kwargs, sources)
        except RefusedError as error:
            return self._refuse(func, args, kwargs, sources, str(error))

    @contextlib.contextmanager
    def _inside(self, batch_dim: int | None) -> Iterator[None]:
        before = self.batch_dim
        if batch_dim is not None:
            self.batch_dim = batch_dim
        try:
            yield
        finally:
            self.batch_dim = before

    def _where(self, data: list[Tensor]) -> Where:
        route = self._routes.of(data)
        if route is LOST:
            raise RefusedError("it meets rows that were picked by an index and then rearranged")
        return Where(self.batch_dim, route)

    def _derive(self, func: Callable, args: tuple, kwargs: dict, sources: dict) -> Any:
        """Sources and constants alone: the results are sources."""
        args, kwargs, leaves = _with_leaves(args, kwargs, sources)
        # Not to be made anew by a checkpoint around it: it is of the parameters' size, not the
        # batch's, and is used with the mode off.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            y = func(*args, **kwargs)

        def hand_out(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            out = t.detach() if t.requires_grad else t
            if t.requires_grad:
                self._sources.set(out, source_of(func, args, kwargs, t, leaves, sources))
            else:
                self._constants.set(out, ())
            return out

        return tree_map(hand_out, y)

    def _in_closed_form(
        self, func: Callable, args: tuple, kwargs: dict, sources: dict
    ) -> tuple[Any] | None:
        for form in FORMS[func](*args, **kwargs) if func in FORMS else ():
            if self._per != "example" and func in ELEMENTWISE and form.num_lead < 2:
                continue  # a scale of its own for every token
            roles = {id(role.tensor) for role in form.roles}
            if id(form.x) not in sources and set(sources) <= roles:
                break
        else:
            return None
        y = func(*args, **kwargs)
        targets = [(sources[id(r.tensor)], r) for r in form.roles if id(r.tensor) in sources]
        where = self._where([form.x])
        self._note(sources, "closed form")
        form_x = form.x
        form = dataclasses.replace(form, x=None)  # held by autograd alone

        def backward(entries: Entries, saved: tuple[Tensor, ...], dys: list) -> None:
            (x,) = saved
            self._refuse_doubtful_ids(form, x, entries.map.B, targets)
            with _named(targets[0][0].slots):
                entries.sample(form, targets, x, dys[0], where)

        (y,) = Output.apply(self, backward, self._probe, 1, form_x, y)
        self._pass_route(where, [y])
        return (y,)

    def _refuse_doubtful_ids(self, form: Form, x: Tensor, B: int, targets: list) -> None:
        if form.flat or x.dim() != 1 or B == 1:
            return
        name = targets[0][0].slots[0].name
        if self.batch is not None and self.batch[:2] == (B, B):
            raise ValueError(
                f"rows: {name!r} met {len(x)} ids in a batch of {B} examples of {B} "
                "positions, one for each example or for each position; give ids as [B, T] or "
                "[1, T], or another batch size"
            )
        if len(x) != B:
            raise _mixed_error(name, x.shape, f"in a batch of {B}")

    def _pass_route(self, where: Where, ys: list[Tensor]) -> None:
        for y in ys:
            self._routes.set(y, where.route)

    def _spread(
        self, func: Callable, args: tuple, kwargs: dict, sources: dict, data: list[Tensor]
    ) -> Any:
        """Expand every source over the batch: autograd keeps the examples apart itself."""
        where = self._where(data)
        if func in _SET:
            shape, where = self._set_shape(args[0], args[1], where)
        elif func in _JOIN or func in _BATCHED:
            shape = data[0].shape
        else:
            shape = torch.broadcast_shapes(*(t.shape for t in tensors_of(args, kwargs)))
        dims = self._item_dims(shape) if where.route is None else (0,)
        if func in _JOIN and argument(args, kwargs, 1, "dim", 0) % len(shape) in dims:
            raise RefusedError("it is joined to data along a dimension that tells rows apart")
        if func in _BATCHED and self._per != "example":
            raise RefusedError(f"it meets data that do not keep rows per {self._per} apart")
        self._note(sources, "closed form")

        def expand(t: Any) -> Any:
            if id(t) not in sources:
                return t
            full = torch.Size((1,) * (len(shape) - t.dim()) + t.shape)
            target = [shape[d] if d in dims else size for d, size in enumerate(full)]
            if any(full[d] not in (1, target[d]) for d in dims):
                raise RefusedError(f"its shape {tuple(t.shape)} does not fit a batch {shape[0]}")
            source = sources[id(t)]
            if isinstance(source, Derived) and not isinstance(source, Lookup):
                self._note({id(t): source}, "general")

            def backward(entries: Entries, grad: Tensor) -> None:
                with _named(source.slots):
                    entries.pull(source, full, grad, dims, where)

            return Operand.apply(self, backward, self._probe, t.reshape(full), tuple(target))

        args, kwargs = tree_map(expand, (args, kwargs))
        y = func(*args, **kwargs)
        if func not in _SET:
            self._pass_route(where, list(tensors_of((y,), {})))
        return y

    def _set_shape(self, x: Tensor, index: Any, where: Where) -> tuple[torch.Size, Where]:
        """The shape of x[index], into which a parameter is written, and where its examples are."""
        first = index[0] if isinstance(index, tuple) else index
        with torch.no_grad():
            shape = x[index].shape
        if first is Ellipsis or (isinstance(first, slice) and first == slice(None)):
            return shape, where
        route = next(iter(self._routes.picked(Tensor.__getitem__, (x, index), {})))
        if route is None or route is LOST:
            raise RefusedError("it is written into some examples of a batch")
        return shape, Where(where.batch_dim, route)

    def _item_dims(self, shape: torch.Size) -> tuple[int, ...]:
        """The dimensions of data that tell rows apart, the example first."""
        if not shape:
            raise RefusedError("it meets a number that is computed from data")
        batch_dim = 0
        if self.batch_dim == 1 and len(shape) > 1 and self.examples:
            batch_dim = int(shape[1] % self.examples == 0)
        if self._per == "example":
            return (batch_dim,)
        if len(shape) < 2:
            raise RefusedError(f"it meets data of shape {tuple(shape)}, without tokens")
        return (batch_dim, 1 - batch_dim)

    def _in_general(self, func: Callable, args: tuple, kwargs: dict, sources: dict) -> Any:
        if not per_example.flat_outputs(y := func(*args, **kwargs))[0]:
            return y  # a comparison
        if in_place(func):
            raise RefusedError("it changes data in place, and has no closed form")
        if self._per != "example":
            raise RefusedError(f"it has no closed form, so that rows per {self._per} are not known")
        B = self.examples
        if B is None:
            raise RefusedError("it has no closed form, and the model's input is no batch")
        call, data, out_dims = per_example.prepare(
            func, args, kwargs, self._is_data, lambda t: id(t) in sources, self.batch_dim or 0, B
        )
        if self._routes.of(data) is not None:
            raise RefusedError("it has no closed form, and its rows were picked by an index")
        ys, leaves, spec = per_example.flat_outputs(y)
        if out_dims is None:
            out_dims = tuple(
                (self.batch_dim or 0) if t.dim() > (self.batch_dim or 0) else 0 for t in ys
            )
        call = dataclasses.replace(call, out_dims=out_dims)
        if any(t.dim() <= d or t.shape[d] % B for t, d in zip(ys, out_dims, strict=True)):
            raise RefusedError("its result is not a batch")
        key = (func, *sorted(slot.name for s in sources.values() for slot in s.slots))
        if key not in self._checked and B > 1:
            per_example.check(call, data, ys, B)
            self._checked.add(key)
        self._note(sources, "general")
        arguments = [sources[id(call.arguments[i])] for i in call.leaves]

        def backward(entries: Entries, saved: tuple[Tensor, ...], dys: list) -> None:
            rows = entries.map.B
            for b, grads in call.gradients(saved, dys, rows):
                for source, grad in zip(arguments, grads, strict=True):
                    if grad is not None:
                        for view, part in source.pull(grad[None]):
                            entries.add(view, part, slice(b, b + 1))

        tapped = Output.apply(self, backward, self._probe, len(data), *data, *ys)
        replaced = iter(tapped)
        leaves = [next(replaced) if any(t is y for y in ys) else t for t in leaves]
        return tree_unflatten(leaves, spec)

    def _note(self, sources: dict, path: str) -> None:
        for source in sources.values():
            if isinstance(source, Derived) and not isinstance(source, Lookup):
                path = "general"
            for slot in source.slots:
                if self.paths.get(slot.name) != "general":
                    self.paths[slot.name] = path

    def _refuse(self, func: Callable, args: tuple, kwargs: dict, sources: dict, why: str) -> Any:
        """Call it; if its result would carry a gradient to the parameters, they are refused."""
        args, kwargs, _ = _with_leaves(args, kwargs, sources)
        y = func(*args, **kwargs)
        if any(t.requires_grad for t in tensors_of((y,), {})):
            self._note_refusal(func, sources, why)
        return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, y)

    def _note_refusal(self, func: Callable, sources: dict, why: str) -> None:
        name = resolve_name(func) or getattr(func, "__name__", repr(func))
        for source in sources.values():
            for slot in source.slots:
                self.refused[slot.name] = f"handed to {name}: {why}"


def _with_leaves(args: tuple, kwargs: dict, sources: dict) -> tuple[tuple, dict, dict]:
    """The arguments with a leaf that requires grad for every source, and those leaves."""
    leaves: dict[int, Tensor] = {}

    def leaf(t: Any) -> Any:
        if id(t) not in sources:
            return t
        return leaves.setdefault(id(t), t.detach().requires_grad_())

    args, kwargs = tree_map(leaf, (args, kwargs))
    return args, kwargs, leaves


@contextlib.contextmanager
def _named(slots: list[ParamPlan]) -> Iterator[None]:
    """Say which parameter met data that do not keep the examples apart."""
    try:
        yield
    except MixedExamples as error:
        raise _mixed_error(slots[0].name, None, str(error)) from None
    except TokensDiffer as error:
        raise ValueError(
            f"rows: {slots[0].name!r} met {error}; leave the layer out with exclude="
        ) from None


def _mixed_error(name: str, shape: torch.Size | None, how: str) -> ValueError:
    of = "" if shape is None else f"data of shape {tuple(shape)} "
    return ValueError(
        f"rows: {name!r} met {of}{how}: dimension 0 is not the example, so rows would mix "
        "examples; give every input the batch dimension, say where it is with batch_dim=, leave "
        "the layer out with exclude=, or use mode='grads'"
    )
