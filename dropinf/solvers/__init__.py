"""Solvers: fit to a store's rows, then solve (F_l + λ_l) x = q for every layer's slice of q."""

from dropinf.solvers.cholesky import Cholesky, Full
from dropinf.solvers.eigen import Eigen
from dropinf.solvers.identity import Identity

__all__ = ["Cholesky", "Eigen", "Full", "Identity"]
