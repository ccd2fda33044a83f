"""The table of alignment against brute force: whose an argument is, by the gradients themselves."""

import warnings

import numpy as np
import pytest
import torch
from alignment_cases import CALLS, NOT_HERE
from torch import nn

from dropinf import Full, Plan, capture
from dropinf.capturing.alignment import RULES
from dropinf.capturing.walk import walk

NONE = -1


def made(call):
    """The call's arguments and results, run as a capture runs it."""
    torch.manual_seed(0)
    dtype = torch.complex128 if call.complex else torch.float64
    xs = [torch.randn(s, dtype=dtype) for s in call.shapes]
    if call.positive:
        xs = [torch.rand_like(x) * 0.8 + 0.1 for x in xs]
    xs = [x.requires_grad_() for x in xs]
    other = nn.Linear(1, 1)
    with warnings.catch_warnings(), capture(other, Plan.make(other, Full())):
        warnings.simplefilter("ignore")
        ys = call.function(*xs)
    return xs, [ys] if isinstance(ys, torch.Tensor) else list(ys)


def nodes(ys):
    seen, stack = {}, [y.grad_fn for y in ys]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen[node] = type(node).__name__.removesuffix("Backward0").removesuffix("Backward1")
            stack += [below for below, _ in node.next_functions]
    return {n.split("Backward")[0] for n in seen.values()}


def reaches(xs, ys):
    """For each result and argument [elements, *shape]: whether an element's gradient gets there."""
    found = []
    for y in ys:
        parts = (
            torch.view_as_real(y.resolve_conj()).flatten(0, -2)
            if y.is_complex()
            else y.reshape(-1, 1)
        )
        mine = [np.zeros((y.numel(), *x.shape), bool) for x in xs]
        for i, element in enumerate(parts):
            for part in element:
                grads = torch.autograd.grad(part, xs, retain_graph=True, materialize_grads=True)
                for reach, grad in zip(mine, grads, strict=True):
                    reach[i] |= (grad != 0).numpy()
        found.append(mine)
    return found


def labels(shape, seed):
    """(kind, owners) of a tensor: along each dimension, in any order, some of nobody; anything."""
    rng = np.random.default_rng(seed)
    rank = len(shape)
    yield "all", np.full((1,) * rank, 1)
    for d, size in enumerate(shape):
        if size < 2:
            continue
        at = [size if k == d else 1 for k in range(rank)]
        order = rng.permutation(size)
        yield d, order.reshape(at)
        yield d, np.where(order == order[0], NONE, order).reshape(at)
        yield d, (order // 2).reshape(at)
        if rank > 1:
            other = (d + 1) % rank
            at = [shape[k] if k in (d, other) else 1 for k in range(rank)]
            yield "any", rng.permutation(size * shape[other]).reshape(at)
    yield "any", rng.integers(-1, 3, shape)
    yield "any", np.where(rng.random(shape) < 0.8, NONE, rng.integers(0, 2, shape))


def true_owners(xs, ys, reach, given):
    """For each argument: {owner: which elements it reaches}."""
    found = []
    for k, x in enumerate(xs):
        mine = {}
        for y, by_argument, owners in zip(ys, reach, given, strict=True):
            if owners is None:
                continue
            full = np.broadcast_to(owners, y.shape).reshape(-1)
            for b in np.unique(full[full != NONE]).tolist():
                mine.setdefault(b, np.zeros(x.shape, bool))
                mine[b] |= by_argument[k][full == b].any(0)
        found.append(mine)
    return found


def check(call, xs, ys, reach, kind, given, T=None):
    starts = [(y, o) for y, o in zip(ys, given, strict=True) if o is not None]
    leaves = walk(starts, T).leaves
    lossy = kind == "any" or -1 in call.loses or kind in call.loses
    for k, (x, truth) in enumerate(zip(xs, true_owners(xs, ys, reach, given), strict=True)):
        found = leaves.get(id(x), (x, np.full((1,) * x.dim(), NONE)))[1]
        if isinstance(found, str):
            several = sum(mask.astype(int) for mask in truth.values()) if truth else np.zeros(1)
            if T is None:
                assert lossy or (several > 1).any(), f"argument {k}, along {kind}: {found}"
            continue
        full = np.broadcast_to(found, x.shape)  # it has x's dimensions
        assert found.ndim == x.dim()
        for b, mask in truth.items():
            right = full == b if T is None else (full == b) | (full == -2 - b // T)
            assert right[mask].all(), f"argument {k}, along {kind}: {b} reaches {mask}, not {full}"


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.name} {call.label}".strip())
def test_owners_are_those_of_the_gradients(call):
    xs, ys = made(call)
    assert call.name in nodes(ys)
    reach = reaches(xs, ys)
    assert any(r.any() for mine in reach for r in mine) or call.name in FLAT
    each = [list(labels(tuple(y.shape), seed=0)) for y in ys]
    for some in zip(*each, strict=False):
        given = [owners for _, owners in some]
        # Parts with owners of their own may be lost, if the function is told of one of them.
        same = all(np.array_equal(given[0], owners) for owners in given)
        kind = some[0][0] if same else "any"
        for T in (None, 2):
            check(call, xs, ys, reach, kind, given, T)
            if len(ys) > 1:  # results of which some reach no loss
                check(call, xs, ys, reach, kind, [None, *given[1:]], T)
                check(call, xs, ys, reach, "any", [given[0], *[None] * (len(ys) - 1)], T)


def test_what_was_not_taken_is_nobodys():
    source = torch.randn(3, requires_grad=True)
    y = torch.zeros(2, 2).masked_scatter(torch.eye(2, dtype=torch.bool), source)
    assert walk([(y, np.array([[0], [1]]))]).leaves[id(source)][1].tolist() == [0, 1, NONE]


# Their gradient is zero everywhere.
FLAT = {"Ceil", "Floor", "Round", "Sgn", "Sign", "Trunc"}


def test_every_function_of_the_table_is_tried():
    tried = {call.name for call in CALLS}
    assert not tried & NOT_HERE
    assert tried | NOT_HERE == set(RULES)
