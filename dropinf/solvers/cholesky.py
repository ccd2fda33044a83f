"""The damped Gauss-Newton matrix of every layer, factorised once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dropinf.plan import Block
from dropinf.solvers.base import Solver
from dropinf.store import RowStore


@dataclass(frozen=True)
class _Layer:
    """One factorised layer; `factor` is of F + λ [r, r], or of G Gᵀ + n λ [n, n] with G kept."""

    block: Block
    λ: float
    factor: Tensor | None  # None: every training row is zero there
    G: Tensor | None = None


class Cholesky(Solver):
    """Exact inverse of each layer's damped Gauss-Newton matrix (arXiv 2509.15651, section 3).

    F_l = G_lᵀ G_l / n for the training rows G_l [n, r_l] of layer l, and
    λ_l = damping · trace(F_l) / r_l. Where n < r_l the n x n form is solved (Woodbury):

        (F + λ)⁻¹ q = (q - Gᵀ (G Gᵀ + n λ)⁻¹ G q) / λ

    Sums and factors are float64. A layer whose training rows are all zero gives zeros: its scores
    are zero under any inverse.

    Args:
        damping: relative to the mean diagonal of F_l, the paper's 0.1 as the default.
    """

    def __init__(self, damping: float = 0.1) -> None:
        if not 0 <= damping < float("inf"):
            raise ValueError(f"Cholesky: damping must be a number from 0, got {damping!r}")
        self.damping = damping

    def _fit(self, store: RowStore, n: int) -> None:
        blocks = store.plan.blocks
        device = next(store.chunks())[1].device
        double = {"dtype": torch.float64, "device": device}
        grams = {b: torch.zeros(b.r, b.r, **double) for b in blocks if b.r <= n}
        parts: dict[Block, list[Tensor]] = {b: [] for b in blocks if b.r > n}
        for start, chunk in store.chunks():
            valid = store.valid[start : start + len(chunk)].to(chunk.device)
            rows = (chunk if valid.all() else chunk[valid]).double()
            for block, gram in grams.items():
                G = rows[:, block.entries]
                gram.addmm_(G.T, G, alpha=1 / n)
            for block, part in parts.items():
                part.append(rows[:, block.entries].clone())
        self._layers = []
        for block in blocks:
            if block in grams:
                gram, G = grams.pop(block), None
                λ = self.damping * float(gram.trace()) / block.r
                shift = λ
            else:
                G = torch.cat(parts.pop(block))
                gram = G @ G.T
                λ = self.damping * float(gram.trace()) / (n * block.r)
                shift = n * λ
            if not gram.any():
                self._layers.append(_Layer(block, λ, None))
                continue
            gram.diagonal().add_(shift)
            factor, info = torch.linalg.cholesky_ex(gram)
            if info or (G is not None and λ == 0):
                raise ValueError(
                    f"Cholesky.fit: layer {block.name!r} (n={n}, r={block.r}) is singular at "
                    f"damping={self.damping}; raise the damping"
                )
            self._layers.append(_Layer(block, λ, factor, G))

    def _solve(self, rows: Tensor) -> Tensor:
        solved = torch.zeros_like(rows)
        for layer in self._layers:
            if layer.factor is None:
                continue
            q = rows[:, layer.block.entries].double()
            if layer.G is None:
                x = torch.cholesky_solve(q.T, layer.factor).T
            else:
                inner = torch.cholesky_solve(layer.G @ q.T, layer.factor)
                x = (q - (layer.G.T @ inner).T) / layer.λ
            solved[:, layer.block.entries] = x.to(rows.dtype)
        return solved
