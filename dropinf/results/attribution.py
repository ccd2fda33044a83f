"""Attribution: which training examples lower each query's loss most, and which raise it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from dropinf.results.facts import Facts, facts_of
from dropinf.rows import RowStore
from dropinf.scoring import ensemble, topk
from dropinf.solvers import Solver

One = TypeVar("One")
_NOWHERE = torch.iinfo(torch.int64).max  # an invalid query's index, as topk has it


@dataclass(frozen=True)
class Ranked:
    """k training examples of each of m queries, the most extreme first.

    Attributes:
        scores: [m, k], NaN for an invalid query.
        errors: [m, k] standard errors over masks; None with one mask.
        indices: [m, k] int64, positions in the store; 2^63 - 1 for an invalid query.
        ids: m lists of k, integers or strings, None for an invalid query.
    """

    scores: Tensor
    errors: Tensor | None
    indices: Tensor
    ids: list[list[Any]]


@dataclass(frozen=True)
class Attribution:
    """What `attribute` returns.

    Attributes:
        top: the examples of largest score, which lower the query's loss most; the largest first.
        bottom: those of smallest score, which raise it most or lower it least; the smallest first.
        query_ids: of the m queries, integers or strings.
        facts: how the scores were made.
    """

    top: Ranked
    bottom: Ranked
    query_ids: list[Any]
    facts: Facts

    def __len__(self) -> int:
        return len(self.query_ids)


def attribute(
    queries: RowStore | Sequence[RowStore],
    store: RowStore | Sequence[RowStore],
    solver: Solver | Sequence[Solver],
    k: int = 10,
    *,
    relative: bool = False,
    weights: str = "same",
) -> Attribution:
    """The training examples that lower each query's loss most, and those that raise it.

        found = dropinf.attribute(asked, store, solver, k=5)
        print(found)
        found.to_csv("influence.csv")

    Args:
        queries, store, solver: as in `scores`; or as many of each as there are masks or
            checkpoints, over which scores are averaged, with standard errors. Those form [m, n],
            one mask alone does not.
        k: examples at each end; fewer if the store has fewer valid rows.
        relative, weights: as in `scores`.

    Raises:
        ValueError: as in `scores` and `ensemble`; or k is not positive.
    """
    parts = list(zip(_several(queries), _several(store), _several(solver), strict=False))
    lengths = [len(_several(given)) for given in (queries, store, solver)]
    if not parts or len(set(lengths)) > 1:
        raise ValueError(
            "attribute: give one queries, store and solver, or as many of each; got "
            "{}, {} and {}".format(*lengths)
        )
    if k < 1:
        raise ValueError(f"attribute: k must be positive, got {k}")
    asked, known, fitted = parts[0]
    if len(parts) == 1:
        most = min(k, int(known.valid.sum()))
        ends = [
            (values, None, at)
            for values, at in (
                topk(
                    asked, known, fitted, most, relative=relative, weights=weights, largest=largest
                )
                for largest in (True, False)
            )
        ]
    else:
        mean, error = ensemble(parts, relative=relative, weights=weights)
        ends = [_extreme(mean, error, k, largest) for largest in (True, False)]
    top, bottom = (Ranked(*end, _ids_at(known, end[2])) for end in ends)
    return Attribution(top, bottom, _listed(asked.ids), facts_of(parts, relative))


def _several(given: One | Sequence[One]) -> list[One]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _extreme(mean: Tensor, error: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The k most extreme of scores [m, n], their errors and positions; NaN is never among them."""
    known = ~mean.isnan()
    valid = known.any(1)  # of queries; a training row is invalid for all of them
    k = min(k, int(known.any(0).sum()))
    off = -torch.inf if largest else torch.inf
    order = mean.where(known, off).argsort(dim=1, descending=largest, stable=True)[:, :k]
    values, errors = mean.gather(1, order), error.gather(1, order)
    order[~valid] = _NOWHERE
    return values, errors, order


def _ids_at(store: RowStore, indices: Tensor) -> list[list[Any]]:
    own = _listed(store.ids)
    return [[None if i == _NOWHERE else own[i] for i in row] for row in indices.tolist()]


def _listed(ids: Tensor | list[str]) -> list[Any]:
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)
