"""Runs: parameters of one call whose entries one op computes from its input and output gradient.

A weight and its bias, which stand side by side in a row, are one run: x and dy are read once. What
an op needs of a run's coordinates is made once and kept in the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropinf import ops
from dropinf.capturing.rules import Role, norm_sums, outer
from dropinf.capturing.sources import Source, View
from dropinf.compression import DenseProjection, Kron, SignedSums, by_entry
from dropinf.ops import bank_schedule, outer_ways

# Products of x and dy, which take sums of coordinates, orders, and a grid as one product ->
# whether a bias is an input of theirs.
_PRODUCTS = {ops.sampled_outer: False, outer: True}


def _takes_sums(op: Any) -> bool:
    return op in _PRODUCTS or getattr(op, "func", None) is norm_sums


Run = list[tuple[View, Role]]


class Grid(NamedTuple):
    """Coordinates that are a product of rows and columns of a weight.

    Attributes:
        rows, columns: [a], [b] int64; None for all.
        swapped: the rows are inputs, as in a weight [I, O].
    """

    rows: Tensor | None
    columns: Tensor | None
    swapped: bool


class Coordinates(NamedTuple):
    """The coordinates of a run, on the device of its gradients.

    Attributes:
        o_idx, i_idx: [r] int32, or [r, s] where entries are sums.
        weights: of their shape, or None for ones.
        grid: what they are the product of, or None.
        orders: (op, I, O, bytes of an element) -> their order, or None where they have
            none; itself None for coordinates that are not kept, so that one would not pay.
    """

    o_idx: Tensor
    i_idx: Tensor
    weights: Tensor | None
    grid: Grid | None
    orders: dict[Any, outer_ways.Order | None] | None


def runs(targets: Sequence[tuple[Source, Role]]) -> Iterator[list[tuple[Source, Role]]]:
    """The targets of one call; whole parameters that stand side by side in a row together."""
    views = [t for t in targets if isinstance(t[0], View)]
    yield from ([t] for t in targets if not isinstance(t[0], View))
    run: list[tuple[Source, Role]] = []
    for view, role in sorted(views, key=lambda t: t[0].slot.offset):
        if run and not _adjoin(run[-1], (view, role)):
            yield run
            run = []
        run.append((view, role))
    if run:
        yield run


def in_one(run: Run, cache: dict) -> bool:
    """Whether `sample` takes the run; if not, `values` are to be folded."""
    view, role = run[0]
    entry_map = view.slot.entry_map
    if entry_map is None or not _whole(view):
        return entry_map is None
    if isinstance(entry_map, SignedSums):
        return _takes_sums(role.op)
    return role.op in _PRODUCTS and _two_sided_of(view, role, cache) is not None


def columns(run: Run) -> slice | Tensor:
    """Where a run's entries stand in a row."""
    (first, _), (last, _) = run[0], run[-1]
    return first.columns if len(run) == 1 else slice(first.columns.start, last.columns.stop)


def alone(run: Run) -> bool:
    """Whether no parameter outside of the run has a part in its entries."""
    first, last = run[0][0].slot.entry_map, run[-1][0].slot.entry_map
    if first is None:
        return True
    return isinstance(first, SignedSums) and not first.shares_first and not last.shares_last


def sample(
    run: Run,
    x: Tensor,
    dy: Tensor,
    backend: str | None,
    cache: dict,
    out: Tensor | None = None,
) -> Tensor:
    """[b, r] entries of a run that is `in_one`; `cache` keeps what is made of its coordinates."""
    view, role = run[0]
    if isinstance(view.slot.entry_map, DenseProjection):
        A, B, swapped = _two_sided_of(view, role, cache)
        x, dy = (dy, x) if swapped else (x, dy)
        wide = torch.promote_types(x.dtype, torch.float32)
        x, dy = (t.to(wide) @ M.to(t.device, wide) for t, M in ((x, B), (dy, A)))
        return ops.factored_outer(x, dy, None, None, out=out)
    found = coordinates(run, dy.dtype, dy.device, cache, weighted=True)
    return _sampled(role, found, x, dy, backend, out)


def values(
    view: View, role: Role, x: Tensor, dy: Tensor, backend: str | None, cache: dict
) -> Tensor:
    """[b, n] values at a view's coordinates, unscaled, to be folded."""
    found = coordinates([(view, role)], dy.dtype, dy.device, cache, weighted=False)
    return _sampled(role, found, x, dy, backend, None)


def _sampled(
    role: Role,
    found: Coordinates,
    x: Tensor,
    dy: Tensor,
    backend: str | None,
    out: Tensor | None,
) -> Tensor:
    options: dict[str, Any] = {"weights": found.weights, "out": out}
    if found.grid is not None and backend in (None, "reference"):
        x, dy = (dy, x) if found.grid.swapped else (x, dy)
        return ops.factored_outer(x, dy, found.grid.rows, found.grid.columns, **options)
    options["backend"] = backend
    sizes = x.shape[-1], dy.shape[-1], x.element_size()
    staged = order(found, role.op, *sizes, dy.device, backend)
    if staged is not None:
        options["order"] = staged
    return role.op(x, dy, found.o_idx, found.i_idx, **options)


