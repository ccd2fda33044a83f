"""Block conjugate gradients: the exact solution without a matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dropinf.compression import LayerPlan
from dropinf.rows import RowStore
from dropinf.solvers.by_passes import ByPasses
from dropinf.solvers.damping import Damping
from dropinf.solvers.gauss_newton import multiply, solvable
from dropinf.solvers.number_range import diagonal_of
from dropinf.user_warning import warn_user

# Directions below this share of the longest are rounding: they are dropped.
_DEPENDENT = 1e-12


class CG(ByPasses):
    """(F_l + λ_l) x = q for all m queries at once, by products with the rows alone.

    Block conjugate gradients (O'Leary 1980, doi 10.1016/0024-3795(80)90247-5): each step finds the
    best x in the span of all queries' directions P,

        α = (P A Pᵀ)⁻¹ P Rᵀ,  X += αᵀ P,  R -= αᵀ P A,  P <- orth(Z - (P A Zᵀ)ᵀ (P A Pᵀ)⁻¹ P)

    with A = F + λ, residuals R and Z = R / diag(A). orth is an orthonormal basis without the
    directions that depend on others, as they come to (Ji and Li 2017, "breakdown-free", doi
    10.1007/s10543-016-0631-z).

    One pass over the store at `fit`; at `solve` one pass a step for all layers that are not done,
    about √(condition of A) steps and fewer the more queries there are, and one that computes each
    residual anew. Memory: six float64 tensors [m, R], or within `max_bytes` by solving for some
    layers, or some queries of a layer, after the others. Sums are float64.

        solver = dropinf.solvers.CG(damping=0.1).fit(store)

    Args:
        damping: λ_l as a share of the mean of diag(F_l), a number or layer name -> number.
        absolute: `damping` is λ_l itself.
        tol: largest |q - (F_l + λ_l) x| / |q| of any query in any layer. Where F_l has not full
            rank, x itself may be off by tol |q| / λ_l, of which `fit` warns.
        max_iterations: passes at each `solve`; None is 20 + 2 min(n, r), r of the widest layer
            (without rounding, 1 + min(n, r) would do).
        max_bytes: bound of the memory, see `Solver`.

    Raises:
        ValueError: an argument is out of range; or, at `fit`, a layer with λ_l = 0 has n < r_l or
            a coordinate that is zero in every row.
        RuntimeError: at `solve`, a layer did not come to `tol`. Rounding alone can keep it from
            there where the condition of A is above 1e8 or so: take `Cholesky` or `Eigen`.
    """

    # A system's five and a diagonal, and what one layer's step makes beside them.
    _num_tensors = 16

    def __init__(
        self,
        damping: float | Mapping[str, float] = 0.1,
        absolute: bool = False,
        tol: float = 1e-6,
        max_iterations: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self._damping = Damping("CG", damping, absolute)
        if not 0 < tol < 1:
            raise ValueError(f"CG: tol must be between 0 and 1, got {tol!r}")
        if max_iterations is not None and max_iterations < 1:
            raise ValueError(f"CG: max_iterations must be from 1, got {max_iterations!r}")
        self.tol, self.max_iterations = tol, max_iterations
        self._bounded(max_bytes)

    def _fit(self, store: RowStore, n: int) -> None:
        blocks = store.plan.blocks
        self._diagonal = diagonal_of(self.room("fit"), store, n)
        λs = self._damping.lambdas(blocks, self._diagonal)
        self._layers = solvable("CG.fit", blocks, λs, self._diagonal, n)
        self._n, self._kept_bytes = n, 8 * len(self._diagonal)
        for block, λ in self._layers:
            mean = float(self._diagonal[block.entries].mean())
            if 0 < λ < 100 * self.tol * mean:
                warn_user(
                    f"CG.fit: layer {block.name!r} has lambda={λ:.3g} beside a mean diagonal of "
                    f"{mean:.3g}: a residual of tol={self.tol:g} can leave a solution off by "
                    "tol |q| / lambda; lower tol, raise the damping, or take Cholesky or Eigen"
                )
                break

    def _solve_some(
        self, layers: slice, rows: Tensor, solved: Tensor, part_bytes: int | None
    ) -> None:
        systems = [
            _System(block, λ, self._diagonal[block.entries], rows[:, block.entries].double())
            for block, λ in self._layers[layers]
        ]
        most = self.max_iterations
        if most is None:
            most = 20 + 2 * min(self._n, max((block.r for block, _ in self._layers), default=0))
        for _ in range(most):
            if not systems:
                break
            asked = [(system.block, system.asks(self.tol)) for system in systems]
            answers = multiply(self.store, self._n, asked, part_bytes)
            waiting = []
            for system, answer in zip(systems, answers, strict=True):
                if system.advance(answer, self.tol):
                    solved[:, system.block.entries] = system.x * system.norms
                else:
                    waiting.append(system)
            systems = waiting
        if systems:
            worst = max(systems, key=_System.residual)
            raise RuntimeError(
                f"CG.solve: layer {worst.block.name!r} has a relative residual of "
                f"{worst.residual():.2g} after max_iterations={most}, above tol={self.tol:g} "
                f"(layers not done: {len(systems)}); raise max_iterations, tol or the damping, or "
                "take Cholesky or Eigen"
            )


class _System:
    """A x = q of one layer, with every q made one long."""

    def __init__(self, block: LayerPlan, λ: float, diagonal: Tensor, q: Tensor) -> None:
        self.block, self._λ, self._diagonal = block, λ, diagonal.to(q.device) + λ
        self.norms = torch.linalg.vector_norm(q, dim=1, keepdim=True)
        self._q = q / self.norms.where(self.norms > 0, 1)
        self.x = torch.zeros_like(q)
        self._start(self._q)

    def residual(self) -> float:
        return float(torch.linalg.vector_norm(self._residuals, dim=1).max())

    def asks(self, tol: float) -> Tensor:
        """The rows to multiply with F next: the directions, or x to compute its residual anew."""
        self._anew = self.residual() <= tol
        return self.x if self._anew else self._directions

    def advance(self, product: Tensor, tol: float) -> bool:
        """Take F times what was asked; True when x is there."""
        if self._anew:  # the running residual drifts from the true one by rounding
            self._start(self._q - product - self._λ * self.x)
            return self.residual() <= tol
        P = self._directions
        AP = product.add_(P, alpha=self._λ)
        factor, info = torch.linalg.cholesky_ex(P @ AP.T)
        if info:
            raise RuntimeError(
                f"CG.solve: layer {self.block.name!r} is singular to float64 rounding, its "
                f"relative residual is {self.residual():.2g}; raise the damping, or take Cholesky "
                "or Eigen"
            )
        α = torch.cholesky_solve(P @ self._residuals.T, factor)
        self.x.addmm_(α.T, P)
        self._residuals = self._residuals - α.T @ AP
        Z = self._residuals / self._diagonal
        β = torch.cholesky_solve(AP @ Z.T, factor)
        self._directions = _orthonormal(Z - β.T @ P)
        return False

    def _start(self, residuals: Tensor) -> None:
        self._residuals = residuals
        self._directions = _orthonormal(residuals / self._diagonal)


def _orthonormal(rows: Tensor) -> Tensor:
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[sizes > _DEPENDENT * sizes[0]]
