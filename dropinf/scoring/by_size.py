"""Stability: at which r another mask gives the same answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from torch import nn

from dropinf.compression import Compression, Dropout, Plan
from dropinf.extras import optional
from dropinf.rows import LossFn, RowStore, collect, energies
from dropinf.scoring.between_masks import Agreement, agreement
from dropinf.solvers import Cholesky, Solver
from dropinf.text_table import Table

_SIZES = ("r", "rate", "total")


@dataclasses.dataclass(frozen=True, repr=False)
class Stability:
    """What `stability` returns.

    Attributes:
        sizes: the r (or rate, or total) that were tried, in growing order.
        widths: R of each, entries of a row.
        agreements: of each, see `agreement`.
        masks, k: how many seeds each is over, and of which top-k.
    """

    sizes: tuple[float, ...]
    widths: tuple[int, ...]
    agreements: tuple[Agreement, ...]
    masks: int
    k: int

    def smallest(self, level: float = 0.8, of: str = "overlap") -> float | None:
        """The smallest size that reaches `level`, as every larger one does; None if none does.

        Args:
            level: 0 to 1.
            of: "overlap" of the top-k, which people look at, or "correlation" over all examples.
        """
        if of not in ("overlap", "correlation"):
            raise ValueError(f"smallest: of must be 'overlap' or 'correlation', got {of!r}")
        if not 0 <= level <= 1:
            raise ValueError(f"smallest: level must be 0 to 1, got {level}")
        found = None
        for size, each in reversed(list(zip(self.sizes, self.agreements, strict=True))):
            if not getattr(each, of) >= level:
                break
            found = size
        return found

    def describe(self) -> Table:
        """A row for each size; errors are standard errors over the queries."""
        columns = ("size", "R", "rank correlation", f"top-{self.k} overlap")
        rows = [
            (
                f"{size:,}",
                f"{width:,}",
                f"{found.correlation:.3f} +- {found.correlation_error:.3f}",
                f"{found.overlap:.2f} +- {found.overlap_error:.2f}",
            )
            for size, width, found in zip(self.sizes, self.widths, self.agreements, strict=True)
        ]
        stable = self.smallest()
        where = "At none of these sizes" if stable is None else f"From size {stable:,} on"
        note = (
            f"Between two of {self.masks} masks. {where} the top {self.k} overlap by 0.8 or more."
        )
        return Table(columns, rows, right=range(4), notes=[note])

    def __str__(self) -> str:
        return str(self.describe())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.describe()._repr_html_()

    def plot(self) -> Any:
        """Both against r, as a figure of matplotlib."""
        figures = optional("matplotlib.figure", "report", "Stability.plot")
        figure = figures.Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name, label in (("correlation", "rank correlation"), ("overlap", f"top-{self.k}")):
            axes.errorbar(
                self.widths,
                [getattr(found, name) for found in self.agreements],
                [getattr(found, f"{name}_error") for found in self.agreements],
                label=label,
                marker="o",
                capsize=3,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(self.widths, [f"{width:,}" for width in self.widths])
        axes.minorticks_off()
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("R, entries of a row")
        axes.set_ylabel(f"agreement of two of {self.masks} masks")
        axes.legend()
        return figure


def stability(
    model: nn.Module,
    train_loader: Iterable,
    query_loader: Iterable,
    loss_fn: LossFn,
    r: Sequence[float] = (256, 1024, 4096),
    masks: int = 3,
    k: int = 10,
    *,
    compression: Compression | None = None,
    damping: float = 0.1,
    mode: str = "activations",
    progress: bool = True,
) -> Stability:
    """At which r another mask gives the same answer: what to know before looking at top texts.

        found = dropinf.stability(model, train, queries, loss_fn, r=(256, 1024, 4096))
        print(found)
        found.smallest(0.8)  # the r from which 8 of 10 top texts survive another seed

    Collects both loaders for each of `masks` seeds of each r: as many times `influence`.

    Args:
        model, train_loader, query_loader, loss_fn, damping, mode, progress: as in `influence`;
            loaders that can be gone through again.
        r: the sizes to try, of whichever `compression` is made with: r, rate or total.
        masks: seeds of each, 2 or more, from that of the compression on.
        k: of the top-k overlap.
        compression: whose size and seed are replaced; None is Dropout(r=...) by energy, as in
            `influence`. A size at which nothing is left out agrees wholly, and is not run.

    Raises:
        ValueError: a loader is gone after one pass, there are fewer than two masks, no sizes, or a
            compression that has no size and seed; or as of `agreement`.
    """
    for name, loader in (("train_loader", train_loader), ("query_loader", query_loader)):
        if hasattr(loader, "__next__"):
            raise ValueError(
                f"stability: {name} is gone after one pass; give a DataLoader or a list of batches"
            )
    several = isinstance(r, Iterable) and not isinstance(r, str)
    if not several or not all(isinstance(one, Real) for one in r):
        raise ValueError(f"stability: r must be the sizes to try, such as (256, 1024), got {r!r}")
    for name, value, least in (("masks", masks, 2), ("k", k, 1)):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(
                f"stability: {name} must be a whole number from {least}, got {value!r}"
            )
    sizes = tuple(sorted(set(r)))
    if not sizes:
        raise ValueError(f"stability: need sizes to try, got r={r!r}")
    if compression is None:
        compression = Dropout(r=1, energies=energies(model, train_loader, loss_fn, mode=mode))
    given = [name for name in _SIZES if getattr(compression, name, None) is not None]
    if not given or not hasattr(compression, "seed"):
        raise ValueError(
            f"stability: {compression!r} has no size and seed to vary; give one that has"
        )

    def part(plan: Plan) -> tuple[RowStore, RowStore, Solver]:
        label = f"{given[0]}={getattr(plan.compression, given[0])}, seed={plan.compression.seed}"
        store, queries = (
            collect(
                model, loader, loss_fn, plan, mode=mode, progress=progress and f"{what}, {label}"
            )
            for what, loader in (("train rows", train_loader), ("query rows", query_loader))
        )
        return queries, store, Cholesky(damping).fit(store)

    widths, found = [], []
    for size in sizes:
        plans = [
            Plan.make(model, dataclasses.replace(compression, **{given[0]: size, "seed": seed}))
            for seed in range(compression.seed, compression.seed + masks)
        ]
        widths.append(plans[0].width)
        if len({plan.fingerprint for plan in plans}) == 1:
            found.append(Agreement(1.0, 0.0, 1.0, 0.0))
            continue
        found.append(agreement(map(part, plans), k))
    return Stability(sizes, tuple(widths), tuple(found), masks, k)
