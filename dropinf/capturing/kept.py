"""Kept: what captures of one model under one plan have in common, from one `with` to the next.

What a pass needed to find out is kept under the signature of its graph: a pass over a graph of the
same functions, shapes, sites and parameters, whose nodes keep the same values where a rule read
some, has the same owners. A pass that differs in any of it is walked again.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from dropinf.capturing.extension import CPP
from dropinf.capturing.graph import HOOKED, INSIDES, LIKE, FormSite, Passes, site_of
from dropinf.capturing.index_rules import as_index
from dropinf.capturing.owner_rules import read_of
from dropinf.capturing.owners import Owners
from dropinf.capturing.reading import Reading
from dropinf.capturing.sources import View
from dropinf.capturing.walk import Found
from dropinf.compression import ParamPlan, Plan

_MAX_RECORDS = 512  # of graphs, some 30 KB each: every length of a batch's texts has one
_MAX_READ = 1 << 16  # elements of an index or a mask that a record keeps


@dataclass(frozen=True)
class Record:
    """What a walk over one graph found.

    Attributes:
        owners: of each site that has a node in C++, in the order of a trace.
        in_python: of each node that Python made, or has notes on, what tells it from others; and
            the owners of its site, or of the sites inside of it, if it has some.
        reads: number of each node of which rules read more, and (attribute, value) of what.
        leaves: numbers of the parameters that are leaves past the sites, and their owners.
        reading: what follows for the parameters.
        writing: of each site that has a node in C++: whether the node writes by itself.
        inside: of each call of compiled code: what its sites write by themselves.
        written: the parameters of those, which nothing else writes.
    """

    owners: Sequence[Owners]
    in_python: Sequence[tuple[tuple, Owners | list[Owners | None] | None]]
    reads: Sequence[tuple[int, Sequence[tuple[str, Any]]]]
    leaves: Sequence[tuple[int, Owners]]
    reading: Reading
    writing: Sequence[bool]
    inside: Sequence[Sequence[Any]]
    written: frozenset[str]


class Kept:
    """What is kept of one model under one plan.

    Attributes:
        parameters: the plan's, in the model.
        slot_of: id of each -> its place in the plan.
        sources: id of each -> a reference to it, and what it is to those who meet it; not a weak
            one, for which torch.utils.swap_tensors would refuse the parameter.
        numbers: id of each -> its number.
        table: calls that sites were made for.
        shared: functions and parameters whose results turned out to be shared by examples.
    """

    def __init__(self, parameters: Sequence[Tensor], slots: Sequence[ParamPlan]) -> None:
        self.parameters = parameters
        self.slot_of = {id(p): slot for p, slot in zip(parameters, slots, strict=True)}
        self.sources = {
            id(p): (partial(_itself, p), (View.of(slot, p), None))
            for p, slot in zip(parameters, slots, strict=True)
        }
        self.numbers = {id(p): number for number, p in enumerate(parameters)}
        self.table = None if CPP is None else CPP.CallTable()
        self.shared: frozenset[tuple] = frozenset()
        self._kinds: dict[tuple, int] = {}
        self._records: dict[tuple, Record] = {}

    def shared_by_nodes(self, site: FormSite) -> Any:
        """What the site's nodes in C++ have in common; None if there are no such."""
        if CPP is None:
            return None
        return CPP.Site(site, self._kinds.setdefault(site.kind, len(self._kinds)), site.reads)

    def share_out(self, shared: set[tuple] | frozenset[tuple]) -> None:
        """Leave these calls to autograd, whose results turned out to be shared by examples."""
        self.shared = frozenset(shared)
        if self.table is not None:
            self.table.clear()

    def trace(self, losses: Tensor, tap: Passes) -> Any:
        """What the graph of the losses looks like; None if that cannot be told."""
        if CPP is None:
            return None
        trace = CPP.Trace(losses, self.numbers, tap)
        return trace if trace.signature else None

    def recall(self, trace: Any, T: int | None) -> Record | None:
        """What a walk over such a graph found."""
        key = _key(trace, T)
        record = self._records.pop(key, None)
        if record is None:
            return None
        self._records[key] = record  # behind those that were asked for before
        for i, (told, _) in zip(trace.in_python, record.in_python, strict=True):
            node = trace.node(i)
            if _untold(node) or _told(node) != told:
                return None
        for i, read in record.reads:
            node = trace.node(i)
            for name, kept in read:
                if not _same(read_of(node, name), kept):
                    return None
        return record

    def found(self, trace: Any, record: Record) -> Found:
        """What a walk would find."""
        leaves = ((self.parameters[number], owners) for number, owners in record.leaves)
        found = Found(
            leaves={id(leaf): (leaf, owners) for leaf, owners in leaves}, recorded=record.owners
        )
        for i, (_, owners) in zip(trace.in_python, record.in_python, strict=True):
            node = trace.node(i)
            if isinstance(owners, list):
                inside = zip(node.inside.sites, owners, strict=True)
                found.owners.update((call, o) for call, o in inside if o is not None)
            elif owners is not None:
                found.owners[node] = owners
        return found

    def remember(
        self,
        trace: Any,
        T: int | None,
        found: Found,
        reading: Reading,
        writes: Callable[[Sequence[Any]], Sequence[Any]],
    ) -> Record | None:
        """Keep what a walk found; None where it may depend on more than a record has."""
        python = [trace.node(i) for i in trace.in_python]
        if found.checkpoints or found.opaque or any(map(_untold, python)):
            return None
        reads: dict[Any, dict[str, Any]] = {}
        for node, name, value in found.log:
            reads.setdefault(node, {})[name] = _to_keep(value)
        if any(value is NotImplemented for read in reads.values() for value in read.values()):
            return None
        number = {trace.node(i): i for i in range(len(trace))} if reads else {}
        leaves = [
            (self.numbers[key], owners)
            for key, (_, owners) in found.leaves.items()
            if key in self.numbers
        ]
        sites, calls = trace.sites, calls_in(trace)
        writing = [of is not None for of in writes(sites)]
        inside = [writes(call.sites) for call in calls]
        every = [*zip(sites, writing, strict=True)]
        for call, of in zip(calls, inside, strict=True):
            every += zip(call.sites, (one is not None for one in of), strict=True)
        written = {slot.name for node, alone in every if alone for slot in node.site.slots}
        record = Record(
            [found.owners[node] for node in sites],
            [(_told(node), _owners_at(node, found)) for node in python],
            [(number[node], tuple(read.items())) for node, read in reads.items()],
            leaves,
            reading.copy(),
            writing,
            inside,
            frozenset(written),
        )
        while len(self._records) >= _MAX_RECORDS:
            del self._records[next(iter(self._records))]
        self._records[_key(trace, T)] = record
        return record


