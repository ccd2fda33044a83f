"""Do scores say what leaving an example out does?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dropinf.evaluate.estimates import Estimate, kind, losses_of, over_queries, scores_of
from dropinf.ranks import standard_ranks


@dataclass(frozen=True)
class LeaveOneOut:
    """What `leave_one_out` returns; each is of a query's examples, and then a mean over queries.

        found = dropinf.evaluate.leave_one_out(scores, without_one, baseline)
        print(found.rank_correlation, found.slope)

    Attributes:
        rank_correlation: Spearman's, of scores and changes of the loss.
        correlation: Pearson's.
        slope: of the least-squares line of changes over scores / n: 1 where these are the changes,
            above 1 where they are too small.
    """

    rank_correlation: Estimate
    correlation: Estimate
    slope: Estimate


def leave_one_out(
    scores: Tensor, losses: Tensor, baseline: Tensor, examples: Tensor | None = None
) -> LeaveOneOut:
    """Scores beside the true change of each query's loss, after training without one example.

    `scores / n` is what leaving one of n examples out should add to a query's loss. A change that
    is shared by all examples, as of a baseline that was trained otherwise, does not count. Training
    must be exact enough to show the effect of one example: with noise from seeds larger than that,
    correlations stay near 0 whatever the scores; then take `lds`.

        print(dropinf.evaluate.leave_one_out(scores, without_one, baseline).slope)

    Args:
        scores: [m, n] of all n training examples. Queries that are NaN throughout are left out, and
            so are examples that are.
        losses: [h, m] of the queries by the models trained without one example each, or
            [seeds, h, m], of which the mean over seeds is taken.
        baseline: [m], [1, m] or [seeds, 1, m], of the model trained on all.
        examples: [h] int64, which example each model lacks; None for all n in their order.

    Raises:
        ValueError: shapes do not agree, losses are not finite, or fewer than two examples are left.
    """
    found, valid, whole = scores_of("leave_one_out", scores)
    m, n = found.shape
    losses = losses_of("leave_one_out", "losses", losses, m).mean(0)
    before = baseline_of("leave_one_out", baseline, m).mean((0, 1))
    left = _examples(examples, n)
    if len(left) != len(losses):
        raise ValueError(
            f"leave_one_out: losses must be of one model for each of {len(left)} examples, got "
            f"{len(losses)}; name those that were left out with examples="
        )
    kept = whole[left]
    if kept.sum() < 2:
        raise ValueError(f"leave_one_out: needs two valid examples or more, got {int(kept.sum())}")
    predicted = found[:, left[kept]] / n
    changes = (losses[kept] - before).T
    ranks = (standard_ranks(predicted) * standard_ranks(changes)).mean(1)
    x, y = _centred(predicted), _centred(changes)
    product, square = (x * y).sum(1), x.square().sum(1)
    size = (square * y.square().sum(1)).sqrt()
    linear = torch.where(size > 0, product / size, 0.0)
    estimates = [each.where(valid, torch.nan) for each in (ranks, linear, product / square)]
    return LeaveOneOut(*(over_queries("leave_one_out", each) for each in estimates))


def _centred(values: Tensor) -> Tensor:
    """[m, h] less the mean of each row; just 0 where all are the same."""
    differ = (values != values[:, :1]).any(1, keepdim=True)
    return (values - values.mean(1, keepdim=True)).where(differ, 0.0)


def baseline_of(op: str, baseline: Tensor, m: int) -> Tensor:
    """[seeds, 1, m] losses of the model trained on all examples."""
    if isinstance(baseline, Tensor) and baseline.dim() == 1:
        baseline = baseline[None]
    losses = losses_of(op, "baseline", baseline, m)
    if losses.shape[1] != 1:
        raise ValueError(
            f"{op}: baseline must be losses of one model, trained on all examples, [{m}], [1, {m}] "
            f"or [seeds, 1, {m}], got {list(baseline.shape)}"
        )
    return losses


def _examples(examples: Tensor | None, n: int) -> Tensor:
    if examples is None:
        return torch.arange(n)
    integers = isinstance(examples, Tensor) and examples.dtype in (torch.int32, torch.int64)
    if not integers or examples.dim() != 1:
        raise ValueError(f"leave_one_out: examples must be [h] torch.int64, got {kind(examples)}")
    examples = examples.cpu().long()
    if ((examples < 0) | (examples >= n)).any():
        raise ValueError(f"leave_one_out: examples must be 0 to {n - 1}, got {examples.tolist()}")
    return examples
