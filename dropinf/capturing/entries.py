"""Entries: the rows of one backward pass, as the calls that met parameters fill them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropinf.capturing.owners import Array, varying
from dropinf.capturing.rowmap import RowMap, Rows, groups
from dropinf.capturing.rules import Form, Role
from dropinf.capturing.runs import Run, alone, columns, in_one, runs, sample, values
from dropinf.capturing.sources import Lookup, Source, View, chunk_items
from dropinf.compression import DenseProjection, ParamPlan


class Entries:
    """Rows [num_rows, R] that start empty.

    Attributes:
        rows: the rows.
        map: which of them each position of the batch belongs to.
        touched: names of the parameters that wrote some.
        formed: names of those whose gradients were formed, a few examples at a time.
        backend: of the ops.
        cache: keeps what is made of coordinates between batches.
    """

    def __init__(self, rows: Tensor, map: RowMap, backend: str | None, cache: dict) -> None:
        """Under a plan that has entry maps the rows are zeros already."""
        self.rows, self.map, self.touched, self.formed = rows, map, set(), set()
        self.backend, self.cache = backend, cache

    def restart(self) -> None:
        """Forget all that was written."""
        self.touched.clear()
        self.rows.zero_()

    def sample(
        self,
        form: Form,
        targets: Sequence[tuple[Source, Role]],
        x: Tensor,
        dy: Tensor,
        owners: Array,
    ) -> None:
        """Write what a call in closed form contributes; `owners` are of dy."""
        if form.experts:
            x, dy, owners = x.movedim(-3, -2), dy.movedim(-3, -2), np.moveaxis(owners, -3, -2)
        if form.features is not None:
            parts = self.map.split(x, dy, form.features, owners)
        else:
            parts = iter([(self.map.of_items(len(dy), owners), x, dy)])
        for rows, x_part, dy_part in parts:
            x_part, dy_part = form.prepare(x_part, dy_part)
            for run in runs(targets):
                source, role = run[0]
                if isinstance(source, View):
                    self._sample_views(run, x_part, dy_part, rows)
                    continue
                # Every coordinate of the tensor, a few examples at a time, then pulled back.
                shape = role.tensor.shape
                o_idx, i_idx = role.coordinates(torch.arange(shape.numel()))
                o_idx, i_idx = (t.to(dy.device, torch.int32) for t in (o_idx, i_idx))
                for some in chunk_items(len(x_part), shape.numel()):
                    grads = role.op(x_part[some], dy_part[some], o_idx, i_idx, backend=self.backend)
                    for view, entries in source.pull(grads.unflatten(1, shape), self.cache):
                        self.add(view, entries, _part(rows, some))

    def _sample_views(self, run: Run, x: Tensor, dy: Tensor, rows: Rows) -> None:
        slot = run[0][0].slot
        if not in_one(run, self.cache):
            for view, role in run:
                self._fold_views(view, role, x, dy, rows)
            return
        if not any(len(view.at) for view, _ in run):
            self._begin(slot)
            return
        names = {view.slot.name for view, _ in run}
        at, options = columns(run), (self.backend, self.cache)
        every = isinstance(rows, slice) and rows == slice(None)
        all_new = every and not self.touched & names and alone(run)
        if all_new and isinstance(at, slice) and dy.device == self.rows.device:
            self.touched |= names
            sample(run, x, dy, *options, out=self.rows[:, at])
            return
        found = sample(run, x, dy, *options)
        for view, _ in run:
            self._begin(view.slot)
        self._add(at, found, rows)

    def _fold_views(self, view: View, role: Role, x: Tensor, dy: Tensor, rows: Rows) -> None:
        """The values at all coordinates of a view, a few examples at a time, then folded."""
        self._begin(view.slot)
        for some in chunk_items(len(x), len(view.at)):
            found = values(view, role, x[some], dy[some], self.backend, self.cache)
            self.add(view, found, _part(rows, some))

    def pull(self, source: Source, shape: torch.Size, grads: Tensor, owners: Array) -> None:
        """Write the gradients of an operand that was expanded over what it met.

        Args:
            source: of the operand.
            shape: its shape, filled up with ones to the dimensions of `grads`.
            grads: gradient of the expanded operand.
            owners: of `grads`.
        """
        if isinstance(source, Lookup) and self._pull_lookup(source, shape, grads, owners):
            return
        rows = owners
        if self.map.T is not None:  # whose positions are the first two dimensions
            lead = max(2, 1 + max(varying(owners), default=0))
            rows = self.map.of(owners.reshape(owners.shape[:lead]), grads.shape[:lead])
            rows = rows.reshape(rows.shape + (1,) * (grads.dim() - lead))
        dims = varying(rows)
        repeated = [d for d, size in enumerate(shape) if size == 1 and d not in dims]
        if repeated:
            grads = grads.sum(repeated, keepdim=True)
        rest = [d for d in range(grads.dim()) if d not in dims]
        items = [grads.shape[d] for d in dims]
        # A dimension that the operand has itself: item i takes its gradient there from slice i.
        own = [d for d in dims if shape[d] > 1]
        by_item = grads.permute((*dims, *rest))
        if not dims:
            by_item, items, dims, rest = grads[None], [1], [0], [d + 1 for d in rest]
            shape = torch.Size((1, *shape))
        at = self._rows_at(rows.reshape(-1))
        if isinstance(source, View):
            here = source.on(by_item.device, self.cache)
            self.add(source, _view_entries(here, shape, by_item, dims, own, rest), at)
            return
        base = source.shape
        n = rows.size
        for some in chunk_items(n, base.numel()):
            whole = [
                _item_gradient(i, items, shape, by_item, dims, own)
                for i in range(some.start, some.stop)
            ]
            for view, entries in source.pull(
                torch.stack(whole).reshape(len(whole), *base), self.cache
            ):
                self.add(view, entries, _part(at, some))

    def _rows_at(self, rows: Array) -> Rows:
        if np.array_equal(rows, np.arange(self.map.num_rows)):
            return slice(None)
        return torch.from_numpy(np.array(rows))

    def _pull_lookup(self, source: Lookup, shape: torch.Size, grads: Tensor, owners: Array) -> bool:
        """Whether the looked-up rows are the last dimension of the data, and could be written."""
        last = grads.dim() - 1
        if owners.shape[last] > 1:
            return False
        ids = source.ids.reshape(shape[:-1]).expand(grads.shape[:-1])
        for rows, some_ids, dy in self.map.split(ids, grads, (0, 1), owners):
            found = source.pull_positions(some_ids[..., 0], dy, self.backend, self.cache)
            self.add(*found, rows)
        return True

    def add(self, view: View, values: Tensor, rows: Rows) -> None:
        """Add the unscaled values [n, k] of a view to rows, which may repeat."""
        slot = view.slot
        self._begin(slot)
        if not values.shape[1]:
            return
        values = slot.scaled(values, view.which)
        if slot.entry_map is not None:
            if isinstance(slot.entry_map, DenseProjection):
                self.formed.add(slot.name)
            values = slot.entry_map(values, view.which)
        self._add(view.columns, values, rows)

    def add_gradient(self, slot: ParamPlan, grad: Tensor, b: int) -> None:
        """Add what plain autograd has for the parameter in the pass of row b."""
        for view, entries in View.of(slot).pull(grad[None], self.cache):
            self.add(view, entries, slice(b, b + 1))

    def _begin(self, slot: ParamPlan) -> None:
        if slot.name not in self.touched:
            if slot.entry_map is None:
                self.rows[:, slot.entries] = 0
            self.touched.add(slot.name)

    def _add(self, columns: slice | Tensor, entries: Tensor, rows: Rows) -> None:
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


def _view_entries(
    at: Tensor,
    shape: torch.Size,
    grads: Tensor,
    dims: Sequence[int],
    own: Sequence[int],
    rest: Sequence[int],
) -> Tensor:
    """[n, k] entries at positions `at` of each item, from grads [*items, *rest]."""
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


def _part(rows: Rows, some: slice) -> Rows:
    """The rows of some items that follow each other."""
    if not isinstance(rows, slice):
        return rows[some]
    start = rows.start or 0
    return slice(start + some.start, start + some.stop)
