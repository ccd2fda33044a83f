"""The diagonal of the damped F_l alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dropinf.rows import RowStore
from dropinf.solvers.base import Solver
from dropinf.solvers.damping import Damping
from dropinf.solvers.number_range import diagonal_of
from dropinf.solvers.room import Room


class Diagonal(Solver):
    """x = q / (diag(F_l) + λ_l): coordinates are taken to be uncorrelated.

    The diagonal of F_l (of training rows: the empirical Fisher matrix) in place of it, as in
    Kirkpatrick et al. 2017 (arXiv 1612.00796); exact where F_l is diagonal. The mean over i of
    g_i,k² / (diag(F)_k + λ) is at most 1, so no coordinate leads the scores by its size alone.

    One pass over the store at `fit`, none at `solve`; keeps R numbers.

        solver = dropinf.solvers.Diagonal(damping=0.1).fit(store)

    Args:
        damping: λ_l as a share of the mean of diag(F_l), a number or layer name -> number.
        absolute: `damping` is λ_l itself.
        max_bytes: bound of the memory, see `Solver`.

    Raises:
        ValueError: an argument is out of range; or, at `fit`, it is 0 and a coordinate is
            zero in every row. (A layer that is zero as a whole gives zeros.)
    """

    _takes_part = True

    def __init__(
        self,
        damping: float | Mapping[str, float] = 0.1,
        absolute: bool = False,
        max_bytes: int | None = None,
    ) -> None:
        self._damping = Damping("Diagonal", damping, absolute)
        self._bounded(max_bytes)

    def _fit(self, store: RowStore, n: int) -> None:
        diagonal = diagonal_of(self.room("fit"), store, n)
        self._inverse = torch.zeros_like(diagonal)
        blocks = store.plan.blocks
        for block, λ in zip(blocks, self._damping.lambdas(blocks, diagonal), strict=True):
            damped = diagonal[block.entries] + λ
            if not damped.any():
                continue
            if not damped.all():
                raise ValueError(
                    f"Diagonal.fit: layer {block.name!r} has {int((damped == 0).sum())} of "
                    f"{block.r} coordinates that are zero in every row, which damping=0 cannot "
                    "invert; raise the damping"
                )
            self._inverse[block.entries] = 1 / damped
        self._kept_bytes = 8 * len(diagonal)

    def _solve(self, rows: Tensor, solved: Tensor, room: Room) -> None:
        inverse = self._inverse.to(rows.device)
        # Some columns at a time, since in float64 they are larger than the result.
        step = max(1, min(1 << 20, room.count(16)) // len(rows))
        for start in range(0, len(inverse), step):
            at = slice(start, start + step)
            solved[:, at] = rows[:, at].double() * inverse[at]
