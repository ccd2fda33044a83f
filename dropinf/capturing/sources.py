"""Tensors that carry tracked parameters, and how their gradients lead back to row entries.

A parameter often meets data as something made of it: a transposed view, one expert of a packed
weight, a cast, 1 + weight, a table looked up at positions that all examples share. A source says
which sampled coordinates a tensor holds (`View`), or how to pull a gradient of it back (`Lookup`,
`Derived`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dropinf import ops
from dropinf.capturing.call_args import name_of
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
    """

    slot: ParamPlan
    at: Tensor
    which: Tensor | None = None

    @classmethod
    def of(cls, slot: ParamPlan) -> View:
        """The parameter itself."""
        return cls(slot, slot.index)

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
            return View(self.slot, flat, self.which)
        return View(self.slot, flat[order], order if self.which is None else self.which[order])

    def pull(self, grads: Tensor) -> Iterator[tuple[View, Tensor]]:
        """(parameter's view, entries [n, k]) of n gradients [n, *shape] of this tensor."""
        yield self, grads.reshape(len(grads), -1)[:, self.at.to(grads.device)]


@dataclass(frozen=True)
class Derived:
    """A tensor computed from sources and constants alone, by any function.

    Attributes:
        output: the tensor, with its graph down to `leaves`.
        leaves: what stands for each source in that graph.
        sources: theirs.
    """

    output: Tensor
    leaves: Sequence[Tensor]
    sources: Sequence[View | Derived]

    @property
    def slots(self) -> list[ParamPlan]:
        """The parameters behind it."""
        return [slot for source in self.sources for slot in source.slots]

    def pull(self, grads: Tensor) -> Iterator[tuple[View, Tensor]]:
        """(parameter's view, entries [n, k]) of n gradients [n, *shape] of this tensor."""
        for leaf, source, pulled in self._pulled(grads):
            if pulled is not None:
                yield from source.pull(pulled.reshape(len(grads), *leaf.shape))

    def _pulled(self, grads: Tensor) -> Iterator[tuple[Tensor, View | Derived, Tensor | None]]:
        each = [
            torch.autograd.grad(
                self.output,
                self.leaves,
                grad.to(self.output.dtype),
                retain_graph=True,
                allow_unused=True,
            )
            for grad in grads
        ]
        for leaf, source, parts in zip(
            self.leaves, self.sources, zip(*each, strict=True), strict=True
        ):
            yield leaf, source, None if parts[0] is None else torch.stack(parts)


@dataclass(frozen=True)
class Lookup(Derived):
    """Rows of a parameter's table at ids that all examples share: the positions of a text."""

    ids: Tensor | None = None
    padding: int | None = None

    def pull_positions(self, ids: Tensor, dy: Tensor, backend: str | None) -> tuple[View, Tensor]:
        """(the table's view, entries [b, k]) of dy [b, T, width] at ids [b, T]."""
        (table,) = self.sources
        width = self.leaves[0].shape[1]
        o_idx, i_idx = (t.to(dy.device, torch.int32) for t in (table.at % width, table.at // width))
        if self.padding is not None:
            ids = ids.masked_fill(ids == self.padding, -1)
        return table, ops.sampled_embedding(ids, dy, o_idx, i_idx, backend=backend)


Source = View | Derived

# Casts and copies: an element of the result is an element of the argument.
_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone"}


def source_of(
    func: Callable, args: tuple, kwargs: dict, t: Tensor, leaves: dict, sources: dict
) -> Source:
    """The source of a tensor that a function made of leaves that stand for sources."""
    ids = list(leaves)
    if len(ids) == 1:
        leaf, source = leaves[ids[0]], sources[ids[0]]
        if isinstance(source, View):
            if name_of(func) in _CASTS and t.shape == leaf.shape:
                return View(source.slot, source.at, source.which)
            if t.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr():
                viewed = source.viewed(leaf, t)
                if viewed is not None:
                    return viewed
            if func is F.embedding and args[1] is leaf:
                padding = args[2] if len(args) > 2 else kwargs.get("padding_idx")
                padding = None if padding is None else padding % len(leaf)
                return Lookup(t, [leaf], [source], args[0], padding)
    return Derived(t, list(leaves.values()), [sources[i] for i in ids])


def chunk_items(n: int, num_elements: int) -> Iterator[slice]:
    """n items in steps that hold a bounded number of elements, given those of one item."""
    step = max(1, _MAX_ELEMENTS // max(1, num_elements))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
