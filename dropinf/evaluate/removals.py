"""Is training without the top examples worse than without as many others?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dropinf.evaluate.estimates import Estimate, losses_of, over_queries, standard_error
from dropinf.evaluate.left_out import baseline_of


@dataclass(frozen=True)
class Removal:
    """What `removal` returns: means over queries, with errors over queries and over seeds.

        found = dropinf.evaluate.removal(without_top, at_random, baseline)
        print(found.difference)

    Attributes:
        top: what training without the top examples adds to a query's loss.
        at_random: what training without as many random ones adds.
        difference: how much more the first adds; its errors are those of the paired difference.
    """

    top: Estimate
    at_random: Estimate
    difference: Estimate


def removal(top: Tensor, at_random: Tensor, baseline: Tensor) -> Removal:
    """The change of the queries' losses after training without the examples that rank highest.

    If scores are right, the loss goes up by more than after taking out as many at random. All are
    losses of the m queries as `retrain` returns them, [seeds, h, m], or [h, m] of one seed; give
    all the same seeds, and `runs_error` is over seeds.

        print(dropinf.evaluate.removal(without_top, at_random, baseline).difference)

    Args:
        top: h = m, where model q lacks the top examples of query q (`without(n, indices)` with the
            indices of `dropinf.topk`), and that query's loss alone is looked at; or h = 1, where
            one model lacks the top examples of all queries together.
        at_random: of any number of models without as many random ones, `random_subsets(n, n - k,
            h)`; their mean is taken.
        baseline: [m], [1, m] or [seeds, 1, m], of the model trained on all examples.

    Raises:
        ValueError: shapes do not agree, or losses are not finite.
    """
    m = int(top.shape[-1]) if isinstance(top, Tensor) and top.dim() else 1
    top = losses_of("removal", "top", top, m)
    if top.shape[1] not in (1, m):
        raise ValueError(
            f"removal: top must be of a model for each of the {m} queries, or of one for all, got "
            f"{top.shape[1]} models"
        )
    own = top[:, 0] if top.shape[1] == 1 else top.diagonal(dim1=1, dim2=2)  # [seeds, m]
    random = losses_of("removal", "at_random", at_random, m).mean(1)
    whole = baseline_of("removal", baseline, m)[:, 0]
    pairs = ((own, whole), (random, whole), (own, random))
    return Removal(*(_change(after, before) for after, before in pairs))


def _change(after: Tensor, before: Tensor) -> Estimate:
    """Of losses [seeds, m]."""
    paired = len(after) == len(before)
    runs_error = standard_error((after - before).mean(1)) if paired else float("nan")
    return over_queries("removal", after.mean(0) - before.mean(0), runs_error)
