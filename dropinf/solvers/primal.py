"""Layers in the r x r form: F_l + λ_l itself is factorised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dropinf import ops
from dropinf.compression import LayerPlan
from dropinf.rows import RowStore, put, take, valid_rows
from dropinf.solvers.group import Group, Layer, Setting, largest, lost_pivot


class Primal(Group):
    """`factors` are the packed L_l [Σ r_l²] with L_l L_lᵀ = F_l + λ_l."""

    form = "r x r"

    @staticmethod
    def num_bytes(block: LayerPlan, setting: Setting) -> int:
        return setting.dtype.itemsize * block.r**2

    @classmethod
    def scratch_bytes(cls, blocks: Sequence[LayerPlan], setting: Setting) -> int:
        widest = max(cls.num_bytes(block, setting) for block in blocks)
        if setting.dtype == torch.float64:  # a layer at a time through torch, which copies twice
            return 2 * widest
        # Each thread's kernel packs its layer, with a little padding.
        return int(1.1 * widest) * min(len(blocks), torch.get_num_threads())

    def size(self) -> tuple[int, torch.dtype]:
        return sum(block.r**2 for block in self.blocks), self.setting.dtype

    def fit(self, store: RowStore, dampings: Sequence[float]) -> None:
        numbers, dtype = self.size()
        F = torch.empty(numbers, dtype=dtype)
        self._gram(store, F)
        matrices = ops.unpack(F, self.offsets)
        diagonals = [matrix.diagonal().clone() for matrix in matrices]
        shift = F.new_empty(len(self.blocks))
        for l, (block, diagonal) in enumerate(zip(self.blocks, diagonals, strict=True)):
            mean = float(diagonal.double().mean())
            λ = self.setting.damping.λ(dampings[l], mean)
            zero = λ == 0 and mean == 0
            shift[l] = 1.0 if zero else λ  # a zero layer's factor is never used
            self.layers.append(Layer(block.name, block.r, "zero" if zero else self.form, λ))
        # In place; the few layers that fail are summed again.
        info = ops.damped_cholesky(F, self.offsets, shift, out=F).info.tolist()
        for l, (matrix, diagonal) in enumerate(zip(matrices, diagonals, strict=True)):
            failed = info[l] or lost_pivot(matrix, diagonal + shift[l])
            if self.layers[l].λ == 0 and self.setting.n < len(diagonal) and diagonal.any():
                failed = self.setting.n + 1  # the rank of F_l, whatever rounding made of it
            if failed:
                self.layers[l] = self._retry(store, l, failed, matrix, diagonal)
        self.factors = F

    def _gram(self, store: RowStore, F: Tensor) -> None:
        """Every layer's F_l, packed, into F."""
        parts = valid_rows(store, self.columns, part_bytes=self.setting.part_bytes)
        for i, rows in enumerate(parts):
            ops.gram(rows, self.offsets, scale=1 / self.setting.n, accumulate=i > 0, out=F)
        for block, matrix in zip(self.blocks, ops.unpack(F, self.offsets), strict=True):
            if not matrix.diagonal().isfinite().all():
                raise ValueError(
                    f"{self.setting.op}.fit: the squares of layer {block.name!r} overflow "
                    f"{F.dtype}; scale the loss down, or use dtype=torch.float64"
                )

    def _retry(
        self, store: RowStore, l: int, failed: int, factor: Tensor, diagonal: Tensor
    ) -> Layer:
        """Each try sums F_l and factorises it where its factor belongs: no memory beyond that."""
        alone, packed = Primal([self.blocks[l]], self.setting), factor.view(-1)

        def factorise(λ: float) -> int:
            alone._gram(store, packed)
            info = ops.damped_cholesky(packed, alone.offsets, λ, out=packed).info
            return int(info[0]) or lost_pivot(factor, diagonal + λ)

        mean = float(diagonal.double().mean())
        return self._retried(self.layers[l], failed, factorise, mean)

    def solve(self, store: RowStore | None, rows: Tensor, solved: Tensor) -> None:
        columns = self.columns
        q = take(rows, columns).to(self.setting.dtype)
        put(solved, columns, ops.cholesky_solve(self.read(), self.offsets, q))
        for block, layer in zip(self.blocks, self.layers, strict=True):
            if layer.form == "zero":
                solved[:, block.entries] = 0

    def condition(self) -> list[float]:
        factors = ops.unpack(self.read(), self.offsets)
        return [
            largest(lambda v, L=L: L @ (L.T @ v), len(L), L.dtype)
            * largest(lambda v, L=L: torch.cholesky_solve(v, L), len(L), L.dtype)
            for L in factors
        ]
