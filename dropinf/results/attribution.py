"""Attribution: which training examples lower each query's loss most, and which raise it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dropinf.results import exports, showing
from dropinf.results.contents import Contents, Lookup
from dropinf.results.facts import Facts, facts_of
from dropinf.rows import RowStore, listed
from dropinf.scoring import ensemble, topk
from dropinf.solvers import Solver
from dropinf.text_table import Table
from dropinf.whole_files import appearing

One = TypeVar("One")
_NOWHERE = torch.iinfo(torch.int64).max  # an invalid query's index, as topk has it


@dataclass(frozen=True)
class Ranked:
    """k training examples of each of m queries, the most extreme first; on the CPU.

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


@dataclass(frozen=True, repr=False)
class Attribution:
    """What `attribute` returns.

        found = dropinf.attribute(asked, store, solver, k=5)
        found.top.ids[0]  # of the first query
        dropinf.write_report("report.html", found)

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

    def describe(self, texts: Contents | None = None) -> Table:
        """Both ends of the first queries as a table, and how they were made.

        `texts` of the training examples, see `show`.
        """
        return showing.table_of(self, texts)

    def __str__(self) -> str:
        return str(self.describe())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.describe()._repr_html_()

    def show(
        self,
        texts: Contents | None = None,
        query_texts: Contents | None = None,
        images: Contents | None = None,
        query_images: Contents | None = None,
        queries: int | None = 5,
    ) -> Any:
        """Print the examples of each query; with images, a figure of matplotlib (extra "report").

        Args:
            texts, images: of the training examples: a mapping by id, a function of the id, or a
                sequence in which ids are positions. Images are arrays, tensors or images of PIL,
                [H, W], [H, W, C] or [C, H, W]; colours that are not from 0 to 1 are scaled to it.
            query_texts, query_images: of the queries.
            queries: how many to show, the first ones; None shows all.

        Returns:
            The figure, which a notebook shows, or None.

        Raises:
            ValueError: there is nothing for an id, or `queries` is no number of them.
        """
        if queries is not None and (not isinstance(queries, Integral) or queries < 0):
            raise ValueError(
                f"show: queries must be a number of them, or None for all, got {queries!r}"
            )
        few = len(self) if queries is None else min(queries, len(self))
        if images is None and query_images is not None:
            raise ValueError("show: query_images go with images=, of the training examples")
        if images is None or texts is not None or query_texts is not None:
            asked = Lookup(query_texts, "query_texts")
            print(showing.as_text(self, Lookup(texts, "texts"), asked, few))
        if images is None:
            return None
        own = Lookup(query_images, "query_images")
        return showing.picture(self, Lookup(images, "images"), own, few)

    def to_pandas(self) -> Any:
        """A pandas.DataFrame (extra "report"), a row for each query, side and rank.

        Columns: query, side ("top" or "bottom"), rank (from 1), example (its id), position (in the
        store), score, and error with several masks. An invalid query has no examples or scores.
        How they were made is in `attrs`.
        """
        return exports.to_pandas(self)

    def to_arrow(self) -> Any:
        """A pyarrow.Table of the columns of `to_pandas` (extra "arrow").

        How they were made is in its metadata, as JSON under "dropinf".
        """
        return exports.to_arrow(self)

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write the columns of `to_pandas`; an existing file is replaced at once or not."""
        exports.to_csv(self, path)

    def to_html(self, path: str | os.PathLike | None = None, texts: Contents | None = None) -> str:
        """The table of all queries as a page, written to `path` if that is given.

        For one with search, pictures and more see `dropinf.write_report`.
        """
        body = showing.table_of(self, texts, most=None)._repr_html_()
        page = (
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>dropinf</title>\n'
            f"<body>\n{body}\n</body>\n</html>\n"
        )
        if path is not None:
            with appearing(Path(path), replace=True) as new:
                new.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
        return page


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
        TypeError: one of them is something else.
        ValueError: as in `scores` and `ensemble`; k is not positive; or the rows of one mask are of
            other examples than the first's, or in another order.
    """
    parts = list(zip(_several(queries), _several(store), _several(solver), strict=False))
    lengths = [len(_several(given)) for given in (queries, store, solver)]
    if not parts or len(set(lengths)) > 1:
        raise ValueError(
            "attribute: give one queries, store and solver, or as many of each; got "
            "{}, {} and {}".format(*lengths)
        )
    for name, given, kind in (
        *(("queries", queries, RowStore), ("store", store, RowStore)),
        ("solver", solver, Solver),
    ):
        wrong = [one for one in _several(given) if not isinstance(one, kind)]
        if wrong:
            raise TypeError(
                f"attribute: {name} must be a {kind.__name__}, or several in a list, got "
                f"{type(wrong[0]).__name__}"
            )
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"attribute: k must be positive, got {k!r}")
    if any(len(known) and not known.valid.any() for _, known, _ in parts):
        raise ValueError(
            "attribute: no row of a store is valid; look for losses that are not finite"
        )
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
    top, bottom = (_ranked(known, *end) for end in ends)
    return Attribution(
        top,
        bottom,
        listed(asked.ids),
        facts_of(parts, relative),
    )


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


def _ranked(store: RowStore, scores: Tensor, errors: Tensor | None, indices: Tensor) -> Ranked:
    indices = indices.cpu()
    errors = None if errors is None else errors.cpu()
    return Ranked(scores.cpu(), errors, indices, _ids_at(store, indices))


def _ids_at(store: RowStore, indices: Tensor) -> list[list[Any]]:
    own = store.ids
    if isinstance(own, Tensor):
        known = indices != _NOWHERE
        found = own[indices.where(known, 0)].tolist()
        return [
            [i if there else None for i, there in zip(*both, strict=True)]
            for both in zip(found, known.tolist(), strict=True)
        ]
    return [[None if i == _NOWHERE else own[i] for i in row] for row in indices.tolist()]
