"""Files of examples: JSONL, CSV and Parquet, with named columns."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class DataFile:
    """The examples of a file.

    Attributes:
        path: of the file.
        rows: a mapping of columns for each example.
        lines: where each begins, from 1.
        unit: what `lines` count.
    """

    path: Path
    rows: list[dict[str, Any]]
    lines: list[int]
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Of the first example."""
        return list(self.rows[0])

    def where(self, position: int) -> str:
        """For people: "train.jsonl, line 3"."""
        return f"{self.path}, {self.unit} {self.lines[position]}"

    def column(self, name: str, key: str, kind: type | tuple[type, ...], wanted: str) -> list[Any]:
        """The values of a column.

        Args:
            name: of the column.
            key: of the job that names it, for the error.
            kind, wanted: the type of the values, and as people call it.

        Raises:
            ValueError: the column is missing, or a value has another type.
        """
        flags = bool in (kind if isinstance(kind, tuple) else (kind,))
        values = []
        for position, row in enumerate(self.rows):
            if name not in row:
                raise ValueError(
                    f"{self.where(position)} has no column {name!r} ([data] {key}); it has "
                    f"{', '.join(map(repr, row))}"
                )
            value = row[name]
            if not isinstance(value, kind) or (isinstance(value, bool) and not flags):
                raise ValueError(
                    f"{self.where(position)}: column {name!r} must be {wanted}, got {_short(value)}"
                )
            values.append(value)
        return values


def read_data(path: str | os.PathLike) -> DataFile:
    """The examples of a file, by the ending of its name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another ending, holds no example, or cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no data file {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a directory, where a JSONL, CSV or Parquet file is needed")
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(
            f"{path}: data must be a file of {', '.join(_READERS)}, not {path.suffix or 'no'!r}"
        )
    try:
        found = read(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    if not found.rows:
        raise ValueError(f"{path} holds no example")
    return found


def ids_of_column(data: DataFile, name: str) -> list[int] | list[str]:
    """The ids in a column, all whole numbers or all strings, each once.

    Raises:
        ValueError: they are not.
    """
    values = data.column(name, "id", (int, str), "a whole number or a string")
    if all(isinstance(value, str) and _is_number(value) for value in values):
        values = [int(value) for value in values]  # of a CSV file
    kinds = [isinstance(value, str) for value in values]
    if any(kinds) and not all(kinds):
        other = kinds.index(not kinds[0])
        raise ValueError(
            f"{data.where(other)}: ids must be all whole numbers or all strings, got "
            f"{values[other]!r} after {values[0]!r}"
        )
    seen: dict[Any, int] = {}
    for position, value in enumerate(values):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{data.where(position)}: id {value} has more than 64 bits")
        if value in seen:
            raise ValueError(
                f"{data.where(position)}: id {value!r} is that of line {data.lines[seen[value]]} "
                "too; ids must differ"
            )
        seen[value] = position
    return values


def _is_number(text: str) -> bool:
    """Whether it is how int writes it, so that nothing is lost."""
    try:
        return str(int(text)) == text
    except ValueError:
        return False


def _jsonl(path: Path) -> DataFile:
    rows, lines = [], []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON: {str(error) or type(error).__name__}"
                ) from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number} must be a JSON object of columns, got {_short(row)}; "
                    "an array is written as an object a line"
                )
            rows.append(row)
            lines.append(number)
    return DataFile(path, rows, lines)


def _csv(path: Path) -> DataFile:
    rows, lines = [], []
    limit = csv.field_size_limit(1 << 30)  # of 128 kB, which texts are longer than
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for number, header, fields in _records(path, reader):
                if len(fields) != len(header):
                    raise ValueError(
                        f"{path}, line {number} has {len(fields)} fields where the header has "
                        f"{len(header)}"
                    )
                rows.append(dict(zip(header, fields, strict=True)))
                lines.append(number)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return DataFile(path, rows, lines)


def _records(path: Path, reader: Any) -> Iterator[tuple[int, list[str], list[str]]]:
    """(first line, header, fields) of each record that is not blank."""
    header: list[str] | None = None
    before = 0
    for fields in reader:
        number, before = before + 1, reader.line_num
        if header is None:
            header = fields
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                raise ValueError(f"{path} has two columns {twice[0]!r}")
        elif fields:
            yield number, header, fields


def _parquet(path: Path) -> DataFile:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet needs pyarrow: pip install 'dropinf[arrow]'") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {_first_line(error)}") from None
    return DataFile(path, rows, list(range(1, len(rows) + 1)), "row")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


_READERS: dict[str, Callable[[Path], DataFile]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
