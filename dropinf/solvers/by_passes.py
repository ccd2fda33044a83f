"""Solvers that read the store's rows anew for every solve."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from dropinf.compression import LayerPlan
from dropinf.solvers.base import Solver
from dropinf.solvers.gauss_newton import product_bytes
from dropinf.solvers.room import Room


class ByPasses(Solver):
    """Solves by passes over the store, for as many layers and queries at once as have room.

    Half of the room is for tensors of the queries, the rest for parts of the rows.
    """

    _num_tensors: ClassVar[int]  # float64, of a query's width, that one query takes at once
    _layers: list[tuple[LayerPlan, float]]  # those to solve for, and their λ_l

    def _query_bytes(self, width: int, part_bytes: int | None) -> int:
        return 8 * self._num_tensors * width + product_bytes(width, part_bytes)

    def _solve(self, rows: Tensor, solved: Tensor, room: Room) -> None:
        blocks, part_bytes = [block for block, _ in self._layers], room.part_bytes
        pieces = room.share(1 / 2).pieces(
            blocks, len(rows), lambda width: self._query_bytes(width, part_bytes)
        )
        for layers, at in pieces:
            self._solve_some(layers, rows[at], solved[at], part_bytes)

    @abstractmethod
    def _solve_some(
        self, layers: slice, rows: Tensor, solved: Tensor, part_bytes: int | None
    ) -> None:
        """Write the columns of `_layers[layers]` into `solved`."""
