"""One layer in the n x n form, for fewer rows than coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dropinf.compression import LayerPlan
from dropinf.rows import RowStore
from dropinf.solvers.gauss_newton import columns_of
from dropinf.solvers.group import Group, Layer, Setting, largest, lost_pivot
from dropinf.solvers.number_range import check_squares


class Dual(Group):
    """`factors` is that of K + n λ [n, n], K = G Gᵀ of the layer's rows G [n, r] (Woodbury):

        (F + λ)⁻¹ q = (q - Gᵀ (K + n λ)⁻¹ G q) / λ

    float64, because the subtraction cancels. G is read from the store, some columns at a time.
    """

    form = "n x n"

    @staticmethod
    def num_bytes(block: LayerPlan, setting: Setting) -> int:
        return 8 * setting.n**2

    @classmethod
    def scratch_bytes(cls, blocks: Sequence[LayerPlan], setting: Setting) -> int:
        return 2 * 8 * setting.n**2  # K is kept for another try, and torch copies

    def size(self) -> tuple[int, torch.dtype]:
        return self.setting.n**2, torch.float64

    def fit(self, store: RowStore, dampings: Sequence[float]) -> None:
        n, (block,) = self.setting.n, self.blocks
        K = torch.zeros(n, n, dtype=torch.float64, device=self.setting.device)
        for _, G in columns_of(store, block, n, self.setting.part_bytes):
            K.addmm_(G, G.T)
        check_squares(f"{self.setting.op}.fit", block, K.diagonal(), store)
        mean = float(K.trace()) / (n * block.r)
        λ = self.setting.damping.λ(dampings[0], mean)
        zero = λ == 0 and mean == 0
        self.layers = [Layer(block.name, block.r, "zero" if zero else self.form, λ)]
        if zero:
            self.factors = K.view(-1)
            return

        factor = K

        def factorise(λ: float) -> int:
            nonlocal factor
            damped = K.clone()
            damped.diagonal().add_(n * λ)
            factor, info = torch.linalg.cholesky_ex(damped)
            return int(info) or lost_pivot(factor, damped.diagonal())

        # F has rank n < r: without damping it is singular, whatever rounding makes of K.
        failed = n + 1 if λ == 0 else factorise(λ)
        if failed:
            self.layers[0] = self._retried(self.layers[0], failed, factorise, mean)
        self.factors = factor.reshape(-1)

    def solve(
        self,
        store: RowStore | None,
        factors: Tensor,
        rows: Tensor,
        solved: Tensor,
        part_bytes: int,
    ) -> None:
        (layer,), (block,), n = self.layers, self.blocks, self.setting.n
        if layer.form == "zero":
            solved[:, block.entries] = 0
            return
        inner = torch.zeros(n, len(rows), dtype=torch.float64, device=rows.device)
        for columns, G in columns_of(store, block, n, part_bytes):
            inner.addmm_(G, rows[:, columns].double().T)
        inner = torch.cholesky_solve(inner, factors.view(n, n))
        for columns, G in columns_of(store, block, n, part_bytes):
            solved[:, columns] = (rows[:, columns].double() - inner.T @ G) / layer.λ

    def solve_bytes(self, part_bytes: int) -> tuple[int, int]:
        (block,), n = self.blocks, self.setting.n
        width = min(block.r, max(1, part_bytes // (8 * n)))
        # torch copies the factor; two parts of the rows, and what is made of one.
        return 8 * n**2 + 3 * part_bytes, 8 * (3 * n + 4 * width)

    def condition(self) -> list[float]:
        (layer,), n = self.layers, self.setting.n
        if layer.form == "zero":
            return [1.0]
        L = self.read().view(n, n)
        return [largest(lambda v: L @ (L.T @ v), L) / (n * layer.λ)]
