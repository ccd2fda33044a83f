"""Routes: which examples the rows of a tensor belong to, once an index has picked them.

Data have the example in their first dimension until rows are picked, joined or turned: tokens that
are routed to an expert, the two views of a batch that go through one encoder together. The same
functions, applied to positions, say where each row came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from dropinf.capturing.call_args import argument, tensors_of
from dropinf.capturing.marks import Marks
from dropinf.capturing.rowmap import Route


def _methods(*names: str) -> set[Callable]:
    return {getattr(where, n) for where in (torch, Tensor) for n in names if hasattr(where, n)}


_PICK = _methods(
    "__getitem__", "index_select", "split", "chunk", "narrow", "split_with_sizes", "tensor_split"
)
_REORDER = _methods("flip", "roll")
_JOIN = _methods("cat", "concat", "concatenate")
_STACK = _methods("stack")
_TURN = _methods("transpose", "permute", "movedim", "swapaxes", "swapdims", "t") | {
    Tensor.T.__get__,
    Tensor.mT.__get__,
}
# The rows go back to the places of the first argument's.
_RESTORE = _methods(
    "index_add",
    "index_add_",
    "index_copy",
    "index_copy_",
    "index_put",
    "index_put_",
    "scatter",
    "scatter_",
    "scatter_add",
    "scatter_add_",
    "__setitem__",
    "masked_scatter",
    "masked_scatter_",
)

LOST = Route(torch.empty(0, dtype=torch.int64), ())  # in an order that is not known


class Routes:
    """The routes of one capture's tensors; a tensor without one holds the batch in order."""

    def __init__(self) -> None:
        self._known: Marks[Route] = Marks()

    def of(self, data: list[Tensor]) -> Route | None:
        """The route of data that meet each other; LOST if they came different ways."""
        if not len(self._known):
            return None
        route = next(filter(None, map(self._known.get, data)), None)
        n = 0 if route is None else len(route.positions)
        if n > 1 and any(self._known.get(t) is None and t.dim() and t.shape[0] == n for t in data):
            return LOST  # row i of one with row i of the other: of two examples, perhaps
        return route

    def set(self, y: Tensor, route: Route | None) -> None:
        """The rows of y have come this way."""
        if route is not None and y.dim():
            n = len(route.positions)
            self._known.set(y, route if _num_lead(y, n) is not None else LOST)

    def follow(self, func: Callable, args: tuple, kwargs: dict, data: list[Tensor], y: Any) -> None:
        """Note the routes of a function's results, given those of its tensors that are data."""
        if func in _RESTORE:
            results, routes = (
                list(tensors_of((y,), {})),
                [self._known.get(args[0]) if args else None],
            )
        elif (
            (func in _PICK or func in _REORDER) and args and data[0] is args[0]
        ):  # not a table, indexed by data
            results, routes = list(tensors_of((y,), {})), self.picked(func, args, kwargs)
        elif func in _JOIN or func in _STACK:
            results, routes = [y], [self._joined(func, args, kwargs, data)]
        elif not len(self._known):
            return
        else:
            route = self.of(data)
            results = list(tensors_of((y,), {}))
            if func in _TURN and route is not None:
                route = _turned(func, args, kwargs, data[0], y, route)
            routes = [route] * len(results)
        for result, route in zip(results, routes, strict=False):
            self.set(result, route)

    def picked(self, func: Callable, args: tuple, kwargs: dict) -> Iterable[Route | None]:
        """The routes of what a function takes from dimension 0 of its first argument, in turn."""
        x, dims = args[0], 1
        if not x.dim():
            return []
        route = self._known.get(x)
        if func is Tensor.__getitem__:
            index = args[1]
            entries = list(index) if isinstance(index, tuple) else [index]
            while entries and entries[0] is None:
                entries = entries[1:]
            taken = []
            for entry in entries:
                if not isinstance(entry, (Tensor, list)):
                    break
                taken.append(torch.as_tensor(entry, device=x.device))
            if taken and taken[0].dim():
                dims = sum(max(t.dim(), 1) if t.dtype == torch.bool else 1 for t in taken)
                index = tuple(taken)
            elif entries and isinstance(entries[0], slice) and entries[0] != slice(None):
                index = entries[0]
            else:  # dimension 0 is whole, or one row of it was taken
                whole = not entries or entries[0] is Ellipsis or isinstance(entries[0], slice)
                return [route if whole or route is None else LOST]
            args, kwargs = (x, index), {}
        elif func in _REORDER:
            route = Route(torch.arange(len(x)), (len(x),)) if route is None else route
            if len(route.positions) != len(x):
                return [LOST]
            rows = route.positions.reshape(-1, *(1,) * (x.dim() - 1))
            return [_route(func(rows, *args[1:], **kwargs).flatten(), route.lead)]
        elif func in _methods("index_select", "narrow"):
            if argument(args, kwargs, 1, "dim", 0) % x.dim():
                return [route]
        elif argument(args, kwargs, 2, "dim", 0) % x.dim():
            return repeat(route)
        lead, positions = tuple(x.shape[:dims]), None
        if route is None:
            positions = torch.arange(torch.Size(lead).numel(), device=x.device).reshape(lead)
        elif route is not LOST and dims == 1 and x.shape[0] == len(route.positions):
            lead, positions = route.lead, route.positions
        else:
            return repeat(LOST)
        parts = list(tensors_of((func(positions, *args[1:], **kwargs),), {}))
        return [_route(part.flatten(), lead) for part in parts]

    def _joined(
        self, func: Callable, args: tuple, kwargs: dict, tensors: list[Tensor]
    ) -> Route | None:
        first = tensors[0]
        routes = [self._known.get(t) for t in tensors]
        stacked = func in _STACK
        if not first.dim() or argument(args, kwargs, 1, "dim", 0) % (first.dim() + stacked):
            return self.of(tensors)
        parts, leads = [], set()
        for t, route in zip(tensors, routes, strict=True):
            if not t.shape[0]:
                continue
            if route is None:
                route = Route(torch.arange(len(t), device=t.device), (len(t),))
            parts.append(route.positions)
            leads.add(route.lead)
        if len(leads) != 1 or leads == {()}:
            return LOST if leads else None
        return _route(torch.cat(parts), leads.pop())


def _route(positions: Tensor, lead: tuple[int, ...]) -> Route | None:
    """None if the positions are the batch's, in order, each equally often."""
    n, base = len(positions), torch.Size(lead).numel()
    if base and n and n % base == 0:
        order = torch.arange(n, device=positions.device) // (n // base)
        if torch.equal(positions, order):
            return None
    return Route(positions, lead)


def _turned(
    func: Callable, args: tuple, kwargs: dict, x: Tensor, y: Tensor, route: Route
) -> Route | None:
    lead = _num_lead(x, len(route.positions))
    if route is LOST or lead is None:
        return LOST
    shape = x.shape[:lead] + (1,) * (x.dim() - lead)
    turned = func(route.positions.reshape(shape), *args[1:], **kwargs)
    where = _num_lead(y, len(route.positions))
    if where is None or turned.shape != y.shape[:where] + (1,) * (y.dim() - where):
        return LOST
    return _route(turned.flatten(), route.lead)


def _num_lead(t: Tensor, n: int) -> int | None:
    """How many leading dimensions of t hold n rows; None if none do."""
    size = 1
    for d, s in enumerate(t.shape):
        size *= s
        if size == n:
            return d + 1
        if size > n:
            break
    return None
