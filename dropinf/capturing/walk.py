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
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from dropinf.capturing.alignment import RULES
from dropinf.capturing.graph import HOOKED, LIKE, Edge, Site, site_of
from dropinf.capturing.keeping import keeps
from dropinf.capturing.owner_rules import Call
from dropinf.capturing.owners import Array, Owners, merged, varying


@dataclass
class Found:
    """What a walk found.

    Attributes:
        owners: of each site's output; a string says where they were lost.
        leaves: id of each leaf that is reached past the sites -> (the leaf, its owners).
        opaque: name of a Function that nobody declared: its backward may run a forward pass again,
            so that parameters get gradients that the graph does not show.
        checkpoints: reentrant checkpoints -> the owners of their results and, as long as nobody has
            seen inside, of their arguments.
    """

    owners: dict[Site, Owners] = field(default_factory=dict)
    leaves: dict[int, tuple[Tensor, Owners]] = field(default_factory=dict)
    opaque: str = ""
    checkpoints: dict[Any, tuple[list[Owners | None], list[Owners]]] = field(default_factory=dict)


def walk(starts: Sequence[tuple[Tensor, Owners]], T: int | None = None) -> Found:
    """Walk from tensors whose owners are known.

    Args:
        starts: the losses, or what a checkpoint ran again, and their owners.
        T: tokens that have rows; None where rows are the examples'.
    """
    found = Found()
    known: dict[Any, list[Owners | None]] = {}
    roots = []
    for t, owners in starts:
        if t.grad_fn is not None:
            _give(known, (t.grad_fn, t.output_nr), owners, T)
            roots.append(t.grad_fn)
        else:
            found.leaves[id(t)] = t, owners
    for node in _ordered(roots):
        outs = known.pop(node, [])
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.leaves[id(variable)] = variable, _first(outs)
            continue
        edges, given = _arguments(node, outs, T, found)
        for edge, owners in zip(edges, given, strict=True):
            if edge[0] is not None:
                _give(known, edge, owners, T)
    return found


def _edges(node: Any) -> Sequence[Edge]:
    site = site_of(node)
    if site is not None:
        return site.edges
    like = node.metadata.get(LIKE)
    return node.next_functions if like is None else (like[0],)


def _ordered(roots: Sequence[Any]) -> list[Any]:
    """The nodes below the roots, each after all that use it."""
    order: list[Any] = []
    seen = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(below, False) for below, _ in _edges(node) if below is not None]
    return order[::-1]


def _give(known: dict, edge: Edge, owners: Owners, T: int | None) -> None:
    node, nr = edge
    outs = known.setdefault(node, [])
    outs += [None] * (nr + 1 - len(outs))
    outs[nr] = owners if outs[nr] is None else merged(outs[nr], owners, T)


def _first(outs: Sequence[Owners | None]) -> Owners:
    return next((o for o in outs if o is not None), "nothing")


def _arguments(
    node: Any, outs: list[Owners | None], T: int | None, found: Found
) -> tuple[Sequence[Edge], Sequence[Owners]]:
    """Where a node hands gradients, and whose they are."""
    site, edges = site_of(node), _edges(node)
    lost = next((o for o in outs if isinstance(o, str)), None)
    if lost is None and HOOKED in node.metadata:
        lost = "a hook on a tensor"
    if site is not None:
        owners = _first(outs) if lost is None else lost
        owners = found.owners[site] = owners if isinstance(owners, str) else site.taken(owners, T)
        return edges, site.given(owners)
    function = getattr(type(node), "_forward_cls", None)  # of a Function written in Python
    if lost is not None:
        _note_function(node, function, outs, [lost] * len(edges), found)
        return edges, [lost] * len(edges)
    shapes = [None if below is None else below._input_metadata[nr].shape for below, nr in edges]
    out_shapes = [m.shape for m in node._input_metadata]
    outs = outs + [None] * (len(out_shapes) - len(outs))
    name = _name(node)
    rule = None if LIKE in node.metadata or function is not None else RULES.get(name)
    if rule is None:
        if function is CheckpointFunction or keeps(node):
            claims = [_claimed(outs, out_shapes, s, T) for s in shapes]
            _note_function(node, function, outs, claims, found)
            return edges, claims
        if LIKE in node.metadata:
            kept = node.metadata[LIKE][1]
            claim = _claimed(outs, out_shapes, shapes[0], T)
            moved = isinstance(claim, str) or any(d >= kept for d in varying(claim))
            return edges, [f"{name}, which may move examples" if moved else claim]
        _note_function(node, function, outs, [], found)
        return edges, [f"{name}, which is not known"] * len(edges)
    call = Call(node, name, shapes, out_shapes[0], T, outs, out_shapes)
    try:
        given = rule(call, _first(outs))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return edges, [f"{name} ({error})"] * len(edges)
    return edges, [_fitting(o, s, name) for o, s in zip(given, shapes, strict=True)]


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
        found.opaque = _name(node)


def _name(node: Any) -> str:
    """The function's name: of autograd's class, without Backward0."""
    return re.sub(r"Backwards?\d*$", "", type(node).__name__)


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
