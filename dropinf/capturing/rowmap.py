"""RowMap: the rows that the positions of a tensor belong to, and positions put together by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dropinf.capturing.owners import NONE, Array, collapsed, varying

# Elements of the padded copies that items of one row are gathered into.
_MAX_ELEMENTS = 1 << 24

Rows = slice | Tensor


class TokensDiffer(ValueError):
    """Data whose positions are not the tokens that have rows."""


class RowMap:
    """The rows of one backward pass over B examples.

    Attributes:
        num_rows: B, or the tokens or segments of the batch.
        T: tokens of an example that have rows; None if rows are the examples'.
    """

    def __init__(self, B: int, of_token: Tensor | None = None) -> None:
        """`of_token` [B, T] int64 has the row of each token, -1 for none."""
        self.num_rows, self.T = B, None
        self._last: Array | None = None  # owners that are in order, to be known by identity
        if of_token is not None:
            self._of_token = of_token.cpu().numpy()
            self.T = of_token.shape[1]
            self.num_rows = int(self._of_token.max()) + 1 if self._of_token.size else 0

    def split(
        self, x: Tensor, dy: Tensor, features: tuple[int, int], owners: Array
    ) -> Iterator[tuple[Rows, Tensor, Tensor]]:
        """x and dy as [b, T, features] each, with the rows that the b belong to.

        Args:
            x, dy: data of the same leading dimensions and `features` trailing ones of their own.
            owners: of dy.
        """
        num_lead = dy.dim() - features[1]
        if self._in_order(owners):
            if dy.numel():
                B = self.num_rows
                yield (
                    slice(None),
                    *(t.reshape(B, -1, t.shape[num_lead:].numel()) for t in (x, dy)),
                )
            return
        lead = dy.shape[:num_lead]
        rows = self.of(owners.reshape(owners.shape[:num_lead]), lead)
        dims = varying(rows)
        front = tuple(range(len(dims)))
        x, dy = (
            (t.flatten(num_lead) if t.dim() > num_lead else t[..., None]).movedim(dims, front)
            for t in (x, dy)
        )
        n = rows.size
        if not dy.numel():
            return
        x, dy = (t.reshape(n, -1, t.shape[-1]) for t in (x, dy))
        rows = rows.reshape(-1)
        if n == 1 < self.num_rows:
            if rows[0] != NONE:
                yield slice(int(rows[0]), int(rows[0]) + 1), x, dy
            return
        k = n // max(1, self.num_rows)
        if n == k * self.num_rows:
            order = np.arange(n)
            if np.array_equal(rows, order // k):
                yield slice(None), *(t.reshape(n // k, -1, t.shape[-1]) for t in (x, dy))
                return
            if np.array_equal(rows, order % self.num_rows):  # position 0 of every example first
                yield (
                    slice(None),
                    *(
                        t.reshape(k, n // k, -1, t.shape[-1]).transpose(0, 1).flatten(1, 2)
                        for t in (x, dy)
                    ),
                )
                return
        of_position = torch.from_numpy(np.array(rows)).to(x.device).repeat_interleave(x.shape[1])
        x, dy = x.flatten(0, 1), dy.flatten(0, 1)
        for here, at, real in groups(of_position, self.num_rows, x.shape[1] + dy.shape[1]):
            yield here, x[at], dy[at].where(real[..., None], 0)

    def _in_order(self, owners: Array) -> bool:
        """Whether dimension 0 is the examples, each once and in order: almost always."""
        if self.T is not None or owners is self._last:
            return self.T is None
        size = self.num_rows
        first = owners.ndim and owners.size == size == owners.shape[0]
        if first and np.array_equal(owners.reshape(-1), np.arange(size)):
            self._last = owners
        return owners is self._last

    def of_items(self, n: int, owners: Array) -> Rows:
        """Rows of n items along dimension 0, the only one along which owners differ."""
        rows = self.of(owners.reshape(len(owners)), (n,))
        rows = np.broadcast_to(rows, (n,))
        if np.array_equal(rows, np.arange(self.num_rows)):
            return slice(None)
        return torch.from_numpy(rows.copy())

    def of(self, owners: Array, lead: Sequence[int]) -> Array:
        """The row of each position; dimensions are 1 where all of it is one row's."""
        if self.T is None:
            return owners
        fine = owners >= 0
        flat = self._of_token.reshape(-1)
        if not (owners < NONE).any():
            return np.where(fine, flat[np.where(fine, owners, 0)], NONE)
        # Positions of examples: as many as there are tokens, in order.
        full = np.broadcast_to(owners, lead)
        example = np.where(full < NONE, -2 - full, NONE)
        if full.ndim > 1:
            # Where one dimension alone can be the examples, so is what reaches no loss.
            dims = range(full.ndim)
            ones = (collapsed(example, [k for k in dims if k != d]) for d in dims)
            ones = [one for one in ones if one is not None and (one >= 0).all()]
            example = np.broadcast_to(ones[0], full.shape) if len(ones) == 1 else example
        example = example.reshape(-1)
        if example.size == self._of_token.size:
            example = self._filled(example)
        order = np.argsort(example, kind="stable")
        order = order[example[order] >= 0]
        counts = np.bincount(example[order], minlength=len(self._of_token))
        if fine.any() or not np.isin(counts, (0, self.T)).all():
            raise TokensDiffer(
                f"{counts.max()} positions an example, where {self.T} tokens have rows"
            )
        rows = np.full(example.shape, NONE)
        rows[order] = self._of_token[example[order], np.arange(len(order)) % self.T]
        return rows.reshape(full.shape)

    def _filled(self, example: Array) -> Array:
        """The example of each of B T positions, also of those at the ends of a text that reach no
        loss, as the last token of a language model, if all others lie one text after the other."""
        at, B = np.arange(example.size), len(self._of_token)
        by_text, by_position = at // self.T, at % B
        fits, other = (((example == e) | (example < 0)).all() for e in (by_text, by_position))
        ambiguous = other and (by_text != by_position).any()
        known = (example >= 0).reshape(B, self.T)
        runs = np.diff(known.astype(np.int8), axis=1, prepend=0) > 0
        return by_text if fits and not ambiguous and (runs.sum(1) <= 1).all() else example


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
