"""A mean over queries with its standard error, and what goes into one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A figure, and how sure it is.

        found = dropinf.evaluate.lds(scores, members, losses)
        print(found)  # the value, and its errors

    Attributes:
        value: the mean over the queries.
        error: its standard error: how far the value of other queries would be from it, by the same
            models. NaN for one query.
        runs_error: its standard error over the models that were retrained: how far the value by
            other such models would be from it, for the same queries. NaN where that is not known.
        each: [m] float64, the figure of each query, NaN where the query was left out; None where
            it is not a mean over queries.
        left_out: how many queries (of `mislabeled_auc`: examples) have no part in it.
    """

    value: float
    error: float
    runs_error: float = torch.nan
    each: Tensor | None = field(default=None, repr=False)
    left_out: int = 0

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        over = "" if self.each is None else " over queries"
        text = f"{self.value:.4g} +- {self.error:.2g}{over}"
        if self.runs_error == self.runs_error:
            text += f", +- {self.runs_error:.2g} over retrained models"
        return text + (f" ({self.left_out} left out)" if self.left_out else "")


def over_queries(op: str, each: Tensor, runs_error: float = torch.nan) -> Estimate:
    """Of [m] figures, NaN where a query has none.

    Raises:
        ValueError: no query has one.
    """
    each = each.double()
    there = each[~each.isnan()]
    if not len(there):
        raise ValueError(f"{op}: all {len(each)} queries are invalid or have nothing to compare")
    return Estimate(
        value=float(there.mean()),
        error=standard_error(there),
        runs_error=runs_error,
        each=each,
        left_out=len(each) - len(there),
    )


def standard_error(values: Tensor) -> float:
    """Of the mean; NaN for a single one."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else torch.nan


def scores_of(op: str, scores: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [m, n] in float64, 0 where invalid; which queries [m] and examples [n] are valid.

    Raises:
        ValueError: they are no such matrix, or NaN or infinite elsewhere than in whole rows and
            columns, which is how `dropinf.scores` marks what is invalid.
    """
    scores = numbers_of(op, "scores", scores)
    if scores.dim() != 2 or not scores.numel():
        raise ValueError(f"{op}: scores must be [m, n], got {list(scores.shape)}")
    missing = scores.isnan()
    queries = ~missing.all(1)
    examples = ~missing[queries].all(0) if queries.any() else ~missing.all(0)
    odd = ~scores.isfinite() & queries[:, None] & examples
    if odd.any():
        q, i = odd.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: scores[{q}, {i}] is {float(scores[q, i])}; an invalid query or example is NaN "
            "in its whole row or column, and all else must be finite"
        )
    return scores.where(queries[:, None] & examples, 0.0), queries, examples


def losses_of(op: str, name: str, losses: Any, m: int) -> Tensor:
    """Losses [seeds, h, m] in float64, of [h, m] with one seed.

    Raises:
        ValueError: they have another shape or are not finite.
    """
    given = numbers_of(op, name, losses)
    found: Tensor = given.unsqueeze(0) if given.dim() == 2 else given
    if found.dim() != 3 or found.shape[2] != m or not found.numel():
        raise ValueError(
            f"{op}: {name} must be [h, {m}] or [seeds, h, {m}], losses of the {m} queries of the "
            f"scores by each retrained model, got {list(given.shape)}"
        )
    if not found.isfinite().all():
        seed, subset, query = (~found.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"{op}: {name}[{seed}, {subset}, {query}] is {float(found[seed, subset, query])}, as "
            "of a training that diverged; leave that subset out"
        )
    return found


def numbers_of(op: str, name: str, values: Any) -> Tensor:
    """A tensor of real numbers, in float64 on the CPU.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(values, Tensor) or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{op}: {name} must be a tensor of real numbers, got {kind(values)}")
    numbers: Tensor = values.detach().to("cpu", torch.float64)
    return numbers


def mask_of(op: str, name: str, values: Any, shape: tuple[int | str, ...]) -> Tensor:
    """A tensor of bool on the CPU, of a shape in which names stand for any size.

    Raises:
        ValueError: it is something else.
    """
    wanted = "[" + ", ".join(map(str, shape)) + "]"
    found = isinstance(values, Tensor) and values.dtype == torch.bool
    if not found or values.dim() != len(shape):
        raise ValueError(f"{op}: {name} must be {wanted} torch.bool, got {kind(values)}")
    if any(isinstance(a, int) and a != b for a, b in zip(shape, values.shape, strict=True)):
        raise ValueError(f"{op}: {name} must be {wanted}, got {list(values.shape)}")
    mask: Tensor = values.detach().cpu()
    return mask


def kind(values: Any) -> str:
    """What came, for an error."""
    if isinstance(values, Tensor):
        return f"{values.dtype} {list(values.shape)}"
    return type(values).__name__
