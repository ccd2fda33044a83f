"""The eigenvalues and eigenvectors of every layer's F_l: any damping, any rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dropinf import ops
from dropinf.compression import LayerPlan
from dropinf.rows import RowStore, mark_invalid, products, solved_for, valid_rows
from dropinf.solvers.base import Solver
from dropinf.solvers.damping import Damping
from dropinf.solvers.number_range import check_squares
from dropinf.user_warning import warn_user

_ROUNDING = 8 * torch.finfo(torch.float64).eps


class _Pairs(NamedTuple):
    """F_l = V diag(s) Vᵀ of one layer, as far as it is kept."""

    block: LayerPlan
    s: Tensor  # [k] float64, rising
    V: Tensor  # [r, k] float64
    mean_diagonal: float  # of F_l, all of it


class Eigen(Solver):
    """F_l = V diag(s) Vᵀ: solves for any damping, with all eigenpairs or the largest ones.

        (F + λ)⁻¹ q = V (Vᵀ q / (s + λ)) + (q - V Vᵀ q) / λ

    The second part is what F_l has no kept eigenvector for: its rank is at most n, and `rank` keeps
    the k largest pairs (arXiv 2112.03052, section 3, truncates so; there the rest is dropped, here
    F counts as zero on it). A decomposition costs about twenty Cholesky factorisations, whatever
    the number of dampings; where n < r it is that of G Gᵀ / n [n, n]. float64.

    Args:
        damping, absolute: as in `Cholesky`.
        rank: eigenpairs to keep of each layer; None is all.
    """

    def __init__(
        self,
        damping: float | Mapping[str, float] = 0.1,
        absolute: bool = False,
        rank: int | None = None,
    ) -> None:
        self._damping = Damping(type(self).__name__, damping, absolute)
        if rank is not None and rank < 1:
            raise ValueError(f"{type(self).__name__}: rank must be from 1, got {rank!r}")
        self.damping, self.absolute, self.rank = damping, absolute, rank

    def _fit(self, store: RowStore, n: int) -> None:
        blocks = self._blocks(store.plan)
        self._damping.of(blocks)  # before hours of work
        self._pairs = [self._decompose(store, n, block) for block in blocks]
        self._warn_of_rounding("fit", self._damping)

    def _decompose(self, store: RowStore, n: int, block: LayerPlan) -> _Pairs:
        op, columns = f"{type(self).__name__}.fit", [block.entries]
        if n < block.r:
            G = next(valid_rows(store, columns, torch.float64, 8 * n * block.r))  # [n, r]
            K = G @ G.T / n
            check_squares(op, block, K.diagonal(), store)
            mean = float(K.trace()) / block.r
            s, U = torch.linalg.eigh(K)
            kept = self._kept(s)
            s, V = s[kept], G.T @ (U[:, kept] / (n * s[kept]).sqrt())
            if len(s) and s[0] < 1e-3 * s[-1]:
                # The shorter G.T u is, the more rounding has left in it of the longer ones.
                V = torch.linalg.qr(V.flip(1)).Q.flip(1)
        else:
            F = torch.zeros(block.r**2, dtype=torch.float64)
            for rows in valid_rows(store, columns):
                ops.gram(rows, (0, block.r), scale=1 / n, accumulate=True, out=F)
            matrix = F.view(block.r, block.r)
            check_squares(op, block, matrix.diagonal(), store)
            mean = float(matrix.diagonal().mean())
            s, V = torch.linalg.eigh(matrix)  # reads the lower triangle
            kept = self._kept(s)
            s, V = s[kept], V[:, kept]
        return _Pairs(block, s, V, mean)

    def _kept(self, s: Tensor) -> slice:
        """The largest ones that are not rounding of zero; s is rising."""
        positive = int((s > _ROUNDING * len(s) ** 0.5 * s[-1].clamp(min=0)).sum())
        k = positive if self.rank is None else min(positive, self.rank)
        return slice(len(s) - k, len(s))

    def _solve(self, rows: Tensor) -> Tensor:
        return self._solve_with(rows, self._damping)

    def solve_at(self, rows: Tensor, damping: float | Mapping[str, float]) -> Tensor:
        """`solve` with another damping, from the same decomposition.

        Raises:
            ValueError: a layer is singular at that damping.
        """
        wanted = Damping(f"{type(self).__name__}.solve_at", damping, self.absolute)

        def solve(q: Tensor) -> Tensor:
            self._warn_of_rounding("solve_at", wanted)
            return self._solve_with(q, wanted)

        return self._checked("solve_at", rows, solve)

    def _solve_with(self, rows: Tensor, damping: Damping) -> Tensor:
        solved = torch.empty_like(rows)
        λs = self._lambdas("solve_at", damping)
        for (block, s, V, _), λ in zip(self._pairs, λs, strict=True):
            q = rows[:, block.entries].double()
            inside = q @ V
            x = inside / (s + λ) @ V.T
            if len(s) < block.r and λ > 0:
                x += (q - inside @ V.T) / λ
            solved[:, block.entries] = x
        return solved

    def _lambdas(self, call: str, damping: Damping) -> list[float]:
        """λ_l of each layer, none of which it leaves singular."""
        numbers = damping.of([pairs.block for pairs in self._pairs])
        λs = []
        for (block, s, _, mean), number in zip(self._pairs, numbers, strict=True):
            λ = damping.λ(number, mean)
            if λ == 0 and mean > 0 and len(s) < block.r:
                raise ValueError(
                    f"{type(self).__name__}.{call}: layer {block.name!r} (r={block.r}, {len(s)} "
                    "eigenpairs) is singular at damping=0; raise the damping"
                )
            λs.append(λ)
        return λs

    def _warn_of_rounding(self, call: str, damping: Damping) -> None:
        for (block, s, *_), λ in zip(self._pairs, self._lambdas(call, damping), strict=True):
            rounding = _ROUNDING * block.r**0.5 * float(s[-1]) if len(s) else 0.0
            if 0 < λ < 100 * rounding and len(s) < block.r:
                warn_user(
                    f"{type(self).__name__}.{call}: layer {block.name!r} has lambda={λ:.3g}, and "
                    f"eigenvalues below {rounding:.3g} count as zero: its solutions keep few "
                    "digits; raise the damping"
                )

    def sweep(
        self,
        dampings: Sequence[float],
        queries: RowStore,
        store: RowStore | None = None,
        weights: str = "same",
    ) -> Tensor:
        """Scores at k dampings, from one decomposition and one pass over the store.

        Args:
            dampings: k of them, each as in `Cholesky`.
            queries: m rows under the plan of the fit.
            store: n training rows to score; None is the store of the fit.
            weights: as in `dropinf.scores`.

        Returns:
            [k, m, n], each as `dropinf.scores` makes it.

        Raises:
            ValueError: rows under another plan, or a layer is singular at one of the dampings.
        """
        store = self.store if store is None else store
        op = f"{type(self).__name__}.sweep"
        self.check_plans(op, queries, store, weights)
        solved = [
            solved_for(queries.rows, store, partial(self.solve_at, damping=damping))
            for damping in dampings
        ]
        found = products(torch.cat(solved), store).view(len(solved), len(queries), len(store))
        found = found.to(queries.rows.dtype)
        valid = queries.valid[:, None], store.valid
        self.check_scores(op, found, valid, lambda k, q, i: (solved[k][q], store.at([i])[0]))
        return mark_invalid(found, queries, store)
