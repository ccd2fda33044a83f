"""Attributions as tables of other tools: one row for each query, side and rank."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropinf.extras import optional
from dropinf.whole_files import appearing

if TYPE_CHECKING:
    from dropinf.results.attribution import Attribution


def columns_of(found: Attribution) -> dict[str, list[Any]]:
    """Column -> values; an invalid query has its k rows, without example or score."""
    names = ["query", "side", "rank", "example", "position", "score"]
    if found.top.errors is not None:
        names.append("error")
    rows = list(zip(*_rows(found), strict=True)) or [()] * 7
    return {name: list(values) for name, values in zip(names, rows, strict=False)}


def _rows(found: Attribution) -> Iterator[tuple[Any, ...]]:
    for q, query in enumerate(found.query_ids):
        for side, ranked in (("top", found.top), ("bottom", found.bottom)):
            scores, positions = ranked.scores[q].tolist(), ranked.indices[q].tolist()
            errors = [None] * len(scores) if ranked.errors is None else ranked.errors[q].tolist()
            for j, (example, score) in enumerate(zip(ranked.ids[q], scores, strict=True)):
                known = example is not None
                position = positions[j] if known else None
                yield (
                    *(query, side, j + 1, example, position),
                    *(_number(score), _number(errors[j])),
                )


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _facts(found: Attribution) -> dict[str, str]:
    return {"unit": found.facts.unit, **dict(found.facts.rows())}


def to_pandas(found: Attribution) -> Any:
    pandas = optional("pandas", "report", "to_pandas")
    columns = columns_of(found)
    whole = dict.fromkeys(("query", "rank", "example", "position"), "Int64")
    made = {
        name: pandas.array(values, dtype=whole[name])
        if name in whole and not any(isinstance(v, str) for v in values)
        else values
        for name, values in columns.items()
    }
    frame = pandas.DataFrame(made)
    frame.attrs.update(_facts(found))
    return frame


def to_arrow(found: Attribution) -> Any:
    pyarrow = optional("pyarrow", "arrow", "to_arrow")
    columns = columns_of(found)
    types = {"score": pyarrow.float64(), "error": pyarrow.float64(), "side": pyarrow.string()}
    for name in ("query", "rank", "example", "position"):
        strings = any(isinstance(value, str) for value in columns[name])
        types[name] = pyarrow.string() if strings else pyarrow.int64()
    return pyarrow.table(
        {k: pyarrow.array(v, types[k]) for k, v in columns.items()},
        metadata={"dropinf": json.dumps(_facts(found))},
    )


def to_csv(found: Attribution, path: str | os.PathLike) -> None:
    columns = columns_of(found)
    with (
        appearing(Path(path), replace=True) as new,
        new.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
