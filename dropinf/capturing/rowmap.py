"""RowMap: which row each position of a batch belongs to.

Usually that is the example's row. Positions of packed sequences have a row for each segment, with
per="token" every position has one of its own, and tokens that were routed to an expert are out of
order, so that their examples are looked up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of the padded copies that items of one row are gathered into.
_MAX_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Route:
    """Where the rows of an indexed tensor came from: positions of a tensor of the batch.

    Attributes:
        positions: [n] int64, of the flattened leading dimensions `lead`.
        lead: the leading dimensions that were indexed.
    """

    positions: Tensor
    lead: tuple[int, ...]


class MixedExamples(ValueError):
    """Data whose leading dimensions do not keep the examples apart."""


class TokensDiffer(ValueError):
    """Data whose positions are not the tokens that have rows."""


class RowMap:
    """The rows of one backward pass over B examples.

    Attributes:
        B: examples in the batch.
        num_rows: B, or the tokens or segments of the batch.
        of_token: [B, T] int64 row of each position, -1 for none; None if a row is an example.
    """

    def __init__(self, B: int, of_token: Tensor | None = None) -> None:
        self.B, self.of_token = B, of_token
        self.num_rows = B
        self.each_token = False  # rows are the tokens, in order
        if of_token is not None:
            self.num_rows = int(of_token.max()) + 1 if of_token.numel() else 0
            order = torch.arange(of_token.numel(), device=of_token.device)
            self.each_token = torch.equal(of_token.flatten(), order)

    def split(
        self,
        x: Tensor,
        dy: Tensor,
        features: tuple[int, int],
        batch_dim: int | None,
        route: Route | None,
    ) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
        """x and dy as [b, T, features] each, with the rows that the b belong to.

        Args:
            x, dy: data of the same leading dimensions and `features` trailing ones of their own.
            batch_dim: which leading dimension is the example; None is 0, unless that is in doubt.
            route: where the positions came from, if they were picked by an index.
        """
        if route is None:
            x, dy = (
                self._examples_first(t, t.dim() - f, batch_dim)
                for t, f in zip((x, dy), features, strict=True)
            )
            if self.of_token is None:
                yield slice(None), x, dy
                return
            self._check_tokens(x.shape[1])
            if self.each_token:
                yield slice(None), x.flatten(0, 1)[:, None], dy.flatten(0, 1)[:, None]
                return
            x, dy, rows = x.flatten(0, 1), dy.flatten(0, 1), self.of_token.flatten()
        else:
            rows = self._routed(route, batch_dim)
            n = x.shape[: x.dim() - features[0]].numel()
            rows = rows.repeat_interleave(n // max(1, len(rows)))  # positions within picked ones
            x, dy = x.reshape(n, -1), dy.reshape(n, -1)
        num_elements = x.shape[1] + dy.shape[1]
        for here, at, real in groups(rows.to(x.device), self.num_rows, num_elements):
            yield here, x[at], dy[at].where(real[..., None], 0)

    def of_items(self, n: int, batch_dim: int | None, route: Route | None) -> Tensor | None:
        """[n] rows of n items along the batch dimension; None if they are the rows in order."""
        if route is not None:
            return self._routed(route, batch_dim)
        if self.of_token is None and n == self.B:
            return None
        if n % self.B:
            raise MixedExamples(f"{n} items for {self.B} examples")
        if self.of_token is not None:
            self._check_tokens(n // self.B)
            return None if self.each_token else self.of_token.flatten()
        return torch.arange(n) // (n // self.B)

    def _check_tokens(self, T: int) -> None:
        wanted = self.of_token.shape[1]
        if wanted != T:
            raise TokensDiffer(f"{T} positions an example, where {wanted} tokens have rows")

    def _examples_first(self, x: Tensor, num_lead: int, batch_dim: int | None) -> Tensor:
        """[B, T, features] of data with `num_lead` leading dimensions."""
        B, lead = self.B, x.shape[:num_lead]
        width = x.shape[num_lead:].numel()
        if B == 1:
            return x.reshape(1, lead.numel(), width)
        if batch_dim == 1 and num_lead and tuple(lead) != (B,):
            if num_lead == 1 and lead[0] % B == 0:  # [T * B], position 0 of every example first
                x, num_lead = x.unflatten(0, (-1, B)), 2
            if num_lead == 1 or x.shape[1] % B:
                raise _mixed(x, B)
            return x.movedim(1, 0).reshape(B, lead.numel() // B, width)
        doubtful = batch_dim is None and num_lead > 1 and lead[0] != B and lead[1] == B
        if not num_lead or lead[0] % B or doubtful:
            raise _mixed(x, B)
        return x.reshape(B, lead.numel() // B, width)

    def _routed(self, route: Route, batch_dim: int | None) -> Tensor:
        index = torch.arange(math.prod(route.lead), device=route.positions.device)
        order = self._examples_first(index.reshape(route.lead), len(route.lead), batch_dim)
        order = order.reshape(self.B, -1)  # [B, T] position of each example's tokens
        if self.of_token is not None:
            self._check_tokens(order.shape[1])
            rows = self.of_token.to(order.device)
        else:
            rows = torch.arange(self.B, device=order.device)[:, None].expand_as(order)
        of_position = torch.empty_like(index)
        of_position[order.flatten()] = rows.flatten()
        return of_position[route.positions]


def _mixed(x: Tensor, B: int) -> MixedExamples:
    return MixedExamples(f"data of shape {tuple(x.shape)} in a batch of {B}")


def groups(
    rows: Tensor, num_rows: int, num_elements: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Which of n items belong together, a bounded number of padded items at a time.

    Args:
        rows: [n] row of each item, -1 for none.
        num_rows: how many rows there are.
        num_elements: of an item.

    Yields:
        distinct rows [b]; at [b, longest], their items in order, the row's first one again where it
        has fewer; and real [b, longest], which are not such padding.
    """
    order = torch.argsort(rows, stable=True)
    order = order[int((rows < 0).sum()) :]
    counts = torch.bincount(rows[order], minlength=num_rows)
    first = counts.cumsum(0) - counts
    wide = torch.argsort(counts, descending=True, stable=True)
    wide = wide[: int((counts > 0).sum())]  # rows of similar length together
    while len(wide):
        longest = int(counts[wide[0]])
        b = max(1, _MAX_ELEMENTS // max(1, longest * num_elements))
        here, wide = wide[:b], wide[b:]
        step = torch.arange(longest, device=rows.device)
        real = step < counts[here, None]
        yield here, order[first[here, None] + step.where(real, 0)], real
