"""Entries: the rows of one backward pass, as the calls that met parameters fill them in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropinf import ops, staging
from dropinf.forms import Form, Role, outer
from dropinf.plan import Slot
from dropinf.rowmap import Route, RowMap, groups
from dropinf.sources import Lookup, Source, View, chunk_items

# Ops that take a staged order -> whether a bias is an input of theirs.
_WITH_ORDER = {ops.sampled_outer: False, outer: True}


@dataclass(frozen=True)
class Where:
    """How the data of a call hold the examples.

    Attributes:
        batch_dim: their dimension; None is 0, refused where it is in doubt.
        route: where the rows came from, if they were picked by an index.
    """

    batch_dim: int | None
    route: Route | None


class Coordinates(NamedTuple):
    """The coordinates of a run of views, on the device of its gradients.

    Attributes:
        o_idx, i_idx: [r] int32.
        orders: (op, I, O, bytes of an element) -> their staged order, or None where they have
            none; itself None for coordinates that are not kept, so that one would not pay.
    """

    o_idx: Tensor
    i_idx: Tensor
    orders: dict[Any, staging.StagedOrder | None] | None


class Entries:
    """Rows [num_rows, R] that start empty.

    Attributes:
        rows: the rows.
        map: which of them each position of the batch belongs to.
        touched: names of the parameters that wrote some.
    """

    def __init__(
        self, rows: Tensor, map: RowMap, factor: float, backend: str | None, cache: dict
    ) -> None:
        """`factor` is taken out of every gradient; `cache` keeps `Coordinates` between batches."""
        self.rows, self.map, self.touched = rows, map, set()
        self._factor, self._backend, self._cache = factor, backend, cache

    def sample(
        self,
        form: Form,
        targets: Sequence[tuple[Source, Role]],
        x: Tensor,
        dy: Tensor,
        where: Where,
    ) -> None:
        """Write what a call in closed form contributes."""
        if form.features is not None:
            parts = self.map.split(x, dy, form.features, where.batch_dim, where.route)
        else:
            rows = self.map.of_items(len(x), where.batch_dim, where.route)
            parts = iter([(slice(None) if rows is None else rows, x, dy)])
        for rows, x_part, dy_part in parts:
            x_part, dy_part = form.prepare(x_part, dy_part)
            for run in _runs(targets):
                source, role = run[0]
                if isinstance(source, View):
                    self._sample_views(run, x_part, dy_part, rows)
                    continue
                # Every coordinate of the tensor, a few examples at a time, then pulled back.
                shape = role.tensor.shape
                o_idx, i_idx = role.coordinates(torch.arange(shape.numel()))
                o_idx, i_idx = (t.to(dy.device, torch.int32) for t in (o_idx, i_idx))
                for some in chunk_items(len(x_part), shape.numel()):
                    grads = role.op(
                        x_part[some], dy_part[some], o_idx, i_idx, backend=self._backend, scale=1.0
                    )
                    for view, entries in source.pull(grads.unflatten(1, shape)):
                        self.add(view, entries, _part(rows, some, len(x_part)))

    def _sample_views(
        self, run: list[tuple[View, Role]], x: Tensor, dy: Tensor, rows: slice | Tensor
    ) -> None:
        (first, role), (last, _) = run[0], run[-1]
        names = {view.slot.name for view, _ in run}
        coordinates = self._coordinates(run, dy.device)
        o_idx, i_idx, _ = coordinates
        if not len(o_idx):
            self._begin(first.slot)
            return
        scale = first.slot.scale / self._factor
        columns = first.columns
        if len(run) > 1:
            columns = slice(first.columns.start, last.columns.stop)
        options = {"scale": scale, "backend": self._backend}
        if _on_cuda(dy) and role.op in _WITH_ORDER and self._backend in (None, "cuda"):
            options["order"] = _order(coordinates, role.op, x, dy)
        all_new = isinstance(rows, slice) and not self.touched & names
        if all_new and isinstance(columns, slice) and dy.device == self.rows.device:
            self.touched |= names
            role.op(x, dy, o_idx, i_idx, out=self.rows[:, columns], **options)
            return
        entries = role.op(x, dy, o_idx, i_idx, **options)
        for view, _ in run:
            self._begin(view.slot)
        self._add(columns, entries, rows)

    def _coordinates(self, run: list[tuple[View, Role]], device: torch.device) -> Coordinates:
        """The (o, i) of a run of views; of whole parameters, kept for the next batch."""
        key = None
        if all(view.which is None and view.at is view.slot.index for view, _ in run):
            key = (
                *((view.slot.name, id(role.coordinates.__code__)) for view, role in run),
                device,
            )
        if key not in self._cache or key is None:
            pairs = [role.coordinates(view.at) for view, role in run]
            o_idx, i_idx = (
                torch.cat(part).to(device, torch.int32) for part in zip(*pairs, strict=True)
            )
            if key is None:
                return Coordinates(o_idx, i_idx, None)
            self._cache[key] = Coordinates(o_idx, i_idx, {})
        return self._cache[key]

    def pull(
        self, source: Source, shape: torch.Size, grads: Tensor, dims: Sequence[int], where: Where
    ) -> None:
        """Write the gradients of an operand that was expanded over the batch.

        Args:
            source: of the operand.
            shape: its shape, filled up with ones to the dimensions of `grads`.
            grads: gradient of the expanded operand.
            dims: the dimensions that are items, of which every row has some, the example first.
            where: how the data that it met hold the examples.
        """
        if isinstance(source, Lookup) and self._pull_lookup(source, shape, grads, dims, where):
            return
        rest = [d for d in range(grads.dim()) if d not in dims]
        items = [grads.shape[d] for d in dims]
        # A dimension that the operand has itself: item i takes its gradient there from slice i.
        own = [d for d in dims if shape[d] > 1]
        n = torch.Size(items).numel()
        rows = self.map.of_items(n, where.batch_dim, where.route)
        rows = slice(None) if rows is None else rows
        by_item = grads.permute(*dims, *rest)
        if isinstance(source, View):
            self.add(source, _view_entries(source, shape, by_item, dims, own, rest), rows)
            return
        base = torch.Size(source.output.shape)
        for some in chunk_items(n, base.numel()):
            whole = [
                _item_gradient(i, items, shape, by_item, dims, own)
                for i in range(some.start, some.stop)
            ]
            for view, entries in source.pull(torch.stack(whole).reshape(-1, *base)):
                self.add(view, entries, _part(rows, some, n))

    def _pull_lookup(
        self, source: Lookup, shape: torch.Size, grads: Tensor, dims: Sequence[int], where: Where
    ) -> bool:
        """Whether the looked-up rows are the last dimension of the data, and could be written."""
        if grads.dim() - 1 in dims or max(dims) > 1:
            return False
        ids = source.ids.reshape(shape[:-1]).expand(grads.shape[:-1])
        for rows, some_ids, dy in self.map.split(ids, grads, (0, 1), dims[0], where.route):
            self.add(*source.pull_positions(some_ids[..., 0], dy, self._backend), rows)
        return True

    def add(self, view: View, entries: Tensor, rows: slice | Tensor) -> None:
        """Add the unscaled entries [n, k] of a view to rows, which may repeat."""
        self._begin(view.slot)
        self._add(view.columns, entries * (view.slot.scale / self._factor), rows)

    def _begin(self, slot: Slot) -> None:
        if slot.name not in self.touched:
            self.rows[:, slot.entries] = 0
            self.touched.add(slot.name)

    def _add(self, columns: slice | Tensor, entries: Tensor, rows: slice | Tensor) -> None:
        entries = entries.to(self.rows)
        if isinstance(columns, Tensor):
            columns = columns.to(self.rows.device)
        if isinstance(rows, slice):
            self.rows[rows, columns] += entries
            return
        # Rows that repeat are summed in a fixed order.
        for here, at, real in groups(rows.to(self.rows.device), len(self.rows), entries.shape[1]):
            sums = entries[at].where(real[..., None], 0).sum(1)
            self.rows[here if isinstance(columns, slice) else here[:, None], columns] += sums


def _on_cuda(dy: Tensor) -> bool:
    return dy.device.type == "cuda" and staging.AVAILABLE


def _order(coordinates: Coordinates, op: Any, x: Tensor, dy: Tensor) -> staging.StagedOrder | None:
    """In which order a CUDA kernel sums the coordinates; made when first asked for, then kept."""
    o_idx, i_idx, orders = coordinates
    if orders is None or x.element_size() > 4:  # float64 is for `reference` alone
        return None
    key = (op, x.shape[-1], dy.shape[-1], x.element_size())
    if key not in orders:
        orders[key] = staging.order_if_faster(o_idx, i_idx, *key[1:], bias=_WITH_ORDER[op])
    return orders[key]


def _view_entries(
    view: View,
    shape: torch.Size,
    grads: Tensor,
    dims: Sequence[int],
    own: Sequence[int],
    rest: Sequence[int],
) -> Tensor:
    """[n, k] entries of each item, from grads [*items, *rest]."""
    at = view.at.to(grads.device)
    index = torch.unravel_index(at, shape)
    flat = torch.zeros_like(at)  # position in the dimensions that are no items
    for d in rest:
        flat = flat * shape[d] + index[d]
    grads = grads.flatten(len(dims)) if rest else grads[..., None]
    if not own:
        return grads.flatten(0, len(dims) - 1)[:, flat]
    entries = grads.new_zeros(*grads.shape[:-1], len(at))
    here = []
    for j, d in enumerate(dims):
        if d in own:
            here.append(index[d])
        else:
            step = torch.arange(grads.shape[j], device=at.device)
            here.append(step.reshape(-1, *(1,) * (len(dims) - j)))
    entries[(*here, torch.arange(len(at), device=at.device))] = grads[(*here, flat)]
    return entries.flatten(0, len(dims) - 1)


def _item_gradient(
    i: int,
    items: Sequence[int],
    shape: torch.Size,
    grads: Tensor,
    dims: Sequence[int],
    own: Sequence[int],
) -> Tensor:
    """The gradient [*shape] of item i alone, from grads [*items, *rest]."""
    index = [int(j) for j in torch.unravel_index(torch.tensor(i), tuple(items))]
    mine = grads[tuple(index)]  # [*rest]
    whole = grads.new_zeros(shape)
    at: list[Any] = [slice(None)] * len(shape)
    for d, j in zip(dims, index, strict=True):
        at[d] = j if d in own else 0
    whole[tuple(at)] = mine
    return whole


def _part(rows: slice | Tensor, some: slice, n: int) -> slice | Tensor:
    return some if isinstance(rows, slice) else rows[some]


def _runs(targets: Sequence[tuple[Source, Role]]) -> Iterator[list[tuple[Source, Role]]]:
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


def _adjoin(one: tuple[View, Role], other: tuple[View, Role]) -> bool:
    a, b = one[0], other[0]
    return (
        a.which is None
        and b.which is None
        and a.slot.entries.stop == b.slot.offset
        and a.slot.scale == b.slot.scale
        and one[1].op is other[1].op
    )
