"""A part of a store: the rows that one process wrote, in memory or in a directory."""

from __future__ import annotations

import contextlib
import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dropinf.compression import Plan
from dropinf.manifest import read_regular
from dropinf.rows.ids import Ids, decoded
from dropinf.rows.journal import Extent, Header
from dropinf.rows.packing import DTYPES, Packing, finite_rows
from dropinf.rows.part_files import (
    IDS_FILES,
    REMEDY,
    bytes_of,
    bytes_per_row,
    new_header,
    read_part,
    rows_per_chunk,
)

T = TypeVar("T")

_MOST_BYTES = 1 << 40  # of ids or origin


class Marks(NamedTuple):
    """What tells the rows of a part from others that may be at its path later."""

    rows: int
    whole: tuple[int, ...]  # checksums of its whole chunks
    last: int | None  # of its last chunk, if that is known
    grows: bool

    def are_of(self, header: Header, extent: Extent) -> bool:
        """Whether they can be those of this part, which may have grown."""
        if self.rows // header.chunk_rows != len(self.whole):
            return False
        if tuple(extent.chunks[: len(self.whole)]) != self.whole:
            return False
        if extent.rows != self.rows:
            return self.grows and extent.rows > self.rows
        return self.last is None or extent.chunks[-1] == self.last


