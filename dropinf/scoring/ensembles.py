"""Scores averaged over checkpoints and masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dropinf.rows import RowStore, digest_of_ids
from dropinf.scoring.query_scores import scores
from dropinf.solvers import Solver, triples


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

        mean, error = dropinf.ensemble(parts)  # [m, n] each

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
        or training row is invalid in any part. Both are where the scores of the first part are.

    Raises:
        TypeError: a part is something else.
        ValueError: there are no parts, they differ in m, n or ids, or weights are not one positive
            number for each.
    """
    given = None if isinstance(weights, str) else _part_weights(weights)
    same = weights if isinstance(weights, str) else "same"
    count, mean, squares, linear = 0, torch.empty(0), torch.empty(0), torch.empty(0)
    ids: list[bytes] = []  # a digest of the first part's queries, and one of its examples
    total = total_squares = 0.0
    for queries, store, solver in triples("ensemble", parts):
        if given is not None and count == len(given):
            raise ValueError(f"ensemble: there are more parts than the {count} weights")
        w = 1.0 if given is None else given[count]
        own = [digest_of_ids(queries.ids), digest_of_ids(store.ids)]
        found = scores(queries, store, solver, relative=relative, weights=same)
        if count == 0:
            mean, squares = torch.zeros_like(found), torch.zeros_like(found)
            if given is not None:
                linear = torch.zeros_like(found)
        found = found.to(mean.device)
        if found.shape != mean.shape:
            raise ValueError(
                f"ensemble: part {count} has scores {list(found.shape)}, those before it "
                f"{list(mean.shape)}; give the same queries and training examples to all"
            )
        ids = ids or own
        for name, first, these in zip(("queries", "examples"), ids, own, strict=True):
            if first != these:
                raise ValueError(
                    f"ensemble: part {count} has {name} of other ids than the first, or in another "
                    "order; collect all from one loader that does not shuffle"
                )
        total += w
        sums = mean, squares, linear
        _take_in(found, sums if given is not None else sums[:2], w, total, total_squares)
        total_squares += w**2
        count += 1
        del found  # before there are those of the next part
    if count == 0:
        raise ValueError("ensemble: no parts were given")
    if given is not None and count < len(given):
        raise ValueError(f"ensemble: {len(given)} weights were given for {count} parts")
    more = count / (count - 1) if count > 1 else torch.nan
    return Ensemble(mean, squares.clamp_(min=0).mul_(more).sqrt_().div_(total))


def _take_in(
    found: Tensor, sums: Sequence[Tensor], w: float, total: float, total_squares: float
) -> None:
    """Welford's update of the mean, of Σ w² (s - mean)², and of Σ w² (s - mean), which is zero with
    equal weights: no large sums cancel. Of a query at a time, for no more tensors [m, n].
    """
    for new, mean, squares, *linear in zip(found, *sums, strict=True):
        step = (new - mean).mul_(w / total)
        mean += step
        off = new - mean
        squares.addcmul_(off, off, value=w**2).addcmul_(step, step, value=total_squares)
        for line in linear:
            squares.addcmul_(step, line, value=-2)
            line.add_(off, alpha=w**2).sub_(step, alpha=total_squares)


def _part_weights(weights: Iterable[float]) -> list[float]:
    if not isinstance(weights, Iterable):
        raise ValueError(f"ensemble: weights must be positive numbers, one a part, got {weights!r}")
    found = [float(w) for w in weights]
    if not all(0 < w < float("inf") for w in found):
        raise ValueError(f"ensemble: weights must be positive numbers, one a part, got {found}")
    return found
