"""DataInf: the mean of inverses in place of the inverse of the mean."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dropinf.rows import RowStore
from dropinf.solvers.by_passes import ByPasses
from dropinf.solvers.damping import Damping
from dropinf.solvers.gauss_newton import parts
from dropinf.solvers.number_range import diagonal_of
from dropinf.solvers.room import span, within


class DataInf(ByPasses):
    """x = (1/n) Σ_i (g_i g_iᵀ + λ_l)⁻¹ q, each inverse by Sherman-Morrison.

        x = (1 / (n λ)) Σ_i (q - g_i (g_i · q) / (λ + |g_i|²))

    Kwon et al. 2024 (arXiv 2310.00902), equation 5. It is not (F_l + λ_l)⁻¹ q: the error that the
    exchange makes grows with r_l (their theorem 1), and vanishes as the damping grows.

    One pass over the store at `fit`, for λ_l, and one at each `solve`; memory O(m R), or within
    `max_bytes` by a pass for some layers, or some queries of a layer, at a time.

        solver = dropinf.solvers.DataInf(damping=0.1).fit(store)

    Args:
        damping: λ_l as a share of the mean of diag(F_l), a number or layer name -> number.
        absolute: `damping` is λ_l itself.
        max_bytes: bound of the memory, see `Solver`.

    Raises:
        ValueError: an argument is out of range; or, at `fit`, it is 0 for a layer that is
            not all zeros (which would give zeros).
    """

    _num_tensors = 3  # a query and its sum, and their difference

    def __init__(
        self,
        damping: float | Mapping[str, float] = 0.1,
        absolute: bool = False,
        max_bytes: int | None = None,
    ) -> None:
        self._damping = Damping("DataInf", damping, absolute)
        self._bounded(max_bytes)

    def _fit(self, store: RowStore, n: int) -> None:
        diagonal = diagonal_of(self.room("fit"), store, n)
        blocks = store.plan.blocks
        self._layers = []
        for block, λ in zip(blocks, self._damping.lambdas(blocks, diagonal), strict=True):
            if λ > 0:
                self._layers.append((block, λ))
            elif diagonal[block.entries].any():
                raise ValueError(
                    f"DataInf.fit: layer {block.name!r} has damping=0, and g g^T of a single row "
                    "has no inverse; raise the damping"
                )
        self._n = n

    def _solve_some(
        self, layers: slice, rows: Tensor, solved: Tensor, part_bytes: int | None
    ) -> None:
        some = self._layers[layers]
        columns = span([block for block, _ in some])
        queries = rows[:, columns].double()
        sums = torch.zeros_like(queries)
        for part in parts(self.store, columns, part_bytes):
            for block, λ in some:
                at = within(block, columns)
                G, q = part[:, at], queries[:, at]
                weights = 1 / (self._n * (λ + G.square().sum(1)))
                sums[:, at].addmm_(q @ G.T * weights, G)
        for block, λ in some:
            at = within(block, columns)
            solved[:, block.entries] = torch.sub(queries[:, at], sums[:, at]).div_(λ)
