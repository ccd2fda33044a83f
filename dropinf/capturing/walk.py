"""The walk: from the losses back through autograd's graph, and what it finds there.

Row b is the gradient of losses[b]. So what a layer must know is which example each position of its
output belongs to, and that is read from the graph itself: the losses belong to the examples in
order, and `alignment` says for each function whose its arguments are. Nothing is assumed of data,
constants or masks, which are not in the graph.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from dropinf.capturing.alignment import RULES
from dropinf.capturing.graph import HOOKED, INSIDES, LIKE, Edge, site_of
from dropinf.capturing.keeping import keeps
from dropinf.capturing.owner_rules import Call
from dropinf.capturing.owners import Array, Owners, merged, varying


@dataclass
class Found:
    """What a walk found.

    Attributes:
        owners: of the output of each site's node; a string says where they were lost.
        leaves: id of each leaf that is reached past the sites -> (the leaf, its owners).
        opaque: name of a Function that nobody declared: its backward may run a forward pass again,
            so that parameters get gradients that the graph does not show.
        checkpoints: reentrant checkpoints -> the owners of their results and, as long as nobody has
            seen inside, of their arguments.
        log: (node, attribute, value) of what was read of the graph, beside its nodes and shapes.
        recorded: owners of sites in C++, by their place, that an earlier walk found.
    """

    owners: dict[Any, Owners] = field(default_factory=dict)
    leaves: dict[int, tuple[Tensor, Owners]] = field(default_factory=dict)
    opaque: str = ""
    checkpoints: dict[Any, tuple[list[Owners | None], list[Owners]]] = field(default_factory=dict)
    log: list[tuple[Any, str, Any]] = field(default_factory=list)
    recorded: Sequence[Owners] = ()

    def owners_of(self, node: Any) -> Owners | None:
        """The owners of the output of a site's node; None if it was not met."""
        if self.recorded and (place := getattr(node, "place", -1)) >= 0:
            return self.recorded[place]
        return self.owners.get(node)


def walk(starts: Sequence[tuple[Tensor, Owners]], T: int | None = None) -> Found:
    """Walk from tensors whose owners are known.

    Args:
        starts: the losses, or what a checkpoint ran again, and their owners.
        T: tokens that have rows; None where rows are the examples'.
    """
    found = Found()
    known: dict[Any, list[Owners | None]] = {}
    memo: dict[tuple, Any] = {}
    roots = []
    for t, owners in starts:
        if t.grad_fn is not None:
            _give(known, (t.grad_fn, t.output_nr), owners, T)
            roots.append(t.grad_fn)
        else:
            found.leaves[id(t)] = t, owners
    for node, edges in _ordered(roots):
        outs = known.pop(node, [])
        if not edges and hasattr(node, "variable"):
            found.leaves[id(node.variable)] = node.variable, _first(outs)
            continue
        given = _arguments(node, edges, outs, T, found, memo)
        for edge, owners in zip(edges, given, strict=True):
            if edge[0] is not None:
                _give(known, edge, _interned(owners, memo), T)
    return found


def _edges(node: Any) -> Sequence[Edge]:
    site = site_of(node)
    if site is not None:
        return site.edges(node)
    if type(node) in INSIDES:
        return node.inside.edges
    like = node.metadata.get(LIKE)
    return node.next_functions if like is None else (like[0],)


def _ordered(roots: Sequence[Any]) -> list[tuple[Any, Sequence[Edge]]]:
    """The nodes below the roots and their edges, each after all that use it."""
    order: list[tuple[Any, Sequence[Edge]]] = []
    seen = set()
    stack: list[tuple[Any, Sequence[Edge] | None]] = [(root, None) for root in roots]
    while stack:
        node, edges = stack.pop()
        if edges is not None:
            order.append((node, edges))
        elif node not in seen:
            seen.add(node)
            edges = _edges(node)
            stack.append((node, edges))
            stack += [(below, None) for below, _ in edges if below is not None]
    return order[::-1]


def _give(known: dict, edge: Edge, owners: Owners, T: int | None) -> None:
    node, nr = edge
    outs = known.setdefault(node, [])
    outs += [None] * (nr + 1 - len(outs))
    outs[nr] = owners if outs[nr] is None else merged(outs[nr], owners, T)


def _interned(owners: Owners, memo: dict) -> Owners:
    """The same array for the same owners, so that layers after the first are known by identity."""
    if isinstance(owners, str) or owners.size > 4096:
        return owners
    return memo.setdefault((owners.shape, owners.tobytes()), owners)


