"""Work on the rows of one store that all ranks do together: what each does, and what they exchange.

What is small goes through the key-value store of `World`, which all ranks wait at, looking whether
the others are alive. Tensors follow once all are there, by a gloo group of their own, so that it
does not matter which backend the ranks have.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from dropinf.rows.store import RowStore
from dropinf.rows.stretches import stretch_of
from dropinf.rows.watching import signs_of_life
from dropinf.world import RankError, World

_PIECE_BYTES = 1 << 24  # sent at a time
_OFF = 0.01  # of a row's length: what other devices' rounding stays far below

_ranks: Together | None = None


@contextlib.contextmanager
def over_ranks(timeout: float = 600.0) -> Iterator[None]:
    """Inside of this, all ranks of torch.distributed share the work of `fit` and of scores.

    All ranks enter it, and make the same calls inside with the same store, queries and solver, of
    which each call makes sure. Each rank reads its share of the store's rows; every rank gets the
    whole result, the same bits on each. `fit` of `Cholesky`, `Full`, `Eigen`, `Diagonal` and
    `Identity`, `scores`, `topk` and `self_influence` take part, with all that is made of them;
    other solvers refuse to be fitted. A rank that fails or is gone ends the others. Where
    torch.distributed is not initialised, it does nothing.

        with dropinf.over_ranks():
            solver = dropinf.solvers.Cholesky().fit(store)
            values, indices = dropinf.topk(asked, store, solver)

    Args:
        timeout: seconds without a sign of life (a call, or a chunk of rows in it) until another
            rank counts as lost.

    Raises:
        RuntimeError: it is inside of another one; or another rank is gone, failed, or makes other
            calls.
        ValueError: timeout is not a positive number.
    """
    global _ranks
    if _ranks is not None:
        raise RuntimeError("over_ranks: this is inside of another one; leave out the inner one")
    with Together(timeout) as ranks, signs_of_life(ranks.beat):
        _ranks = ranks
        try:
            yield
            ranks.meet("the end of its block")
        finally:
            _ranks = None
        ranks.leave()


def ranks_together() -> Together | None:
    """Those of `over_ranks`; None outside of it, and for one process alone."""
    return None if _ranks is None or _ranks.size == 1 else _ranks


class Together(World):
    """The ranks in one `over_ranks`."""

    def __init__(self, timeout: float) -> None:
        super().__init__("over_ranks", timeout)
        if self.size > 1:
            seconds = timedelta(seconds=timeout)
            self._group = distributed.new_group(backend="gloo", timeout=seconds)

    def agree(self, call: str, about: dict[str, Any]) -> None:
        """Meet for a call, and make sure that all ranks make it with the same.

        Raises:
            ValueError: one does not.
            RankError: one makes another call, or is gone.
        """
        for rank, theirs in enumerate(found := self.meet(call, about)):
            for what in {**theirs, **found[0]}:
                if not _alike(theirs.get(what), found[0].get(what)):
                    raise ValueError(
                        f"{call}: rank {rank} has other {what} than rank 0; inside of over_ranks() "
                        "all ranks give the same store, queries and solver"
                    )

    def share_of(self, store: RowStore) -> RowStore:
        """This rank's rows of a store."""
        bounds = self.bounds_of(len(store))
        return stretch_of(store, bounds[self.rank], bounds[self.rank + 1])

    def bounds_of(self, n: int) -> list[int]:
        """Where each rank's share of n things begins, and their end."""
        return [-(-n * rank // self.size) for rank in range(self.size + 1)]

    def joined(self, part: Tensor) -> Tensor:
        """[..., n_r] of each rank, beside each other in their order: [..., n] on all."""
        widths = self.meet("widths", part.shape[-1])
        found = part.new_empty(*part.shape[:-1], sum(widths))
        if not found.numel():
            return found
        for rank, to in enumerate(found.view(-1, sum(widths)).split(widths, 1)):
            own = part.reshape(to.shape) if rank == self.rank else to
            step = max(1, _PIECE_BYTES // max(1, widths[rank] * part.element_size()))
            for mine, theirs in zip(own.split(step), to.split(step), strict=True):
                theirs.copy_(self._sent(mine, rank))
        return found

    def spread(self, numbers: Tensor, bounds: Sequence[int]) -> None:
        """Of flat `numbers`, rank r has those from bounds[r] to bounds[r + 1]; give them to all."""
        for rank in range(self.size):
            self.give(numbers[bounds[rank] : bounds[rank + 1]], rank)

    def give(self, numbers: Tensor, rank: int) -> None:
        """Put a rank's flat `numbers` into those of all others."""
        self.meet("numbers")
        for piece in numbers.split(_PIECE_BYTES // numbers.element_size()):
            piece.copy_(self._sent(piece, rank))

    def add(self, numbers: Tensor, bounds: Sequence[int]) -> None:
        """Put the sum of all ranks' `numbers`, added in their order, where it belongs.

        That is, from bounds[r] to bounds[r + 1] on rank r; all others are as they were.
        """
        self.meet("sums")
        step = max(1, _PIECE_BYTES // (self.size * numbers.element_size()))
        for owner in range(self.size):
            for piece in numbers[bounds[owner] : bounds[owner + 1]].split(step):
                if not len(piece):
                    continue
                mine = piece.cpu()
                found = [torch.empty_like(mine) for _ in range(self.size)]
                with self._sending():
                    distributed.gather(
                        mine, found if owner == self.rank else None, owner, self._group
                    )
                if owner == self.rank:
                    for other in found[1:]:
                        found[0] += other
                    piece.copy_(found[0])

    def leave(self) -> None:
        super().leave()
        if self.size > 1:
            distributed.destroy_process_group(self._group)

    def _sent(self, numbers: Tensor, rank: int) -> Tensor:
        """Those of a rank, on the CPU."""
        if not numbers.numel():
            return numbers
        mine = numbers.cpu().contiguous()
        with self._sending():
            distributed.broadcast(mine, rank, self._group)
        return mine

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        """What an error of the group means: all that are left wait here for who is gone."""
        self.beat()
        try:
            yield
        except RuntimeError as error:
            self.meet("an exchange that failed")
            raise RankError(f"{self.op}: the ranks do not reach each other: {error}") from None


def _alike(value: Any, other: Any) -> bool:
    if isinstance(value, list) and isinstance(other, list):
        pairs = zip(value, other, strict=False)
        return len(value) == len(other) and all(math.isclose(a, b, rel_tol=_OFF) for a, b in pairs)
    return value == other
