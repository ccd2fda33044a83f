"""Tensors that carry tracked parameters, and how their gradients lead back to row entries.

A parameter often meets data as something made of it: a transposed view, one expert of a packed
weight, a cast, 1 + weight, a table looked up at positions that all examples share. A source says
which sampled coordinates a tensor holds (`View`), or how to pull a gradient of it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dropinf import ops
from dropinf.capturing.call_args import Meeting, name_of
from dropinf.compression import ParamPlan

# Elements of the per-example gradients that are formed at a time where there is no other way.
_MAX_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class View:
    """A tensor whose elements are elements of one parameter: itself, a view, or a cast.

    Attributes:
        slot: the parameter.
        at: [k] int64 positions of sampled coordinates in the flattened tensor, rising.
        which: [k] which of the slot's coordinates those are; None is all of them in order.
        parameter: the leaf in autograd's graph.
    """

    slot: ParamPlan
    at: Tensor
    which: Tensor | None = None
    parameter: Tensor | None = None

    @classmethod
    def of(cls, slot: ParamPlan, parameter: Tensor | None = None) -> View:
        """The parameter itself."""
        return cls(slot, slot.index, None, parameter)

    def on(self, device: torch.device, cache: dict) -> Tensor:
        """`at` on a device, of a whole parameter copied once: a step is not to wait for it."""
        if self.at is not self.slot.index:
            return self.at.to(device)
        key = "positions", self.slot.name, device
        if key not in cache:
            cache[key] = self.at.to(device)
        return cache[key]

    @property
    def leaves(self) -> list[Tensor]:
        """The parameter."""
        return [self.parameter]

    @property
    def columns(self) -> slice | Tensor:
        """Where its entries stand in a row."""
        whole = self.which is None or self.slot.entry_map is not None
        return self.slot.entries if whole else self.which + self.slot.offset

    @property
    def slots(self) -> list[ParamPlan]:
        """The parameters behind it."""
        return [self.slot]

    def viewed(self, base: Tensor, view: Tensor) -> View | None:
        """The source of a view of `base`, whose source this is; None if elements repeat in it."""
        dims = sorted(
            (
                (stride, size, d)
                for d, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True))
                if size > 1
            ),
            reverse=True,
        )
        reach = 0  # of the smaller dimensions together
        for stride, size, _ in reversed(dims):
            if stride <= reach:
                return None
            reach += (size - 1) * stride
        offset = torch.full_like(self.at, base.storage_offset() - view.storage_offset())
        for index, stride in zip(
            torch.unravel_index(self.at, base.shape), base.stride(), strict=True
        ):
            offset += index * stride
        inside = offset >= 0
        flat = torch.zeros_like(offset)
        steps = {d: view.shape[d + 1 :].numel() for d in range(view.dim())}
        for stride, size, d in dims:
            index = offset.div(stride, rounding_mode="floor")
            inside &= index < size
            offset = offset - index * stride
            flat += index * steps[d]
        inside &= offset == 0
        order = flat.argsort()  # the ops take coordinates in rising order
        order = order[inside[order]]
        if len(order) == len(flat) and bool((order[1:] > order[:-1]).all()):
            return View(self.slot, flat, self.which, self.parameter)
        which = order if self.which is None else self.which[order]
        return View(self.slot, flat[order], which, self.parameter)

    def pull(self, grads: Tensor, cache: dict) -> Iterator[tuple[View, Tensor]]:
        """(parameter's view, entries [n, k]) of n gradients [n, *shape] of this tensor."""
        yield self, grads.reshape(len(grads), -1)[:, self.on(grads.device, cache)]


@dataclass(frozen=True)
class Derived:
    """A tensor made of parameters alone, by any functions: autograd's graph of it is what is known.

    Attributes:
        output: its edge in the graph, of the time when it was made: a later write is another.
        shape, dtype: its.
        leaves: the parameters in its graph.
        slots: theirs.
    """

    output: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    leaves: Sequence[Tensor]
    slots: Sequence[ParamPlan]

    def pull(self, grads: Tensor, cache: dict) -> Iterator[tuple[View, Tensor]]:
        """(parameter's view, entries [n, k]) of n gradients [n, *shape] of this tensor."""
        each = [
            torch.autograd.grad(
                self.output,
                self.leaves,
                grad.to(self.dtype),
                retain_graph=True,
                allow_unused=True,
            )
            for grad in grads
        ]
        for slot, parts in zip(self.slots, zip(*each, strict=True), strict=True):
            if parts[0] is not None:
                dense = torch.stack([part.to_dense() for part in parts])
                yield from View.of(slot).pull(dense, cache)


@dataclass(frozen=True)
class Lookup(Derived):
    """Rows of a parameter's table at ids that examples may share: the positions of a text."""

    table: View
    width: int
    ids: Tensor
    padding: int | None

    def pull_positions(
        self, ids: Tensor, dy: Tensor, backend: str | None, cache: dict
    ) -> tuple[View, Tensor]:
        """(the table's view, entries [b, k]) of dy [b, T, width] at ids [b, T]."""
        at = self.table.on(dy.device, cache)
        o_idx, i_idx = (t.to(torch.int32) for t in (at % self.width, at // self.width))
        if self.padding is not None:
            ids = ids.masked_fill(ids == self.padding, -1)
        entries = ops.sampled_embedding(ids, dy, o_idx, i_idx, backend=backend)
        return self.table, entries


Source = View | Derived

# Casts and copies: an element of the result is an element of the argument.
_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone"}


def source_of(func: Callable, args: tuple, t: Tensor, sources: dict[int, Source]) -> Source:
    """The source of a tensor that a function made of sources and of no other gradient."""
    if len(sources) == 1 and args and id(args[0]) in sources and t is not args[0]:
        leaf, source = args[0], sources[id(args[0])]
        cast = name_of(func) in _CASTS and t.shape == leaf.shape
        if cast and isinstance(source, (View, Lookup)):
            return source
        if isinstance(source, View) and t.dtype == leaf.dtype and _same_memory(t, leaf):
            viewed = source.viewed(leaf, t)
            if viewed is not None:
                return viewed
    pairs = {
        id(leaf): (leaf, slot)
        for source in sources.values()
        for leaf, slot in zip(source.leaves, source.slots, strict=True)
    }
    leaves, slots = zip(*pairs.values(), strict=True)
    return Derived(get_gradient_edge(t), t.shape, t.dtype, leaves, slots)


def lookup_of(met: Meeting, y: Tensor) -> Lookup | None:
    """The source of what F.embedding made, if nothing but ids and their padding says what it is."""
    table = met.sources.get(id(met.args[1]))
    renormed = met.argument(3, "max_norm") is not None
    if not isinstance(table, View) or renormed or met.argument(5, "scale_grad_by_freq", False):
        return None
    padding = met.argument(2, "padding_idx")
    padding = None if padding is None else padding % len(met.args[1])
    at = get_gradient_edge(y), y.shape, y.dtype
    return Lookup(*at, table.leaves, table.slots, table, y.shape[-1], met.args[0], padding)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    if one.layout != torch.strided:
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def chunk_items(n: int, num_elements: int) -> Iterator[slice]:
    """n items in steps that hold a bounded number of elements, given those of one item."""
    step = max(1, _MAX_ELEMENTS // max(1, num_elements))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
