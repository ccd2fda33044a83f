"""Do the examples of a query's own source come first?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from dropinf.evaluate.estimates import Estimate, mask_of, over_queries, scores_of


@dataclass(frozen=True)
class Recall:
    """What `recall` returns.

        found = dropinf.evaluate.recall(scores, (query_sources, sources), k=10)
        print(found.share, "by chance", found.chance)

    Attributes:
        share: of the k of largest score, how many are relevant.
        recall: of the relevant examples, how many are among the k of largest score.
        reciprocal_rank: 1 / the rank of the first relevant one; its mean is known as MRR.
        chance: `share` of a random order.
    """

    share: Estimate
    recall: Estimate
    reciprocal_rank: Estimate
    chance: float


def recall(
    scores: Tensor, relevant: Tensor | tuple[Sequence[Any] | Tensor, Sequence[Any] | Tensor], k: int
) -> Recall:
    """How many of a query's k top examples are relevant to it, as of its own source.

    Where scores tie, as the zeros of BM25 do, each figure is its mean over all orders of those that
    tie, so that the order of the data set does not count.

        print(dropinf.evaluate.recall(scores, (query_sources, sources), k=10).share)

    Args:
        scores: [m, n]; queries that are NaN throughout are left out, examples that are have no
            place in the order.
        relevant: [m, n] bool, or the labels of the m queries and of the n examples, where equal
            ones are relevant. A query without a relevant example is left out.
        k: 1 to n, of the valid examples.

    Raises:
        ValueError: shapes do not agree, k is out of range, or no query has a relevant example.
    """
    found, valid, examples = scores_of("recall", scores)
    m, n = found.shape
    own = _relevant(relevant, m, n)[:, examples]
    found = found[:, examples]
    if not isinstance(k, Integral) or isinstance(k, bool) or not 1 <= k <= found.shape[1]:
        raise ValueError(
            f"recall: k must be 1 to {found.shape[1]}, the number of valid examples, got {k!r}"
        )
    asked = valid & own.any(1)
    hits = torch.full((m,), torch.nan, dtype=torch.float64)
    first = hits.clone()
    for q in asked.nonzero()[:, 0].tolist():
        hits[q], first[q] = _of_query(found[q], own[q], int(k))
    num = own.sum(1)
    return Recall(
        share=over_queries("recall", hits / k),
        recall=over_queries("recall", hits / num),
        reciprocal_rank=over_queries("recall", first),
        chance=float(num[asked].double().mean() / own.shape[1]),
    )


def _of_query(scores: Tensor, own: Tensor, k: int) -> tuple[float, float]:
    """The expected number of relevant ones among the first k, and expected 1 / rank of the first.

    Over all orders of those that tie.
    """
    threshold = scores.topk(k).values[-1]
    above, at = scores > threshold, scores == threshold
    places = k - int(above.sum())  # that are left to those at the threshold
    hits = int((own & above).sum()) + places * int((own & at).sum()) / int(at.sum())
    best = scores[own].max()
    ahead, tied = int((scores > best).sum()), scores == best
    size, num = int(tied.sum()), int((own & tied).sum())
    expected, none_yet = 0.0, 1.0  # that none of the places so far has a relevant one
    for place in range(size - num + 1):
        here = num / (size - place)
        expected += none_yet * here / (ahead + place + 1)
        none_yet *= 1 - here
    return hits, expected


def _relevant(relevant: Any, m: int, n: int) -> Tensor:
    """[m, n] bool."""
    if not isinstance(relevant, tuple):
        return mask_of("recall", "relevant", relevant, (m, n))
    try:
        of = [part.tolist() if isinstance(part, Tensor) else list(part) for part in relevant]
        labels = dict.fromkeys(itertools.chain(*of))
        numbers = {label: number for number, label in enumerate(labels)}
        sizes = [len(part) for part in of]
    except TypeError:
        sizes = []
    if sizes != [m, n]:
        raise ValueError(
            f"recall: relevant must be [{m}, {n}] torch.bool, or two lists, labels of {m} queries "
            f"and of {n} examples, got {sizes or 'something else'}"
        )
    queries, examples = (torch.tensor([numbers[label] for label in part]) for part in of)
    return queries[:, None] == examples
