"""Scores as a table of other tools: a row a training example, a column a query."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropinf.extras import optional
from dropinf.rows import RowStore, listed
from dropinf.whole_files import appearing

_AT_A_TIME = 1024  # rows of a CSV file, whose columns lie far from each other


class ScoreTable:
    """Scores beside the ids of the training examples: a row an example, a column a query.

        scores = dropinf.scores(asked, store, solver)
        table = dropinf.ScoreTable(scores, store, asked)
        table.to_csv("scores.csv")  # to_pandas; to_arrow, which copies no score
        data = table.add_to(data)  # columns of a datasets.Dataset, by the ids
        own = dropinf.ScoreTable(dropinf.self_influence(store, solver), store, "self_influence")

    A number that is not known (of an invalid row) is NaN, in CSV nothing. For the best and worst
    examples of each query alone see `attribute`, which has these forms too.

    Attributes:
        names: of the columns; of the ids of queries "score_0", "score_a".
        ids: of the n rows, integers or strings.
    """

    def __init__(
        self, scores: Tensor, store: RowStore, queries: RowStore | Sequence[str] | str
    ) -> None:
        """Of numbers that are there.

        Args:
            scores: [m, n] as `scores` gives them, or [n] as `self_influence` does.
            store: the n training rows.
            queries: the m query rows, whose ids name the columns; or m names.

        Raises:
            TypeError: scores are no tensor.
            ValueError: the shape or dtype is another one, or two columns have one name.
        """
        if not isinstance(scores, Tensor):
            raise TypeError(f"ScoreTable: scores must be a tensor, got {type(scores).__name__}")
        if scores.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"ScoreTable: scores must be float32 or float64, got {scores.dtype}")
        if isinstance(queries, RowStore):
            names = [f"score_{id_}" for id_ in listed(queries.ids)]
        else:
            names = [queries] if isinstance(queries, str) else list(map(str, queries))
        numbers = scores[None] if scores.dim() == 1 else scores
        if numbers.shape != (len(names), len(store)):
            raise ValueError(
                f"ScoreTable: scores must be [{len(names)}, {len(store)}], a row for each query "
                f"and a column for each training row, got {tuple(scores.shape)}"
            )
        twice = _first_twice(["id", *names])
        if twice is not None:
            raise ValueError(
                f"ScoreTable: two columns would be named {twice!r}; give names for queries=, as "
                "for rows of tokens, [f'{i}_{t}' for i, t in queries.origin.tolist()]"
            )
        self.names, self.ids = names, listed(store.ids)
        self._numbers = numbers.detach().cpu().contiguous().numpy()  # [m, n]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"ScoreTable({len(self):,} training examples, {len(self.names):,} columns)"

    def to_arrow(self) -> Any:
        """A pyarrow.Table (extra "arrow") of "id" and a column for each name.

        Columns are the memory of the scores, if these are on the CPU, so nobody may write to it.
        """
        pyarrow = optional("pyarrow", "arrow", "ScoreTable.to_arrow")
        number = pyarrow.from_numpy_dtype(self._numbers.dtype)
        columns = [
            pyarrow.Array.from_buffers(number, len(self), [None, pyarrow.py_buffer(column)])
            for column in self._numbers
        ]
        kind = pyarrow.string() if self._strings else pyarrow.int64()
        return pyarrow.table([pyarrow.array(self.ids, kind), *columns], names=["id", *self.names])

    def to_pandas(self) -> Any:
        """A pandas.DataFrame (extra "arrow") of the columns of `to_arrow`."""
        pandas = optional("pandas", "arrow", "ScoreTable.to_pandas")
        frame = pandas.DataFrame(self._numbers.T, columns=self.names)
        frame.insert(0, "id", pandas.Series(self.ids, dtype=None if self._strings else "int64"))
        return frame

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write the columns of `to_arrow`; an existing file is replaced at once or not.

        Numbers are the shortest decimals that read as the same ones.
        """
        with (
            appearing(Path(path), replace=True) as new,
            new.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["id", *self.names])
            writer.writerows(self._lines())

    def _lines(self) -> Iterator[list[Any]]:
        for start in range(0, len(self), _AT_A_TIME):
            some = self._numbers[:, start : start + _AT_A_TIME].T
            for id_, row in zip(self.ids[start : start + _AT_A_TIME], some, strict=True):
                yield [id_, *("" if np.isnan(value) else str(value) for value in row)]

    def add_to(self, data: Any, ids: str | None = None) -> Any:
        """A datasets.Dataset (extra "arrow") with these columns beside its own, by the ids.

        Args:
            data: a datasets.Dataset.
            ids: its column of the ids that the rows were collected with; None takes ids as
                positions in it, which they are of a DataLoader of it.

        Returns:
            The Dataset; an example without a row has NaN.

        Raises:
            TypeError: it is no Dataset.
            ValueError: an id is not in it, or is that of two examples or two rows; or it has a
                column of such a name already.
        """
        datasets = optional("datasets", "arrow", "ScoreTable.add_to")
        if not isinstance(data, datasets.Dataset):
            raise TypeError(
                f"ScoreTable.add_to: takes a datasets.Dataset, got {type(data).__name__}; of a "
                "stream, map a function that looks an example's id up in to_pandas()"
            )
        taken = [name for name in self.names if name in data.column_names]
        if taken:
            raise ValueError(
                f"ScoreTable.add_to: the data have a column {taken[0]!r} already; take it out with "
                "remove_columns, or give other names for queries="
            )
        at = self._places(_ids_in(data, ids), ids)
        for name, numbers in zip(self.names, self._numbers, strict=True):
            column = np.full(len(data), np.nan, dtype=numbers.dtype)
            column[at] = numbers
            data = data.add_column(name, column)
        return data

    def _places(self, there: list[Any], column: str | None) -> list[int]:
        """Where each row's example is among the ids that are there."""
        where = "its positions" if column is None else f"its column {column!r}"
        for what, ids in (("the data have", there), ("the table has", self.ids)):
            twice = _first_twice(ids)
            if twice is not None:
                raise ValueError(
                    f"ScoreTable.add_to: {what} two rows of id {twice!r}; of tokens, add scores up "
                    "to their examples' first"
                )
        positions = {id_: i for i, id_ in enumerate(there)}
        for id_ in self.ids:
            if id_ not in positions:
                raise ValueError(
                    f"ScoreTable.add_to: id {id_!r} is not among {where}; give ids=, the column "
                    "that has them"
                )
        return [positions[id_] for id_ in self.ids]

    @property
    def _strings(self) -> bool:
        return any(isinstance(id_, str) for id_ in self.ids)


def _ids_in(data: Any, column: str | None) -> list[Any]:
    if column is None:
        return list(range(len(data)))
    if column not in data.column_names:
        raise ValueError(
            f"ScoreTable.add_to: the data have no column {column!r}; they have "
            f"{', '.join(map(repr, data.column_names))}"
        )
    found = list(data.with_format(None)[column])
    others = [one for one in found if not isinstance(one, int | str | None)]
    if others:
        raise ValueError(
            f"ScoreTable.add_to: column {column!r} has no integers or strings, which ids are, but "
            f"{type(others[0]).__name__}"
        )
    return found


def _first_twice(ids: Sequence[Any]) -> Any:
    seen = set()
    for id_ in ids:
        if id_ in seen:
            return id_
        seen.add(id_)
    return None
