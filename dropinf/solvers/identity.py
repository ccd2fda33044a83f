"""No inverse: scores are plain gradient dot products."""

from __future__ import annotations

from torch import Tensor

from dropinf.solvers.base import Solver
from dropinf.store import RowStore


class Identity(Solver):
    """No matrix: score[q, i] = g_q · g_i (TracIn, arXiv 2002.08484, one checkpoint)."""

    def _fit(self, store: RowStore, n: int) -> None:
        pass

    def _solve(self, rows: Tensor) -> Tensor:
        return rows