_KEPT: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[Plan, dict[Any, Kept]]]
_KEPT = weakref.WeakKeyDictionary()


def kept_of(model: nn.Module, plan: Plan, parameters: Sequence[Tensor], options: tuple) -> Kept:
    """What earlier captures of the model left, if its parameters are the same ones still."""
    if any(map(_may_hold_the_model, parameters)):
        _KEPT.pop(model, None)  # or the model would be held by what is kept of it
        return Kept(parameters, plan.slots)
    of_plan = _KEPT.setdefault(model, weakref.WeakKeyDictionary()).setdefault(plan, {})
    kept = of_plan.get(options)
    if kept is None or any(a is not b for a, b in zip(kept.parameters, parameters, strict=True)):
        kept = of_plan[options] = Kept(parameters, plan.slots)
    return kept


def _key(trace: Any, T: int | None) -> tuple:
    """Of a graph; its signature may be long, and 128 bits of it do not meet by chance."""
    return T, hashlib.blake2b(trace.signature, digest_size=16).digest()


def _may_hold_the_model(p: Tensor) -> bool:
    """Whether hooks or attributes of a parameter may lead back to its model."""
    if p._backward_hooks or p._post_accumulate_grad_hooks:
        return True
    plain = (bool, int, float, str, type(None))
    return any(not isinstance(value, plain) for value in vars(p).values())


def _itself(p: Tensor) -> Tensor:
    return p


def _untold(node: Any) -> bool:
    """Whether there is more to a node than its class, shapes and what rules read."""
    notes = node.metadata
    return HOOKED in notes or LIKE in notes


def _told(node: Any) -> tuple:
    """What tells a node that Python made, or has notes on, from others, for a walk."""
    if type(node) in INSIDES:
        return node.inside.told
    site = site_of(node)
    if site is None:
        return (type(node),)  # held, so that no other class can be in its place
    sources = [(type(source), *(s.name for s in source.slots)) for source, _ in site.targets]
    return type(site), site.name, *sources


def _owners_at(node: Any, found: Found) -> Owners | list[Owners | None] | None:
    if type(node) in INSIDES:
        return [found.owners.get(call) for call in node.inside.sites]
    return found.owners.get(node)


def calls_in(trace: Any) -> list[Any]:
    """The calls of compiled code in a graph."""
    nodes = map(trace.node, trace.in_python)
    return [node.inside for node in nodes if type(node) in INSIDES and node.inside.sites]


def _to_keep(value: Any) -> Any:
    """A value that a node had, as it can be kept; NotImplemented if it is too large."""
    if isinstance(value, Tensor):
        small = value.numel() <= _MAX_READ and not value.is_floating_point()
        return as_index(value.detach()).copy() if small else NotImplemented
    if isinstance(value, (list, tuple)):
        kept = [_to_keep(v) for v in value]
        return NotImplemented if any(v is NotImplemented for v in kept) else type(value)(kept)
    return value


def _same(value: Any, kept: Any) -> bool:
    if type(kept) is int:
        return type(value) is int and value == kept
    if isinstance(kept, np.ndarray):
        if isinstance(value, Tensor):
            if tuple(value.shape) != kept.shape:
                return False
            value = as_index(value.detach())
        alike = isinstance(value, np.ndarray) and value.dtype == kept.dtype  # ones, or a mask
        return alike and np.array_equal(value, kept)
    if isinstance(kept, (list, tuple)):
        return (
            type(value) is type(kept) and len(value) == len(kept) and all(map(_same, value, kept))
        )
    return type(value) is type(kept) and bool(value == kept)