def _first(outs: Sequence[Owners | None]) -> Owners:
    return next((o for o in outs if o is not None), "nothing")


def _arguments(
    node: Any,
    edges: Sequence[Edge],
    outs: list[Owners | None],
    T: int | None,
    found: Found,
    memo: dict,
) -> Sequence[Owners]:
    """Whose the gradients are that a node hands along its edges."""
    site, notes = site_of(node), node.metadata
    lost = next((o for o in outs if isinstance(o, str)), None)
    if lost is None and HOOKED in notes:
        lost = "a hook on a tensor"
    if site is not None:
        owners = _first(outs) if lost is None else lost
        owners = found.owners[node] = owners if isinstance(owners, str) else site.taken(owners, T)
        return [site.given(owners) for _ in edges]
    if type(node) in INSIDES:
        return node.inside.owners(outs if lost is None else [lost] * len(outs), T, found)
    name, function = _kind(type(node))
    if lost is not None:
        _note_function(node, function, outs, [lost] * len(edges), found)
        return [lost] * len(edges)
    shapes = [None if below is None else below._input_metadata[nr].shape for below, nr in edges]
    out_shapes = [m.shape for m in node._input_metadata]
    outs = outs + [None] * (len(out_shapes) - len(outs))
    # Of Functions written in Python the table knows nothing, whatever their names are.
    rule = RULES.get(name) if function is None and LIKE not in notes else None
    if rule is None:
        if function is CheckpointFunction or keeps(node):
            claims = [_claimed(outs, out_shapes, s, T) for s in shapes]
            _note_function(node, function, outs, claims, found)
            return claims
        if LIKE in notes:
            kept = notes[LIKE][1]
            claim = _claimed(outs, out_shapes, shapes[0], T)
            moved = isinstance(claim, str) or any(d >= kept for d in varying(claim))
            return [f"{name}, which may move examples" if moved else claim]
        _note_function(node, function, outs, [], found)
        return [f"{name}, which is not known"] * len(edges)
    first = _first(outs)
    call = Call(node, name, shapes, out_shapes[0], T, outs, out_shapes, memo, found.log)
    try:
        given = rule(call, first)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return [f"{name} ({error})"] * len(edges)
    same = out_shapes[0]
    return [
        o if o is first and s == same else _fitting(o, s, name)
        for o, s in zip(given, shapes, strict=True)
    ]


def _note_function(
    node: Any,
    function: type | None,
    outs: list[Owners | None],
    claims: list[Owners],
    found: Found,
) -> None:
    """Keep a Function written in Python whose backward may run a forward pass again."""
    if function is CheckpointFunction:
        found.checkpoints[node] = outs, claims
    elif function is not None and not keeps(node):
        found.opaque = _kind(type(node))[0]


@cache
def _kind(node: type) -> tuple[str, type | None]:
    """Of a class of nodes: the function's name, without Backward0, and the Function, if it is one
    written in Python."""
    return re.sub(r"Backwards?\d*$", "", node.__name__), getattr(node, "_forward_cls", None)


def _fitting(owners: Owners, shape: Sequence[int] | None, name: str) -> Owners:
    """The owners, if they can be of a tensor of this shape."""
    if shape is None or isinstance(owners, str):
        return owners
    fits = owners.ndim == len(shape) and all(
        mine in (1, size) for mine, size in zip(owners.shape, shape, strict=True)
    )
    return owners if fits else name


def _claimed(
    outs: Sequence[Owners | None],
    out_shapes: Sequence[Sequence[int]],
    shape: Sequence[int] | None,
    T: int | None,
) -> Owners:
    """Of an argument of a function that keeps examples where they are."""
    if shape is None:
        return ""
    found: Owners | None = None
    for owners, out_shape in zip(outs, out_shapes, strict=True):
        if owners is not None:
            claim = owners if isinstance(owners, str) else along(owners, out_shape, shape)
            found = claim if found is None else merged(found, claim, T)
    return "nothing" if found is None else found


def along(owners: Array, old: Sequence[int], new: Sequence[int]) -> Owners:
    """The owners of a tensor of shape `new` that has its examples where one of `old` has them."""
    dims = varying(owners)
    if any(d >= len(new) or new[d] != old[d] for d in dims):
        return "a function whose argument has another number of examples"
    return owners.reshape([owners.shape[d] if d in dims else 1 for d in range(len(new))])