def coordinates(
    run: Run, dtype: torch.dtype, device: torch.device, cache: dict, weighted: bool
) -> Coordinates:
    """The (o, i) of a run, with the weights and sums of its entries if they are to be `weighted`.

    Those of whole parameters are kept for the next batch. `dtype` is that of the data.
    """
    key = None
    slots = [view.slot for view, _ in run]
    dtype = torch.promote_types(dtype, torch.float32)
    signed = weighted and slots[0].entry_map is not None
    if all(_whole(view) for view, _ in run):
        key = (
            *((v.slot.name, role.coordinates, role.op in _PRODUCTS) for v, role in run),
            device,
            dtype,
        )
    if key is not None and key in cache:
        return cache[key]
    pairs = [role.coordinates(view.at) for view, role in run]
    o_idx, i_idx = (torch.cat(part).to(torch.int32) for part in zip(*pairs, strict=True))
    grid = weights = None
    if key is not None and len(run) == 1 and not signed:
        grid = _grid(*run[0], o_idx, i_idx, device)
    if signed:
        start = slots[0].offset
        entry = torch.cat([slot.entry_map.entry + (slot.offset - start) for slot in slots])
        factors = torch.cat([slot.scaled(slot.entry_map.sign.to(dtype)) for slot in slots])
        at, weights = by_entry(entry, factors, slots[-1].entries.stop - start)
        o_idx, i_idx = o_idx[at], i_idx[at]
    elif weighted and any(slot.is_scaled for slot in slots):
        ones = ((view, torch.ones_like(view.at, dtype=dtype)) for view, _ in run)
        weights = torch.cat([view.slot.scaled(one, view.which) for view, one in ones])
    found = Coordinates(
        o_idx.to(device),
        i_idx.to(device),
        None if weights is None else weights.to(device),
        grid,
        None if key is None else {},
    )
    if key is not None:
        cache[key] = found
    return found


def _grid(
    view: View, role: Role, o_idx: Tensor, i_idx: Tensor, device: torch.device
) -> Grid | None:
    if role.op not in _PRODUCTS or view.slot.grid is None:
        return None
    rows, columns = view.slot.grid
    O, I = view.slot.shape[0], math.prod(view.slot.shape[1:])
    along = rows.repeat_interleave(len(columns)), columns.repeat(len(rows))
    for swapped in (False, True):
        outer_idx, inner_idx = (i_idx, o_idx) if swapped else (o_idx, i_idx)
        if torch.equal(along[0].int(), outer_idx) and torch.equal(along[1].int(), inner_idx):
            return Grid(
                None if len(rows) == O else rows.to(device),
                None if len(columns) == I else columns.to(device),
                swapped,
            )
    return None


def _two_sided_of(view: View, role: Role, cache: dict) -> tuple[Tensor, Tensor, bool] | None:
    """A [O, a] and B [I, b] of a two-sided projection, and whether its rows are inputs."""
    entry_map = view.slot.entry_map
    if not isinstance(entry_map, DenseProjection) or not isinstance(entry_map.projection, Kron):
        return None
    key = ("two-sided", view.slot.name, role.coordinates)
    if key not in cache:
        A, B = entry_map.projection.A, entry_map.projection.B
        at = view.at // len(B), view.at % len(B)
        found = role.coordinates(view.at)
        swaps = [s for s in (False, True) if torch.equal(at[s], found[0])]
        cache[key] = (A, B, swaps[0]) if swaps and torch.equal(at[not swaps[0]], found[1]) else None
    return cache[key]


def _adjoin(one: tuple[View, Role], other: tuple[View, Role]) -> bool:
    a, b = one[0], other[0]
    if not (_whole(a) and _whole(b) and one[1].op is other[1].op):
        return False
    if not len(a.at) or not len(b.at):
        return False  # of no entries, which may stand anywhere
    overlap = a.slot.entries.stop - b.slot.offset
    if a.slot.entry_map is None and b.slot.entry_map is None:
        return overlap == 0 and a.slot.grid is None and b.slot.grid is None
    both = isinstance(a.slot.entry_map, SignedSums) and isinstance(b.slot.entry_map, SignedSums)
    if not both or overlap not in (0, 1) or not _takes_sums(one[1].op):
        return False
    # Not where another parameter's coordinates stand between them.
    return a.slot.entry_map.first + len(a.at) == b.slot.entry_map.first


def _whole(view: View) -> bool:
    return view.which is None and view.at is view.slot.index


def order(
    coordinates: Coordinates,
    op: Any,
    I: int,
    O: int,
    element_size: int,
    device: torch.device,
    backend: str | None,
) -> outer_ways.Order | None:
    """In which order a CUDA kernel sums the coordinates; made when first asked for, then kept."""
    if not _on_cuda(device) or op not in _PRODUCTS or backend not in (None, "cuda"):
        return None
    if coordinates.orders is None or element_size > 4:  # float64 is for `reference` alone
        return None
    key = (op, I, O, element_size)
    if key not in coordinates.orders:
        coordinates.orders[key] = outer_ways.order_if_faster(
            coordinates.o_idx, coordinates.i_idx, *key[1:], bias=_PRODUCTS[op]
        )
    return coordinates.orders[key]


def _on_cuda(device: torch.device) -> bool:
    return device.type == "cuda" and bank_schedule.AVAILABLE
