"""Numbers with an id for each row, written as CSV, Parquet, Arrow or npy, some rows at a time."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dropinf.extras import optional
from dropinf.rows import RowStore, listed
from dropinf.whole_files import appearing


@dataclass
class Matrix:
    """Rows of numbers.

    Attributes:
        name: of the numbers: "row", "scores".
        ids: of the rows.
        columns: what each number of a row is called in CSV.
        pieces: -> the rows in order, [c, w] each.
        dtype: of the numbers.
    """

    name: str
    ids: Sequence[Any]
    columns: Sequence[Any]
    pieces: Callable[[], Iterator[np.ndarray]]
    dtype: np.dtype

    @classmethod
    def of(cls, name: str, ids: Any, columns: Sequence[Any], values: Tensor) -> Matrix:
        """Of a matrix that is there."""
        numbers = values.detach().cpu().numpy()
        return cls(name, listed(ids), columns, lambda: iter([numbers]), numbers.dtype)

    @classmethod
    def of_store(cls, store: RowStore) -> Matrix:
        """The rows of a store; those that are invalid are zeros."""

        def pieces() -> Iterator[np.ndarray]:
            for _, rows in store.chunks():
                yield rows.numpy()

        columns = [f"entry_{j}" for j in range(store.plan.width)]
        dtype = np.dtype(str(store.read_dtype).removeprefix("torch."))
        return cls("row", listed(store.ids), columns, pieces, dtype)

    def write(self, path: Path) -> None:
        """By the ending of the name; an existing file is replaced at once or not.

        Raises:
            ValueError: the ending is another one.
            ImportError: Parquet and Arrow need pyarrow.
        """
        write = _WRITERS[ending_of(path)]
        with appearing(path, replace=True) as new:
            write(self, new)


def ending_of(path: Path, known: Sequence[str] = (".csv", ".parquet", ".arrow", ".npy")) -> str:
    """Of a file to write.

    Raises:
        ValueError: it is not known.
        IsADirectoryError, FileNotFoundError: as of `refuse_no_file`.
        ImportError: Parquet and Arrow need pyarrow.
    """
    ending = path.suffix.lower()
    if ending not in known:
        raise ValueError(f"--to must be a file of {', '.join(known)}, got {str(path)!r}")
    refuse_no_file(path)
    if ending in (".parquet", ".arrow"):  # known before anything is computed
        optional("pyarrow", "arrow", f"a {ending} file")
    return ending


def refuse_no_file(path: Path) -> None:
    """Refuse what no file can be written to, before anything is computed.

    Raises:
        IsADirectoryError: it is a directory.
        FileNotFoundError: its directory is not there.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file with --to")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"there is no directory {path.parent} to write in; make it, or name another file with "
            "--to"
        )


def write_table(table: Any, path: Path) -> None:
    """A pyarrow.Table as Parquet or Arrow."""
    parquet = ending_of(path) == ".parquet"
    with appearing(path, replace=True) as new:
        if parquet:
            optional("pyarrow.parquet", "arrow", "a Parquet file").write_table(table, new)
            return
        pyarrow = optional("pyarrow", "arrow", "an Arrow file")
        with pyarrow.OSFile(str(new), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as to:
            to.write_table(table)


def _npy(matrix: Matrix, path: Path) -> None:
    """The numbers alone, [n, w], or [n] of one each."""
    shape = (len(matrix.ids), len(matrix.columns))
    header = {
        "descr": np.lib.format.dtype_to_descr(matrix.dtype),
        "fortran_order": False,
        "shape": shape[:1] if shape[1] == 1 else shape,
    }
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in matrix.pieces():
            file.write(np.ascontiguousarray(piece).data)


def _csv(matrix: Matrix, path: Path) -> None:
    ids = iter(matrix.ids)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *matrix.columns])
        for piece in matrix.pieces():
            for row in piece:
                writer.writerow([next(ids), *map(_short, row)])


def _short(value: Any) -> str:
    """The shortest decimal that reads as the same number; nothing for NaN."""
    return "" if np.isnan(value) else str(value)


def _arrow_batches(matrix: Matrix) -> tuple[Any, Any, Iterator[Any]]:
    """pyarrow, the schema, and record batches of it."""
    pyarrow = optional("pyarrow", "arrow", "this kind of file")
    width = len(matrix.columns)
    number = pyarrow.from_numpy_dtype(matrix.dtype)
    strings = any(isinstance(id_, str) for id_ in matrix.ids)
    kinds = [
        ("id", pyarrow.string() if strings else pyarrow.int64()),
        (matrix.name, number if width == 1 else pyarrow.list_(number, width)),
    ]
    schema = pyarrow.schema(kinds)

    def batches() -> Iterator[Any]:
        start = 0
        for piece in matrix.pieces():
            own = pyarrow.array(matrix.ids[start : start + len(piece)], kinds[0][1])
            start += len(piece)
            flat = pyarrow.array(np.ascontiguousarray(piece).reshape(-1), number)
            if width != 1:
                flat = pyarrow.FixedSizeListArray.from_arrays(flat, width)
            yield pyarrow.record_batch([own, flat], schema=schema)

    return pyarrow, schema, batches()


def _parquet(matrix: Matrix, path: Path) -> None:
    _, schema, batches = _arrow_batches(matrix)
    parquet = optional("pyarrow.parquet", "arrow", "a Parquet file")
    with parquet.ParquetWriter(path, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _arrow(matrix: Matrix, path: Path) -> None:
    pyarrow, schema, batches = _arrow_batches(matrix)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


_WRITERS: dict[str, Callable[[Matrix, Path], None]] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".npy": _npy,
}
