"""Layers in the r x r form: F_l + λ_l itself is factorised."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dropinf import ops
from dropinf.compression import LayerPlan
from dropinf.rows import RowStore, put, take, valid_rows
from dropinf.solvers.group import Group, Layer, Setting, largest, lost_pivot
from dropinf.solvers.number_range import check_squares
from dropinf.user_warning import warn_user

# Rows whose largest entry is beyond these are scaled by a power of two, which is exact, before they
# are squared: float32 ends at 1e-38, with all its digits at 1e-31, and at 3e38.
_LEAST, _MOST = 1e-14, 1e14

_MARGIN = 100.0  # a factor in float32 is to keep about two digits of its smallest pivot


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
        F = self.empty()
        self.factorise(store, F, self.gram(store, F), dampings)

    def factorise(
        self, store: RowStore, F: Tensor, peaks: Sequence[float], dampings: Sequence[float]
    ) -> None:
        """Fill `layers` and `factors`, given what `gram` makes of all rows of the store."""
        dtype = self.setting.dtype
        exponents = [0 if _LEAST <= peak <= _MOST else math.frexp(peak)[1] for peak in peaks]
        matrices = ops.unpack(F, self.offsets)
        for l, exponent in enumerate(exponents):
            if exponent:
                Primal([self.blocks[l]], self.setting).gram(store, matrices[l].view(-1), exponent)
        diagonals = [matrix.diagonal().clone() for matrix in matrices]
        shift = F.new_empty(len(self.blocks))
        for l, (block, diagonal) in enumerate(zip(self.blocks, diagonals, strict=True)):
            squares = scaled(diagonal.double(), 2 * exponents[l])
            check_squares(f"{self.setting.op}.fit", block, squares, store)
            unit, mean = 4.0 ** exponents[l], float(squares.mean())
            λ = self.setting.damping.λ(dampings[l], mean)
            zero = λ == 0 and mean == 0
            shift[l] = 1.0 if zero else λ / unit  # a zero layer's factor is never used
            form = "zero" if zero else self.form
            self.layers.append(Layer(block.name, block.r, form, λ, exponent=exponents[l]))
        # In place; the few layers that fail are summed again.
        info = ops.damped_cholesky(F, self.offsets, shift, out=F).info.tolist()
        for l, (block, matrix, diagonal) in enumerate(
            zip(self.blocks, matrices, diagonals, strict=True)
        ):
            few_digits = lost_pivot(matrix, diagonal + shift[l], _MARGIN)
            failed = info[l] or (few_digits and lost_pivot(matrix, diagonal + shift[l]))
            # Undamped, what rows of float32 have beyond its rounding is no direction of theirs.
            if self.setting.widens and self.layers[l].λ > 0 and (failed or few_digits):
                self.left.append(block)
                continue
            if self.layers[l].λ == 0 and self.setting.n < len(diagonal) and diagonal.any():
                failed = self.setting.n + 1  # the rank of F_l, whatever rounding made of it
            if failed:
                self.layers[l] = self._retry(store, l, failed, matrix, diagonal)
            elif few_digits and dtype == torch.float32:
                warn_user(
                    f"{self.setting.op}.fit: layer {block.name!r} (n={self.setting.n}, "
                    f"r={block.r}): pivot {few_digits} keeps fewer than two digits beyond "
                    f"rounding at lambda={self.layers[l].λ:.3g}; use dtype=torch.float64"
                )
        self.factors = F

    def gram(self, store: RowStore, F: Tensor, exponent: int = 0) -> list[float]:
        """The store's part of every layer's F_l times 4^-exponent, packed, into F; the largest
        entry of each layer's rows."""
        parts = valid_rows(store, self.columns, part_bytes=self.setting.part_bytes)
        peaks = torch.zeros(self.offsets[-1], dtype=torch.float64, device=F.device)
        i = -1
        for i, rows in enumerate(parts):
            peaks = torch.maximum(peaks, rows.abs().amax(0).double())
            rows = scaled(rows, -exponent) if exponent else rows
            ops.gram(rows, self.offsets, scale=1 / self.setting.n, accumulate=i > 0, out=F)
        if i < 0:
            F.zero_()
        sizes = [block.r for block in self.blocks]
        return [float(part.max()) if len(part) else 0.0 for part in peaks.split(sizes)]

    def _retry(
        self, store: RowStore, l: int, failed: int, factor: Tensor, diagonal: Tensor
    ) -> Layer:
        """Each try sums F_l and factorises it where its factor belongs: no memory beyond that."""
        alone, packed = Primal([self.blocks[l]], self.setting), factor.view(-1)
        exponent = self.layers[l].exponent
        unit = 4.0**exponent

        def factorise(λ: float) -> int:
            alone.gram(store, packed, exponent)
            info = ops.damped_cholesky(packed, alone.offsets, λ / unit, out=packed).info
            return int(info[0]) or lost_pivot(factor, diagonal + λ / unit)

        mean = float(diagonal.double().mean()) * unit
        return self._retried(self.layers[l], failed, factorise, mean)

    def solve_bytes(self, part_bytes: int) -> tuple[int, int]:
        # Six float64: taken, scaled, converted, and back.
        return self.scratch_bytes(self.blocks, self.setting), 48 * self.offsets[-1]

    def solve(
        self,
        store: RowStore | None,
        factors: Tensor,
        rows: Tensor,
        solved: Tensor,
        part_bytes: int,
    ) -> None:
        columns, dtype, unit = self.columns, self.setting.dtype, None
        q = take(rows, columns)
        if dtype.itemsize < q.dtype.itemsize:  # and its range, too
            unit = 2.0 ** torch.frexp(q.abs().amax(1, keepdim=True)).exponent.to(q.dtype)
            q = q / unit
        x = ops.cholesky_solve(factors, self.offsets, q.to(dtype))
        put(solved, columns, x if unit is None else x.to(unit.dtype) * unit)
        for block, layer in zip(self.blocks, self.layers, strict=True):
            if layer.form == "zero":
                solved[:, block.entries] = 0
            elif layer.exponent:
                solved[:, block.entries] = scaled(solved[:, block.entries], -2 * layer.exponent)

    def condition(self) -> list[float]:
        factors = ops.unpack(self.read(), self.offsets)
        return [
            largest(lambda v, L=L: L @ (L.T @ v), L)
            * largest(lambda v, L=L: torch.cholesky_solve(v, L), L)
            for L in factors
        ]


def scaled(rows: Tensor, exponent: int) -> Tensor:
    """rows * 2^exponent, where that power itself may be beyond their dtype."""
    if exponent == 0:
        return rows
    quarter = exponent // 4
    for part in (quarter, quarter, quarter, exponent - 3 * quarter):
        rows = rows * 2.0**part
    return rows
