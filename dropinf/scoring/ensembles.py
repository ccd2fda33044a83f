"""Scores averaged over checkpoints and masks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from dropinf.rows import RowStore
from dropinf.scoring.query_scores import scores
from dropinf.solvers import Solver


class Ensemble(NamedTuple):
    """What `ensemble` returns."""

    mean: Tensor  # [m, n], weighted
    error: Tensor  # [m, n] standard error of the mean


def ensemble(
    parts: Iterable[tuple[RowStore, RowStore, Solver]],
    *,
    relative: bool = False,
    weights: str | Iterable[float] = "same",
) -> Ensemble:
    """Scores averaged over checkpoints and masks, with error bars.

    Averaging over several trained models is what helps most (TRAK, arXiv 2303.14186, section 3.2);
    several masks (`Dropout(seed=)`) of one model show how much of a score is the compression.

    Args:
        parts: (queries, store, solver) of each checkpoint and mask, for the same queries and
            training examples in the same order; a generator makes them one at a time.
        relative: as in `scores`.
        weights: of the parts, a number each, such as learning rates of checkpoints: the mean is
            Σ_k w_k scores_k / Σ_k w_k, and TracIn's sum over checkpoints, Σ_k w_k scores_k
            (TracInCP, arXiv 2002.08484; also definition 3.1 of LESS, arXiv 2402.04333), is that
            times sum(weights). Or "same" or "any", as in `scores`, for a plain mean.

    Returns:
        mean [m, n], and error [m, n], the standard error of that mean: the standard deviation over
        the parts divided by the square root of their number, NaN for a single part; with weights
        sqrt(K / (K - 1) Σ w_k² (scores_k - mean)²) / Σ w_k over the K parts. NaN where the query
        or training row is invalid in any part.

    Raises:
        ValueError: there are no parts, they differ in m or n, or weights are not one positive
            number for each.
    """
    given = None if isinstance(weights, str) else _part_weights(weights)
    same = weights if isinstance(weights, str) else "same"
    count, mean, squares = 0, torch.empty(0), torch.empty(0)
    linear: Tensor | list[float] = []  # Σ w² (s - mean), which is zero with equal weights
    total = total_squares = 0.0
    for queries, store, solver in parts:
        if given is not None and count == len(given):
            raise ValueError(f"ensemble: there are more parts than the {count} weights")
        w = 1.0 if given is None else given[count]
        found = scores(queries, store, solver, relative=relative, weights=same)
        if count == 0:
            mean, squares = torch.zeros_like(found), torch.zeros_like(found)
            linear = [0.0] * len(found) if given is None else torch.zeros_like(found)
        if found.shape != mean.shape:
            raise ValueError(
                f"ensemble: part {count} has scores {list(found.shape)}, those before it "
                f"{list(mean.shape)}; give the same queries and training examples to all"
            )
        total += w
        # Of a query at a time, so that there are no more tensors [m, n].
        for new, average, square, line in zip(found, mean, squares, linear, strict=True):
            # Welford's update of Σ w² (s - mean)² and of `linear`: no large sums cancel.
            step = (new - average) * (w / total)
            average += step
            off = new - average
            square += step * (step * total_squares - 2 * line) + w**2 * off.square()
            if given is not None:
                line += w**2 * off - step * total_squares
        total_squares += w**2
        count += 1
        del found  # before there are those of the next part
    if count == 0:
        raise ValueError("ensemble: no parts were given")
    if given is not None and count < len(given):
        raise ValueError(f"ensemble: {len(given)} weights were given for {count} parts")
    more = count / (count - 1) if count > 1 else torch.nan
    return Ensemble(mean, squares.clamp_(min=0).mul_(more).sqrt_().div_(total))


def _part_weights(weights: Iterable[float]) -> list[float]:
    if not isinstance(weights, Iterable):
        raise ValueError(f"ensemble: weights must be positive numbers, one a part, got {weights!r}")
    found = [float(w) for w in weights]
    if not all(0 < w < float("inf") for w in found):
        raise ValueError(f"ensemble: weights must be positive numbers, one a part, got {found}")
    return found
