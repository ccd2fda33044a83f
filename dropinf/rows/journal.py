"""journal.jsonl of a part: one line a flush, appended when what it tells of is on the disk.

Each line is sealed. The first says what the part holds; the others how far it goes: the rows, and
the checksum of each chunk that grew, so that a line is as short in the end as in the beginning. A
torn last line is that of a writer that died, and counts for nothing.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from dropinf.manifest import field as checked
from dropinf.manifest import integers, read_regular, sealed, unsealed
from dropinf.whole_files import appearing

_MOST_BYTES = 1 << 28
_MOST_LINES = 1024  # of one length; then they become one
_FEW_LINES = 64  # that a finished part may have: to make them one is to wait for the disk twice
_LARGEST = 1 << 62
ID_KINDS = ("", "integers", "strings")  # "": rows are known by their positions


@dataclass(frozen=True)
class Header:
    """What the rows of a part are; the first line.

    Attributes:
        dtype: of the rows, a name of torch's.
        width: R.
        chunk_rows: rows under one checksum.
        ids: one of `ID_KINDS`.
        origin: whether origin.bin has two integers for each row.
        scales: of a row, see `packing`.
        rank: which wrote it, of several; -1 of a process that was alone.
        batch: number of its first batch among those of all ranks; -1 if that is not known.
    """

    dtype: str
    width: int
    chunk_rows: int
    ids: str
    origin: bool
    scales: int = 0
    rank: int = -1
    batch: int = 0

    @classmethod
    def load(cls, line: dict[str, Any]) -> Header:
        """From the first line.

        Raises:
            ValueError: it is not one.
        """
        header = cls(
            checked(line, "dtype", str),
            checked(line, "width", int, 1, _LARGEST),
            checked(line, "chunk_rows", int, 1, _LARGEST),
            checked(line, "ids", str),
            checked(line, "origin", bool),
            checked({"scales": 0, **line}, "scales", int, 0, _LARGEST),  # of before: none
            checked({"rank": -1, **line}, "rank", int, -1, _LARGEST),
            checked({"batch": 0, **line}, "batch", int, -1, _LARGEST),
        )
        if header.ids not in ID_KINDS:
            raise ValueError(f"'ids' must be one of {ID_KINDS}")
        return header

    @property
    def place(self) -> tuple[int, int]:
        """By which parts follow each other; those of one place by their names."""
        return self.batch, self.rank


class Told(NamedTuple):
    """What earlier lines have said."""

    rows: int = 0
    num_invalid: int = 0
    state: dict[str, Any] | None = None


@dataclass
class Extent:
    """How far a part goes.

    Attributes:
        rows, examples, batches: so far.
        chunks: the CRC-32 of each chunk of rows, the last one as far as it goes.
        invalid: positions of invalid rows.
        ids_bytes, ids_crc32: of the file of ids.
        origin_crc32: of origin.bin.
        state: of the collection: its proof, and the parameters that had no gradient yet.
    """

    rows: int = 0
    examples: int = 0
    batches: int = 0
    chunks: list[int] = field(default_factory=list)
    invalid: list[int] = field(default_factory=list)
    ids_bytes: int = 0
    ids_crc32: int = 0
    origin_crc32: int = 0
    state: dict[str, Any] = field(default_factory=dict)

    def line(self, chunk_rows: int, told: Told) -> dict[str, Any]:
        """What is new since `told`."""
        new = {f.name: getattr(self, f.name) for f in fields(self)}
        new["chunks"] = self.chunks[told.rows // chunk_rows :] if self.rows > told.rows else []
        new["invalid"] = self.invalid[told.num_invalid :]
        if self.state == told.state:
            del new["state"]
        return new

    def follow(self, line: dict[str, Any], chunk_rows: int) -> None:
        """Go on to what a line says.

        Raises:
            ValueError: it cannot follow.
        """
        rows = checked(line, "rows", int, self.rows, _LARGEST)
        chunks = integers(line, "chunks", 0, 2**32 - 1)
        first = self.rows // chunk_rows
        wanted = -(-rows // chunk_rows) - first if rows > self.rows else 0
        if len(chunks) != wanted:
            raise ValueError("the number of its chunks is wrong")
        invalid = integers(line, "invalid", self.rows, rows - 1)
        if sorted(set(invalid)) != invalid:
            raise ValueError("'invalid' does not rise")
        if wanted:
            self.chunks[first:] = chunks
        self.rows = rows
        self.invalid += invalid
        self.examples = checked(line, "examples", int, self.examples, _LARGEST)
        self.batches = checked(line, "batches", int, self.batches, _LARGEST)
        self.ids_bytes = checked(line, "ids_bytes", int, self.ids_bytes, _LARGEST)
        self.ids_crc32 = checked(line, "ids_crc32", int, 0, 2**32 - 1)
        self.origin_crc32 = checked(line, "origin_crc32", int, 0, 2**32 - 1)
        if "state" in line:
            self.state = checked(line, "state", dict)


@dataclass
class Found:
    """What `read_journal` found: `num_bytes` of the file are whole lines, `lines` of them."""

    header: Header
    extent: Extent
    num_bytes: int
    lines: int
    text: bytes


def read_journal(path: Path) -> Found:
    """Read as far as whole lines go.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged before its last line.
    """
    text = read_regular(path, _MOST_BYTES)
    *lines, _ = text.split(b"\n")  # what has no end of line is torn
    header, extent, length = None, Extent(), 0
    for number, line in enumerate(lines):
        try:
            content = unsealed(line)
        except ValueError as error:
            if number and number + 1 == len(lines):
                break  # torn, though its end got to the disk
            raise ValueError(f"line {number + 1}: {error}") from None
        try:
            if header is None:
                header = Header.load(content)
            else:
                extent.follow(content, header.chunk_rows)
        except ValueError as error:
            raise ValueError(f"line {number + 1}: {error}") from None
        length += len(line) + 1
    if header is None:
        raise ValueError("it has no whole line")
    return Found(header, extent, length, len(lines), text)


class Journal:
    """Writes one, and keeps it short."""

    def __init__(self, path: Path, found: Found) -> None:
        """Go on behind what was found in a file."""
        self._path, self._header = path, found.header
        self._told, self._lines = _told(found.extent), found.lines
        self._file = _opened(path)
        os.ftruncate(self._file, found.num_bytes)

    @staticmethod
    def begin(path: Path, header: Header) -> None:
        """Write the first line of a new file."""
        path.write_bytes(sealed(asdict(header)) + b"\n")

    def append(self, extent: Extent) -> None:
        """One more line, which is on the disk when this returns."""
        self._lines += 1
        if self._lines > _MOST_LINES:
            self._compact(extent)
            return
        line = sealed(extent.line(self._header.chunk_rows, self._told)) + b"\n"
        start = os.lseek(self._file, 0, os.SEEK_END)
        try:
            write_all(self._file, line, start)
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, start)
            raise
        self._told = _told(extent)

    def finish(self, extent: Extent, anew: bool) -> bytes:
        """The last line, or two for all, `anew` or where they are many; the whole text."""
        if anew or self._lines > _FEW_LINES:
            return self._compact(extent)
        self.append(extent)
        return self._path.read_bytes()

    def _compact(self, extent: Extent) -> bytes:
        text = sealed(asdict(self._header)) + b"\n"
        text += sealed(extent.line(self._header.chunk_rows, Told())) + b"\n"
        with appearing(self._path, replace=True) as new:
            new.write_bytes(text)
        os.close(self._file)
        self._file, self._lines = _opened(self._path), 2
        self._told = _told(extent)
        return text

    def close(self) -> None:
        """Write no more."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def _told(extent: Extent) -> Told:
    return Told(extent.rows, len(extent.invalid), extent.state)


def _opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0))


def write_all(descriptor: int, data: Any, start: int) -> None:
    """Write all of `data` at `start`; a full disk takes some of it, and then none."""
    left = memoryview(data)
    while left:
        done = os.pwrite(descriptor, left, start)
        left, start = left[done:], start + done
