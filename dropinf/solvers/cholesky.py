"""The damped matrix F_l of every layer, factorised once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dropinf.compression import LayerPlan
from dropinf.rows import PART_BYTES, RowStore, ranks_together
from dropinf.solvers.base import Joint, Solver
from dropinf.solvers.damping import Damping
from dropinf.solvers.dual import Dual
from dropinf.solvers.eigen import Eigen
from dropinf.solvers.factor_file import FileTensor, Spill
from dropinf.solvers.group import Group, Layer, Setting
from dropinf.solvers.primal import Primal
from dropinf.solvers.room import Room
from dropinf.solvers.saving import load_solver, save_solver
from dropinf.solvers.shared_fit import fitted_together
from dropinf.text_table import Table


class Cholesky(Solver):
    """Exact inverse of each layer's damped F_l (arXiv 2509.15651, section 3).

    F_l = G_lᵀ G_l / n for the rows G_l [n, r_l] of layer l: of losses at the given labels the
    empirical Fisher matrix, of `losses.sampled` the Fisher and of `losses.gauss_newton` the
    Gauss-Newton matrix. λ_l = damping · trace(F_l) / r_l. The r x r form keeps the triangular
    factor of F_l + λ_l. Where 2 n <= r_l the n x n form is taken (Woodbury), which then has at most
    half the memory and is the cheaper to fit:

        (F + λ)⁻¹ q = (q - Gᵀ (G Gᵀ + n λ)⁻¹ G q) / λ

    It reads the store's rows again when it solves, so they must not change meanwhile.

    Layers that float32 has not the digits for, as with a small damping where the rows have few
    directions, are factorised in float64. A pivot that is not positive, or no larger than rounding
    makes it, raises its layer's damping tenfold, at most four times, each with a warning. A layer
    whose training rows and λ are zero gives zeros: its scores are zero under any inverse.

        solver = dropinf.solvers.Cholesky(damping=0.1).fit(store)
        print(solver.describe())

    Args:
        damping: relative to the mean diagonal of F_l, the paper's 0.1 as the default; or a dict of
            layer name (or shell pattern; the first that matches) -> damping.
        absolute: `damping` is λ_l itself.
        dtype: of F_l and its factor in the r x r form; None is the rows' own, and float64 for the
            layers that need it.
        max_bytes: bound of the memory, see `Solver`. What does not fit at once is done some layers
            at a time, with the factors in a temporary file.

    Attributes:
        layers: a `Layer` for each (name, r, form, λ, failed_pivots, retries); after fit.

    Raises:
        ValueError: a damping, the dtype or max_bytes is out of range.
    """

    layers: tuple[Layer, ...] = ()
    _takes_part = True
    _spill: Spill | None = None
    _eigen: type[Eigen] = Eigen

    def __init__(
        self,
        damping: float | Mapping[str, float] = 0.1,
        absolute: bool = False,
        dtype: torch.dtype | None = None,
        max_bytes: int | None = None,
    ) -> None:
        op = type(self).__name__
        self._damping = Damping(op, damping, absolute)
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"{op}: dtype must be float32 or float64, got {dtype}")
        self.damping, self.absolute = damping, absolute
        self.dtype = dtype
        self._bounded(max_bytes)

    def _fit(self, store: RowStore, n: int) -> None:
        blocks = self._blocks(store.plan)
        dampings = dict(zip(blocks, self._damping.of(blocks), strict=True))
        dtype = store.read_dtype if self.dtype is None else self.dtype
        part_bytes = PART_BYTES
        if self.max_bytes is not None:
            part_bytes = min(part_bytes, max(1, self.max_bytes // 8))
        widens = self.dtype is None and dtype == torch.float32
        setting = Setting(
            type(self).__name__, self._damping, dtype, n, self.device, part_bytes, widens
        )
        groups = self._grouped(blocks, setting)
        total = sum(group.num_bytes(block, setting) for group in groups for block in group.blocks)
        beside = max(group.scratch_bytes(group.blocks, setting) for group in groups)
        self._spill = None if total + beside <= self._budget(setting) else Spill()
        self._fit_groups(store, groups, dampings)
        widened = [self._widened(block, group) for group in groups for block in group.left]
        if widened and self.max_bytes is not None:
            self._to_file(groups)
        self._fit_groups(store, widened, dampings)
        self._set(blocks, [*groups, *widened])

    def _fit_groups(
        self, store: RowStore, groups: Sequence[Group], dampings: Mapping[LayerPlan, float]
    ) -> None:
        for group in fitted_together(ranks_together(), store, groups, dampings):
            if self._spill is not None:
                group.factors = self._spill.append(group.factors)

    def _to_file(self, groups: Sequence[Group]) -> None:
        """Factors that are in memory."""
        for group in groups:
            if isinstance(group.factors, Tensor):
                self._spill = Spill() if self._spill is None else self._spill
                group.factors = self._spill.append(group.factors)
        self._kept_bytes = 0

    def _widened(self, block: LayerPlan, group: Group) -> Group:
        """For a layer that the group left: in float64 if that fits, or else as it was."""
        wide = replace(group.setting, dtype=torch.float64, widens=False)
        fits = _needs(Primal, [block], wide) <= self._budget(wide)
        return Primal([block], wide if fits else replace(group.setting, widens=False))

    def _set(self, blocks: Sequence[LayerPlan], groups: Sequence[Group]) -> None:
        done = {b: layer for g in groups for b, layer in zip(g.blocks, g.layers, strict=True)}
        self.layers = tuple(done[block] for block in blocks)
        self._order, self._groups = list(blocks), list(groups)
        self._decomposed: Eigen | None = None
        in_memory = [g.factors for g in groups if isinstance(g.factors, Tensor)]
        self._kept_bytes = sum(factors.nbytes for factors in in_memory)

    def _budget(self, setting: Setting) -> float:
        """Bytes for factors and what is beside them while they are made.

        Off go a part of the rows, a converted copy of it, and a chunk of the store.
        """
        return float("inf") if self.max_bytes is None else self.max_bytes - 3 * setting.part_bytes

    def _grouped(self, blocks: Sequence[LayerPlan], setting: Setting) -> list[Group]:
        """Every layer's form, and as many r x r layers together as fit."""
        budget = self._budget(setting)
        together: list[list[LayerPlan]] = []
        alone: list[Group] = []

        for block in blocks:
            form = Dual if 2 * setting.n <= block.r else Primal
            least = _needs(form, [block], setting)
            if least > budget:
                raise ValueError(
                    f"{setting.op}.fit: layer {block.name!r} (n={setting.n}, r={block.r}) needs "
                    f"max_bytes={least * 8 // 5 + 1} or more, got {self.max_bytes}; "
                    "raise it, or keep fewer coordinates"
                )
            if form is Dual:
                alone.append(Dual([block], setting))
            elif together and (
                self.max_bytes is None or _needs(form, [*together[-1], block], setting) <= budget
            ):
                together[-1].append(block)
            else:
                together.append([block])
        return [*(Primal(members, setting) for members in together), *alone]

    def _solve(self, rows: Tensor, solved: Tensor, room: Room) -> None:
        for group in self._groups:
            part_bytes = min(group.setting.part_bytes, room.part_bytes or PART_BYTES)
            fixed, each = group.solve_bytes(part_bytes)
            if isinstance(group.factors, FileTensor):
                fixed += group.factors.num_bytes
            names = ", ".join(repr(block.name) for block in group.blocks[:2])
            room.need(f"layer {names}{', ...' * (len(group.blocks) > 2)}", fixed + each)
            few, factors = room.beside(fixed).count(each), group.read()
            for some, found in zip(rows.split(few), solved.split(few), strict=True):
                group.solve(self.store, factors, some, found, part_bytes)
            del factors

    def sweep(
        self,
        dampings: Sequence[float],
        queries: RowStore,
        store: RowStore | None = None,
        weights: str = "same",
    ) -> Tensor:
        """Scores at k dampings for the price of about one: see `Eigen.sweep`.

        One eigen-decomposition of each layer, made at the first call and kept.

        Returns:
            [k, m, n], equal to the scores of k solvers fitted with those dampings.
        """
        self.check_plans(f"{type(self).__name__}.sweep", queries, store, weights)
        return self.decomposed("sweep").sweep(dampings, queries, store, weights)

    def decomposed(self, call: str = "decomposed") -> Eigen:
        """The eigen-decomposition of each layer, made at the first call and kept.

        Raises:
            ValueError: it was loaded without the rows of the fit.
        """
        self._need_fit(call)
        if self.store is None:
            name = type(self).__name__
            raise ValueError(
                f"{name}.{call}: needs the rows of the fit; use {name}.load(path, store)"
            )
        if self._decomposed is None:
            if self.max_bytes is not None:
                self._to_file(self._groups)
            eigen = self._eigen(absolute=self.absolute, max_bytes=self.max_bytes)
            self._decomposed = eigen.fit(self.store)
        return self._decomposed

    def condition(self) -> list[float]:
        """An estimate of each layer's condition number λ_max / λ_min of F_l + λ_l, from below.

        Eight steps of power iteration with the factor, and eight with its inverse.
        """
        self._need_fit("condition")
        estimates = {}
        for group in self._groups:
            estimates.update(zip(group.blocks, group.condition(), strict=True))
        return [estimates[block] for block in self._order]

    def describe(self) -> Table:
        """A table, to print, of the layers: form, λ, condition estimate, failed pivots, retries."""
        self._need_fit("describe")
        columns = ("layer", "r", "form", "lambda", "condition", "retries", "failed pivots")
        rows = []
        for layer, condition in zip(self.layers, self.condition(), strict=True):
            rows.append(
                (
                    layer.name or "(model)",
                    f"{layer.r:,}",
                    layer.form,
                    f"{layer.λ:.3g}",
                    f"{condition:.3g}",
                    str(layer.retries),
                    ", ".join(map(str, layer.failed_pivots)),
                )
            )
        return Table(columns, rows, right=(1, 3, 4, 5))

    def save(self, path: str | os.PathLike) -> None:
        """Write the fitted solver to a new directory, which appears whole or not at all.

        The rows are not in it: layers in the n x n form need the store again, see `load`.

        Raises:
            FileExistsError: there is something at `path`.
        """
        self._need_fit("save")
        options = {"damping": self.damping, "absolute": self.absolute}
        save_solver(
            type(self).__name__,
            path,
            self.plan,
            self.weights,
            self.updates,
            options,
            self._order,
            self._groups,
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        store: RowStore | None = None,
        max_bytes: int | None = None,
    ) -> Cholesky:
        """Read what `save` wrote.

        Args:
            path: the directory.
            store: what it was fitted on; needed for layers in the n x n form, and by `sweep`. The
                solver is on the device of its rows; without, on the CPU.
            max_bytes: bound of the memory, see `Solver`. Factors of more than a quarter of it stay
                in the directory, and are read some layers at a time.

        Raises:
            FileNotFoundError: there is no solver at `path`.
            ValueError: it is damaged, of another class, or the store is not the one it needs.
        """
        saved = load_solver(cls.__name__, path, store)
        solver = cls(**saved.options, dtype=saved.setting.dtype, max_bytes=max_bytes)
        blocks = solver._blocks(saved.plan)
        groups = saved.groups(blocks, None if max_bytes is None else max_bytes // 4)
        solver._set(blocks, groups)
        solver.plan, solver.store, solver.weights = saved.plan, store, saved.weights
        solver.updates = saved.updates
        solver.num_rows, solver.device = saved.setting.n, saved.setting.device
        return solver

    def _need_fit(self, what: str) -> None:
        if self.plan is None:
            raise RuntimeError(f"{type(self).__name__}.{what}: call fit(store) first")


def _needs(form: type[Group], blocks: Sequence[LayerPlan], setting: Setting) -> int:
    held = sum(form.num_bytes(block, setting) for block in blocks)
    return held + form.scratch_bytes(blocks, setting)


class _JointEigen(Joint, Eigen):
    """For the sweep of `Full`."""


class Full(Joint, Cholesky):
    """One matrix over all layers jointly: F = Gᵀ G / n [R, R], λ = damping · trace(F) / R.

    Without the block-diagonal approximation: dense for small R, and in the n x n form for few rows
    (the matrix of TRAK, arXiv 2303.14186, section 3.2, with damping). Arguments and forms as in
    `Cholesky`; its one layer is called "all layers".

        solver = dropinf.solvers.Full(damping=0.1).fit(store)
    """

    _eigen = _JointEigen
