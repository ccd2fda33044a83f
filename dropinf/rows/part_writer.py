"""Writes a part, so that at any moment it is one as far as it was flushed."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dropinf.capturing import Proof
from dropinf.manifest import sealed
from dropinf.rows.ids import Ids, encoded, kind_of
from dropinf.rows.journal import Extent, Found, Header, Journal, write_all
from dropinf.rows.packing import Packing
from dropinf.rows.part import (
    IDS_FILES,
    PART_FORMAT,
    Part,
    bytes_of,
    bytes_per_row,
    new_header,
    read_part,
)
from dropinf.whole_files import appearing

_FLUSH_SECONDS = 5.0  # a flush waits for the disk


class PartWriter:
    """Writes a directory, which at any moment is a part as far as it was flushed.

    Attributes:
        header, extent: what was written; `extent` is ahead of the journal between flushes.
    """

    def __init__(self, path: Path, header: Header, found: Found | None = None) -> None:
        """Make the directory, or go on behind what was found in it."""
        self.path, self.header = path, header
        self.extent = Extent() if found is None else found.extent
        if found is None:
            with appearing(path) as new:
                new.mkdir()
                Journal.begin(new / "journal.jsonl", header)
        self._journal = Journal(path / "journal.jsonl", header, found)
        names = ["rows.bin"]
        names += [IDS_FILES[header.ids]] if header.ids else []
        names += ["origin.bin"] if header.origin else []
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self._files = {name: os.open(path / name, flags, 0o666) for name in names}
        self._flushed_at: float | None = None
        self._flushed_rows = self.extent.rows

    @classmethod
    def reopen(cls, path: Path, width: int) -> PartWriter:
        """Go on behind the last flush of a part that is not finished.

        Raises:
            ValueError: it is finished or damaged.
        """
        part = Part.open(path, width)  # whose checks are needed too
        if part.finished:
            raise ValueError(f"RowStore: {path} is finished; append makes another part")
        return cls(path, part.header, read_part(path)[1])

    def append(
        self,
        packed: Tensor,
        valid: Tensor,
        ids: Ids | None = None,
        origin: Tensor | None = None,
        num_examples: int | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Add rows as they are kept (see `packing`); they are flushed if that is due.

        An error leaves those before as they were.

        Raises:
            ValueError: they have ids of another kind.
        """
        header, before = self.header, self.extent
        here = kind_of(ids), origin is not None
        if here != (header.ids, header.origin):
            raise ValueError(
                f"RowStore: {self.path} holds rows of (ids, origin) "
                f"{(header.ids, header.origin)}, and these have {here}"
            )
        data, row_bytes = bytes_of(packed), bytes_per_row(header)
        write_all(self._files["rows.bin"], data, before.rows * row_bytes)
        after = replace(
            before,
            rows=before.rows + len(packed),
            examples=before.examples + (len(packed) if num_examples is None else num_examples),
            batches=before.batches + 1,
            state=before.state if state is None else state,
        )
        if ids is not None:
            encoded_ids = encoded(ids)
            write_all(self._files[IDS_FILES[header.ids]], encoded_ids, before.ids_bytes)
            after.ids_bytes += len(encoded_ids)
            after.ids_crc32 = zlib.crc32(encoded_ids, before.ids_crc32)
        if origin is not None:
            numbers = origin.numpy().astype("<i8", copy=False).tobytes()
            write_all(self._files["origin.bin"], numbers, 16 * before.rows)
            after.origin_crc32 = zlib.crc32(numbers, before.origin_crc32)
        invalid = (~valid).nonzero().flatten() + before.rows
        chunks, first = [], before.rows // header.chunk_rows
        start = 0
        while start < len(packed):
            filled = (before.rows + start) % header.chunk_rows
            stop = min(len(packed), start + header.chunk_rows - filled)
            crc = before.chunks[first] if filled else 0
            chunks.append(zlib.crc32(data[start * row_bytes : stop * row_bytes], crc))
            first, start = first + 1, stop
        after.chunks = before.chunks[: before.rows // header.chunk_rows] + chunks
        if len(invalid):
            after.invalid = before.invalid + invalid.tolist()
        self.extent = after  # an interrupt finds all of it or nothing
        now = time.monotonic()
        if self._flushed_at is None or now - self._flushed_at >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Have all rows so far on the disk, and the journal say so."""
        if self.extent.rows == self._flushed_rows:
            return
        for descriptor in self._files.values():
            os.fsync(descriptor)
        self._journal.append(self.extent)
        self._flushed_rows, self._flushed_at = self.extent.rows, time.monotonic()

    def finish(self) -> None:
        """No more rows come."""
        n = self.extent.rows
        sizes = {"rows.bin": n * bytes_per_row(self.header), "origin.bin": 16 * n}
        for name, descriptor in self._files.items():
            os.ftruncate(descriptor, sizes.get(name, self.extent.ids_bytes))
            os.fsync(descriptor)
        text = self._journal.compact(self.extent)
        with appearing(self.path / "part.json") as new:
            new.write_bytes(
                sealed(
                    {
                        "format": PART_FORMAT,
                        "rows": self.extent.rows,
                        "journal_bytes": len(text),
                        "journal_crc32": zlib.crc32(text),
                    }
                )
            )
        self.close()

    def close(self) -> None:
        """Write no more; what was not flushed is not there."""
        self._journal.close()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}


def write_part(
    path: Path,
    packing: Packing,
    pieces: Iterable[tuple[Tensor, Tensor, Ids | None, Tensor | None]],
    proof: Proof | None = None,
    examples: int = 0,
    batches: int = 0,
) -> None:
    """Write a finished part of pieces (packed, valid, ids, origin), so many of them collected."""
    writer = None
    state = None if proof is None else {"proof": proof.saved()}
    try:
        for packed, valid, ids, origin in pieces:
            if writer is None:
                writer = PartWriter(path, new_header(packing, ids, origin))
            writer.append(packed, valid, ids, origin, state=state)
        if writer is None:
            raise ValueError("RowStore.save: there is no row to write")
        writer.extent = replace(writer.extent, examples=examples, batches=batches)
        writer.finish()
    finally:
        if writer is not None:
            writer.close()
