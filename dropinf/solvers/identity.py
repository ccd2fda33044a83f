"""No inverse: scores are plain gradient dot products, or their cosines."""

from __future__ import annotations

import torch
from torch import Tensor

from dropinf.rows import RowStore
from dropinf.solvers.base import Solver


class Identity(Solver):
    """No matrix: score[q, i] = g_q · g_i (TracIn, arXiv 2002.08484, one checkpoint).

    Reads nothing of the store but its plan.

    Args:
        cosine: score[q, i] = g_q · g_i / (|g_q| |g_i|) with the norms of whole rows, 0 where one
            is zero. The long gradients of outliers no longer lead every list (Barshan et al. 2020,
            arXiv 2003.11630, on such outliers; Xia et al. 2024, arXiv 2402.04333, section 3.2).
    """

    def __init__(self, cosine: bool = False) -> None:
        self.cosine = cosine

    def scale(self, rows: Tensor) -> Tensor | None:
        return _inverse_norms(rows) if self.cosine else None

    def _fit(self, store: RowStore, n: int) -> None:
        pass

    def _solve(self, rows: Tensor) -> Tensor:
        return rows * _inverse_norms(rows)[:, None] if self.cosine else rows


def _inverse_norms(rows: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return torch.where(norms > 0, 1 / norms, 0).to(rows.dtype)
