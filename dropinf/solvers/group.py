"""Layers that are factorised, kept and solved together, and what was done to each of them."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dropinf.compression import LayerPlan
from dropinf.rows import RowStore, merged
from dropinf.solvers.damping import Damping
from dropinf.solvers.factor_file import FileTensor
from dropinf.user_warning import warn_user

_RETRIES = 4  # each raises the damping tenfold
_STEPS = 8  # of the power iterations of a condition estimate


@dataclass(frozen=True)
class Layer:
    """What `fit` did to one layer."""

    name: str
    r: int
    form: str  # "r x r", "n x n", or "zero": no training row has an entry there
    λ: float
    failed_pivots: tuple[int, ...] = ()  # counted from 1, one of each try that failed
    exponent: int = 0  # the factor is that of F_l and λ times 4^-exponent

    @property
    def retries(self) -> int:
        """How many times its damping was raised tenfold."""
        return len(self.failed_pivots)


@dataclass(frozen=True)
class Setting:
    """What all groups of one fit share."""

    op: str  # for errors
    damping: Damping
    dtype: torch.dtype  # of r x r factors
    n: int  # valid training rows
    device: torch.device  # of the factors
    part_bytes: int  # of the rows that are read at once
    widens: bool = False  # a layer that `dtype` has not the digits for is left for float64


class Group(ABC):
    """Layers of one form."""

    form: ClassVar[str]

    def __init__(self, blocks: Sequence[LayerPlan], setting: Setting) -> None:
        self.blocks = list(blocks)
        self.setting = setting
        self.layers: list[Layer] = []
        self.left: list[LayerPlan] = []  # after `fit`, for a group of float64
        self.factors: Tensor | FileTensor = torch.empty(0)

    @property
    def columns(self) -> list[slice]:
        """Where its layers stand in a row."""
        return merged([block.entries for block in self.blocks])

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each layer begins once `columns` are side by side."""
        return (0, *itertools.accumulate(block.r for block in self.blocks))

    def read(self) -> Tensor:
        """The factors, in memory."""
        if isinstance(self.factors, Tensor):
            return self.factors
        return self.factors.read().to(self.setting.device)

    @staticmethod
    @abstractmethod
    def num_bytes(block: LayerPlan, setting: Setting) -> int:
        """Of one layer's factor."""

    @classmethod
    @abstractmethod
    def scratch_bytes(cls, blocks: Sequence[LayerPlan], setting: Setting) -> int:
        """Beside the factors of a group of those layers, while they are made."""

    @abstractmethod
    def size(self) -> tuple[int, torch.dtype]:
        """Numbers in `factors`, and their dtype."""

    def empty(self) -> Tensor:
        """Room for `factors`, on their device."""
        numbers, dtype = self.size()
        return torch.empty(numbers, dtype=dtype, device=self.setting.device)

    @abstractmethod
    def fit(self, store: RowStore, dampings: Sequence[float]) -> None:
        """Fill `layers` and `factors`.

        Raises:
            ValueError: a layer is singular, or not finite.
        """

    @abstractmethod
    def solve(
        self,
        store: RowStore | None,
        factors: Tensor,
        rows: Tensor,
        solved: Tensor,
        part_bytes: int,
    ) -> None:
        """Fill its columns of `solved`, with `factors` as `read` gave them.

        Rows of the store are read about `part_bytes` at a time, where the form needs them.
        """

    @abstractmethod
    def solve_bytes(self, part_bytes: int) -> tuple[int, int]:
        """What `solve` takes beside the factors, the rows and the solutions: once, and a query."""

    @abstractmethod
    def condition(self) -> list[float]:
        """An estimate of λ_max / λ_min of F_l + λ_l for each layer, from below."""

    def _retried(
        self,
        layer: Layer,
        failed: int,
        factorise: Callable[[float], int],
        mean_diagonal: float,
    ) -> Layer:
        """With ten times the damping, until `factorise(λ)` makes a factor and gives 0, not a pivot.

        Raises:
            ValueError: it gave a failed pivot at the last try, or λ is zero.
        """
        op, pivots = self.setting.op, [failed]
        where = f"{op}.fit: layer {layer.name!r} (n={self.setting.n}, r={layer.r})"
        while layer.λ > 0 and len(pivots) <= _RETRIES:
            warn_user(
                f"{where}: pivot {pivots[-1]} is not positive beyond rounding at "
                f"lambda={layer.λ:.3g}; its damping is raised tenfold"
            )
            layer = replace(layer, λ=10 * layer.λ, failed_pivots=tuple(pivots))
            failed = factorise(layer.λ)
            if not failed:
                return layer
            pivots.append(failed)
        unit = 1.0 if self.setting.damping.absolute else mean_diagonal
        powers = range(-12, 13)
        first = bisect_left(powers, True, key=lambda e: factorise(10.0**e * unit) == 0)
        works = f"1e{powers[first]:+03d}" if first < len(powers) else "beyond 1e+12"
        raise ValueError(
            f"{where} is singular at damping={layer.λ / unit:.3g}; raise the damping: the smallest "
            f"power of ten that works is {works}"
        )


def lost_pivot(factor: Tensor, diagonal: Tensor, margin: float = 1.0) -> int:
    """The first pivot (from 1) of L that rounding may have made, or 0.

    A pivot is a difference of numbers as large as the matrix's own diagonal, so it is off by about
    sqrt(r) roundings of that; below a few times as much, a singular matrix passes as a regular one.
    Below `margin` times that, what the inverse has of it is off by about 1 / margin.
    """
    rounding = margin * 2 * torch.finfo(factor.dtype).eps * len(factor) ** 0.5
    lost = ~(factor.diagonal().square() > rounding * diagonal)
    return int(lost.nonzero()[0]) + 1 if lost.any() else 0


def largest(multiply: Callable[[Tensor], Tensor], factor: Tensor) -> float:
    """Largest eigenvalue of a symmetric matrix as large as the factor, from below: power method."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(factor), 1, generator=generator, dtype=torch.float64).to(factor)
    norm = 0.0
    for _ in range(_STEPS):
        v = multiply(v / v.norm())
        norm = float(v.norm())
    return norm
