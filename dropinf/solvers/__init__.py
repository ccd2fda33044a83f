"""Solvers: fit to a store's rows, then solve (F_l + λ_l) x = q for every layer's slice of q."""

from dropinf.solvers.base import Solver

# As themselves: for the rooms above, not in __all__.
from dropinf.solvers.base import need_solver as need_solver
from dropinf.solvers.cg import CG
from dropinf.solvers.cholesky import Cholesky, Full
from dropinf.solvers.damping_choice import DampingChoice, choose_damping
from dropinf.solvers.datainf import DataInf
from dropinf.solvers.diagonal import Diagonal
from dropinf.solvers.eigen import Eigen
from dropinf.solvers.identity import Identity
from dropinf.solvers.lissa import LiSSA
from dropinf.solvers.triples import triples as triples

__all__ = [
    "CG",
    "Cholesky",
    "DampingChoice",
    "DataInf",
    "Diagonal",
    "Eigen",
    "Full",
    "Identity",
    "LiSSA",
    "Solver",
    "choose_damping",
]
