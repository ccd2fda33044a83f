"""No inverse: scores are plain gradient dot products, or their cosines."""

from __future__ import annotations

import torch
from torch import Tensor

from dropinf.rows import RowStore
from dropinf.solvers.base import Solver
from dropinf.solvers.room import Room


class Identity(Solver):
    """No matrix: score[q, i] = g_q · g_i (TracIn, arXiv 2002.08484, one checkpoint).

    Reads nothing of the store but its plan.

        solver = dropinf.solvers.Identity(cosine=True).fit(store)

    Args:
        cosine: score[q, i] = g_q · g_i / (|g_q| |g_i|) with the norms of whole rows, 0 where one
            is zero. The long gradients of outliers no longer lead every list (Barshan et al. 2020,
            arXiv 2003.11630, on such outliers; Xia et al. 2024, arXiv 2402.04333, section 3.2).
        max_bytes: bound of the memory, see `Solver`.
    """

    _takes_part = True

    def __init__(self, cosine: bool = False, max_bytes: int | None = None) -> None:
        self.cosine = cosine
        self._bounded(max_bytes)

    def scale(self, rows: Tensor) -> Tensor | None:
        return _inverse_norms(rows) if self.cosine else None

    def _fit(self, store: RowStore, n: int) -> None:
        pass

    def _solve(self, rows: Tensor, solved: Tensor, room: Room) -> None:
        if self.cosine:
            torch.mul(rows, _inverse_norms(rows)[:, None], out=solved)
        else:
            solved.copy_(rows)


def _inverse_norms(rows: Tensor) -> Tensor:
    few = rows.split(max(1, (1 << 17) // max(1, rows.shape[1])))  # their float64 copies are small
    norms = torch.cat([torch.linalg.vector_norm(r, dim=1, dtype=torch.float64) for r in few])
    return torch.where(norms > 0, 1 / norms, 0).to(rows.dtype)
