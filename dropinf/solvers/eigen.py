"""The eigenpairs of every layer's Gauss-Newton matrix: one decomposition, every damping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from dropinf import ops
from dropinf.plan import Block
from dropinf.solvers.base import Solver
from dropinf.solvers.damping import Damping
from dropinf.store import RowStore
from dropinf.streaming import valid_rows

_ZERO = 1e-12  # eigenvalues below this share of a layer's largest are rounding


class _Spectrum(NamedTuple):
    """F_l = Σ_k values[k] v_k v_kᵀ with the rows v_k of `vectors`."""

    block: Block
    values: Tensor  # [k] float64, rising
    vectors: Tensor  # [k, r]
    mean: float  # trace(F_l) / r, of all eigenvalues


class Eigen(Solver):
    """Inverse from eigenpairs F_l = V diag(s) Vᵀ, exact or of the k largest.

        x = V (Vᵀ q / (s + λ_l)) + (q - V Vᵀ q) / λ_l

    The second term is there where pairs are missing, F counting as 0 on their span: because n < r_l
    (which is exact), or by `rank` (Schioppa et al. 2022, arXiv 2112.03052, truncate so). λ_l is
    of the whole trace of F_l in any case. Where n < r_l, the pairs are those of G Gᵀ / n [n, n]:
    v = Gᵀ u / √(n s).

    Sums and pairs are float64. One pass over the store for all layers with r_l <= n, and one over
    its columns for each other layer. Memory: Σ min(n, r_l, rank) r_l to keep; while fitting Σ r_l²
    of the layers with r_l <= n, of the others n r_l of one at a time.

    Args:
        damping: λ_l as a share of the mean of diag(F_l), a number or layer name -> number.
        absolute: `damping` is λ_l itself, here and in `solve_at`.
        rank: pairs a layer keeps, those of the largest eigenvalues; None keeps all.

    Raises:
        ValueError: an argument is out of range; or, at `fit` and `solve_at`, λ_l = 0 where pairs
            are missing or an eigenvalue is zero. (A layer that is zero as a whole gives zeros.)
    """

    def __init__(
        self,
        damping: float | Mapping[str, float] = 0.1,
        absolute: bool = False,
        rank: int | None = None,
    ) -> None:
        self._damping = Damping("Eigen", damping, absolute)
        if rank is not None and rank < 1:
            raise ValueError(f"Eigen: rank must be from 1, got {rank!r}")
        self.rank = rank

    def solve_at(self, rows: Tensor, damping: float | Mapping[str, float]) -> Tensor:
        """`solve` with another damping, from the same eigenpairs."""
        chosen = Damping("Eigen.solve_at", damping, self._damping.absolute)
        return self._checked("solve_at", rows, lambda q: self._solve_with(q, chosen))

    def _fit(self, store: RowStore, n: int) -> None:
        self._spectra = []
        for narrow, run in groupby(store.plan.blocks, lambda block: block.r <= n):
            blocks = list(run)
            pairs = self._of_grams(store, n, blocks) if narrow else self._of_rows(store, n, blocks)
            self._spectra.extend(pairs)
        self._lambdas("fit", self._damping)

    def _of_grams(self, store: RowStore, n: int, blocks: list[Block]) -> Iterable[_Spectrum]:
        """Of neighbouring layers, from F_l [r, r]."""
        first, last = blocks[0].entries.start, blocks[-1].entries.stop
        offsets = [block.entries.start - first for block in blocks] + [last - first]
        grams = torch.zeros(sum(block.r**2 for block in blocks), dtype=torch.float64)
        for rows in valid_rows(store, slice(first, last)):
            ops.gram(rows, offsets, scale=1 / n, accumulate=True, out=grams)
        for block, F in zip(blocks, ops.unpack(grams, offsets), strict=True):
            values, vectors = torch.linalg.eigh(F)
            kept = slice(-min(self.rank or block.r, block.r), None)
            mean = float(F.trace()) / block.r
            yield _Spectrum(block, values[kept].clamp(min=0), vectors.T[kept].contiguous(), mean)

    def _of_rows(self, store: RowStore, n: int, blocks: list[Block]) -> Iterable[_Spectrum]:
        """Of layers that are wider than the store is long, from G Gᵀ / n [n, n]."""
        for block in blocks:
            parts = list(valid_rows(store, block.entries, torch.float64))
            G = torch.cat(parts) if len(parts) > 1 else parts[0]
            K = G @ G.T / n
            values, u = torch.linalg.eigh(K)
            kept = max(n - (self.rank or n), int((values <= _ZERO * values[-1]).sum()))
            values = values[kept:]
            vectors = (u[:, kept:] / (n * values).sqrt()).T @ G
            yield _Spectrum(block, values, vectors, float(K.trace()) / block.r)

    def _solve(self, rows: Tensor) -> Tensor:
        return self._solve_with(rows, self._damping)

    def _solve_with(self, rows: Tensor, damping: Damping) -> Tensor:
        solved = torch.zeros_like(rows)
        λs = self._lambdas("solve_at", damping)
        for (block, values, vectors, mean), λ in zip(self._spectra, λs, strict=True):
            if λ == 0 and mean == 0:
                continue
            q = rows[:, block.entries].double()
            along = q @ vectors.T
            x = along / (values + λ) @ vectors
            if len(values) < block.r:
                x += (q - along @ vectors) / λ
            solved[:, block.entries] = x
        return solved

    def _lambdas(self, call: str, damping: Damping) -> list[float]:
        """λ_l of each layer, none of which it leaves singular."""
        numbers = damping.of([spectrum.block for spectrum in self._spectra])
        λs = []
        for (block, values, _, mean), number in zip(self._spectra, numbers, strict=True):
            λ = damping.λ(number, mean)
            zero = len(values) < block.r or float(values[0]) <= _ZERO * float(values[-1])
            if λ == 0 and mean > 0 and zero:
                raise ValueError(
                    f"Eigen.{call}: layer {block.name!r} (r={block.r}, {len(values)} eigenpairs) "
                    "is singular at damping=0; raise the damping"
                )
            λs.append(λ)
        return λs