class Part:
    """Rows [n, R] that follow each other.

    Attributes:
        path: the directory, None in memory.
        header, extent: see `journal`; of a part in memory without checksums.
        packed: the rows as they are kept (see `packing`), not verified.
        packing: how; of a directory None until `lay_out`.
        valid: [n] bool.
        finished: whether no more rows come.
    """

    def __init__(
        self,
        packed: Tensor,
        packing: Packing,
        valid: Tensor | None = None,
        ids: Ids | None = None,
        origin: Tensor | None = None,
    ) -> None:
        """A part in memory."""
        self.path: Path | None = None
        self.packed, self.packing, self.finished = packed, packing, True
        self.valid = torch.ones(len(packed), dtype=torch.bool) if valid is None else valid
        self._ids, self._origin = ids, origin
        self.header = new_header(packing, ids, origin)
        self.extent = Extent(rows=len(packed), examples=len(packed))
        self._all = packed
        self._unverified: set[int] = set()  # numbers of chunks

    @classmethod
    def open(cls, path: Path, width: int, marks: Marks | None = None) -> Part:
        """A directory; a part that is still being written, as far as it is flushed.

        Args:
            path: the directory.
            width: R.
            marks: of a part that it was before, to be opened as far as that went.

        Raises:
            ValueError: it is damaged, or has other rows than its marks.
        """
        finished, found = read_part(path)
        header, extent = found.header, found.extent
        if header.width != width:
            raise ValueError(f"RowStore: {path} holds rows of width {header.width}, not {width}")
        if marks is not None and not marks.are_of(header, extent):
            raise ValueError(
                f"RowStore: {path} has other rows than when the store was pickled; pickle it again"
            )
        n = extent.rows if marks is None else marks.rows
        file, wanted = path / "rows.bin", extent.rows * bytes_per_row(header)
        there = _size(file)
        if there < wanted or (finished and there > wanted):
            raise ValueError(
                f"RowStore: {file} is truncated or damaged: {there} bytes instead of {wanted}; "
                f"{REMEDY}"
            )
        part = cls.__new__(cls)
        part.path, part.header, part.extent, part.finished = path, header, extent, finished
        if wanted:
            # Copy on write: torch warns about tensors on read-only memory.
            with file.open("rb") as opened:
                part._identity = _identity(opened.fileno())
                mapped = np.memmap(opened, np.uint8, "c", shape=(wanted,))
            part._all = torch.from_numpy(mapped)
        else:
            part._all = torch.empty(0, dtype=torch.uint8)
        part._all = part._all.view(-1, bytes_per_row(header))
        if not header.scales:
            part._all = part._all.view(DTYPES[header.dtype])
        part.packed, part.packing = part._all[:n], None
        part.valid = torch.ones(extent.rows, dtype=torch.bool)
        part.valid[extent.invalid] = False
        part.valid = part.valid[:n]
        part._ids = part._origin = None
        part._unverified = set(range(len(extent.chunks)))
        return part

    def lay_out(self, bounds: Sequence[int]) -> Part:
        """Know the column bounds of the layers.

        Raises:
            ValueError: the part does not have a scale for each.
        """
        self.packing = Packing(DTYPES[self.header.dtype], tuple(bounds))
        if self.packing.num_scales != self.header.scales:
            raise ValueError(
                f"RowStore: {self.path} has {self.header.scales} scales a row, for "
                f"{len(bounds) - 1} layers; {REMEDY}"
            )
        return self

    def __len__(self) -> int:
        return len(self.packed)

    def __reduce__(self) -> Any:
        if self.path is None:
            return restored, (Part, self.__dict__)
        return _reopened, (self.path.absolute(), self.marks, self.packing.bounds)

    @property
    def marks(self) -> Marks:
        """What tells its rows from others, as far as they go by now."""
        n, chunks = len(self), self.extent.chunks
        all_there = n == self.extent.rows
        last = chunks[-1] if chunks and all_there else None
        whole = tuple(chunks[: n // self.header.chunk_rows])
        return Marks(n, whole, last, not (all_there and self.finished))

    @property
    def ids(self) -> Ids | None:
        """Of each row, None if its position is all that is known.

        Raises:
            ValueError: they are damaged.
        """
        if self._ids is None and self.header.ids:
            data = self._read(
                IDS_FILES[self.header.ids], self.extent.ids_bytes, self.extent.ids_crc32
            )
            try:
                self._ids = decoded(data, self.header.ids, self.extent.rows)[: len(self)]
            except ValueError as error:
                raise ValueError(f"RowStore: the ids in {self.path} are damaged: {error}") from None
        return self._ids

    @property
    def origin(self) -> Tensor | None:
        """[n, 2] int64, or None.

        Raises:
            ValueError: it is damaged.
        """
        if self._origin is None and self.header.origin:
            data = self._read("origin.bin", 16 * self.extent.rows, self.extent.origin_crc32)
            numbers = np.frombuffer(data, "<i8").astype(np.int64)
            self._origin = torch.from_numpy(numbers).view(-1, 2)[: len(self)]
        return self._origin

    def _read(self, name: str, num_bytes: int, crc32: int) -> bytes:
        file = self.path / name
        try:
            data = read_regular(file, _MOST_BYTES)
        except (FileNotFoundError, ValueError) as error:
            why = "it is missing" if isinstance(error, FileNotFoundError) else error
            raise ValueError(f"RowStore: {file} is damaged: {why}; {REMEDY}") from None
        whole = len(data) == num_bytes or (len(data) > num_bytes and not self.finished)
        if not whole or zlib.crc32(data[:num_bytes]) != crc32:
            raise ValueError(f"RowStore: {file} is damaged; {REMEDY}")
        return data[:num_bytes]

    def chunks(self, count: int = 1) -> Iterator[tuple[int, Tensor]]:
        """The rows in order as they are kept, as (position of the first, [c, ...]), verified.

        Args:
            count: chunks at a time.

        Raises:
            ValueError: a chunk on disk does not have its checksum.
        """
        step = self.chunk_rows
        for start in range(0, len(self), count * step):
            yield start, self.chunk(start // step, count)

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk."""
        if self.path is not None:
            return self.header.chunk_rows
        on_gpu = self.packed.device.type != "cpu"
        return rows_per_chunk(self.header.width, DTYPES[self.header.dtype], on_gpu)

    def chunk(self, number: int, count: int = 1) -> Tensor:
        """One of them, or so many from there on."""
        step = self.chunk_rows
        start, stop = number * step, min((number + count) * step, len(self))
        if self.path is None:
            return self.packed[start:stop]
        whole = self._mapped(start, min((number + count) * step, len(self._all)))
        for k, chunk in enumerate(whole.split(step), number):
            if k in self._unverified and zlib.crc32(bytes_of(chunk)) != self.extent.chunks[k]:
                raise ValueError(
                    f"RowStore: {self.path}/rows.bin is damaged in rows {k * step} to "
                    f"{k * step + len(chunk) - 1}; {REMEDY}"
                )
            self._unverified.discard(k)
        return whole[: stop - start]

    def at(self, positions: Tensor) -> Tensor:
        """[k, ...] the rows at these positions as they are kept, verified; a copy."""
        if self.path is None:
            return self.packed[positions]
        for number in (positions // self.chunk_rows).unique().tolist():
            if number in self._unverified:
                self.chunk(number)
        found = self._all.new_empty(len(positions), self._all.shape[1])
        if len(positions):
            row_bytes = bytes_per_row(self.header)
            with self._opened() as file:
                for row, position in zip(
                    found.view(torch.uint8).numpy(), positions.tolist(), strict=True
                ):
                    file.seek(position * row_bytes)
                    if file.readinto(row) != row_bytes:
                        raise ValueError("it is shorter than it was")
        return found

    def _mapped(self, start: int, stop: int) -> Tensor:
        """Rows by a map of their own: what was read of it leaves the memory together with it."""
        row_bytes = bytes_per_row(self.header)
        first, last = start * row_bytes, stop * row_bytes
        skipped = first % mmap.ALLOCATIONGRANULARITY
        size, offset = last - first + skipped, first - skipped
        with self._opened() as file:
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=offset)
        rows = torch.frombuffer(mapped, dtype=torch.uint8, offset=skipped)
        return rows.view(self._all.dtype).view(stop - start, -1)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[FileIO]:
        """The file of the rows, as long as it is the one that was there."""
        try:
            with (self.path / "rows.bin").open("rb", buffering=0) as file:
                if _identity(file.fileno()) != self._identity:
                    raise ValueError("another file is there by now")
                yield file
        except (OSError, ValueError) as error:  # it is gone, another, or shorter than it was
            raise ValueError(
                f"RowStore: {self.path}/rows.bin cannot be read any more ({error}); load the store "
                "again"
            ) from None


def checked_part(
    op: str,
    plan: Plan,
    rows: Tensor,
    valid: Any,
    origin: Any,
    ids: Ids | None,
    dtype: torch.dtype | None = None,
) -> Part:
    """A part in memory of what somebody gave, kept in `dtype` (None is the rows' own).

    Raises:
        ValueError: it does not fit the plan or itself, or a valid row is not finite.
    """
    if rows.dim() != 2 or rows.shape[1] != plan.width or not rows.is_floating_point():
        raise ValueError(
            f"{op}: rows must be floating point [n, {plan.width}] under this plan, "
            f"got {rows.dtype} {tuple(rows.shape)}"
        )
    rows, n = rows.detach(), len(rows)
    if ids is not None and len(ids) != n:
        raise ValueError(f"{op}: ids must have one for each of {n} rows")
    if valid is not None:
        valid = torch.as_tensor(valid).cpu()
        if valid.dtype != torch.bool or valid.shape != (n,):
            raise ValueError(f"{op}: valid must be [n={n}] bool, got {_described(valid)}")
    if origin is not None:
        origin = torch.as_tensor(origin).cpu()
        if origin.dtype not in (torch.int64, torch.int32) or origin.shape != (n, 2):
            raise ValueError(f"{op}: origin must be [n={n}, 2] integers, got {_described(origin)}")
        origin = origin.long()
    packing = Packing.of(plan, rows.dtype if dtype is None else dtype)
    step = rows_per_chunk(plan.width, rows.dtype)
    for start in range(0, len(rows), step):
        finite = finite_rows(rows[start : start + step])
        bad = ~finite if valid is None else ~finite & valid[start : start + step].to(finite.device)
        if bad.any():
            raise ValueError(f"{op}: row {start + int(bad.nonzero()[0])} is not finite")
    if valid is not None and rows.dtype != packing.dtype:
        rows = rows.where(valid.to(rows.device)[:, None], 0)  # an invalid one may hold anything
    return Part(packing.pack(rows), packing, valid, ids, origin)


def _described(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)}"


def _reopened(path: Path, marks: Marks, bounds: Sequence[int]) -> Part:
    return Part.open(path, bounds[-1], marks).lay_out(bounds)


def restored(kind: type[T], fields: dict[str, Any]) -> T:
    """An object as it was pickled."""
    made = kind.__new__(kind)
    made.__dict__.update(fields)
    return made


def _identity(descriptor: int) -> tuple[int, int]:
    """Tells a file that is mapped from one that took its place."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def _size(file: Path) -> int:
    """Bytes of a regular file, else 0."""
    return file.stat().st_size if file.is_file() else 0
