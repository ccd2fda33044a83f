"""Writes a part, so that at any moment it is one as far as it was flushed."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dropinf.capturing import Proof
from dropinf.manifest import sealed
from dropinf.rows.background import Background
from dropinf.rows.ids import Ids, encoded, kind_of
from dropinf.rows.journal import Header, Journal, write_all
from dropinf.rows.packing import Packing
from dropinf.rows.pages import Pages
from dropinf.rows.part import Part
from dropinf.rows.part_files import (
    IDS_FILES,
    PART_FORMAT,
    bytes_per_row,
    new_header,
    read_part,
)
from dropinf.whole_files import appearing

_FLUSH_SECONDS = 5.0  # that a kill may lose, beside the batch in flight
_WAITING_BYTES = 1 << 25  # of rows that are not written yet; then `append` waits
_SYNC_BYTES = 1 << 24  # of rows; the disk is busy meanwhile, and a flush waits for few of them
_sync_data = getattr(os, "fdatasync", os.fsync)


class PartWriter:
    """Writes a directory, which at any moment is a part as far as it was flushed.

    A thread writes, so that `append` does not wait for the disk. It flushes when half of
    `_FLUSH_SECONDS` are over, and `append` waits for a flush that is not there when all are, or
    where rows come faster than the disk takes them.

    Attributes:
        header: of the part.
        extent: what was written; it is ahead of the journal between flushes.
    """

    def __init__(self, path: Path) -> None:
        """Go on behind the last flush of what is in a directory, which `make_part` made."""
        found = read_part(path)[1]
        self.path, self.header, self.extent = path, found.header, found.extent
        self._journal = Journal(path / "journal.jsonl", found)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        names = file_names(found.header)
        self._files = {name: os.open(path / name, flags, 0o666) for name in names}
        self._flushed_at, self._flushed_rows = time.monotonic(), self.extent.rows
        self._is_due = True  # the first rows are flushed at once
        self._unsynced_bytes = 0
        self._unknown = False  # what is on the disk: a sync is under way, or failed
        self._thread = Background(_WAITING_BYTES)
        self._closed = False
        self._pages = Pages()

    @classmethod
    def begin(cls, path: Path, header: Header) -> PartWriter:
        """Make the directory."""
        with appearing(path) as new:
            make_part(new, header)
        return cls(path)

    @classmethod
    def reopen(cls, path: Path, width: int) -> PartWriter:
        """Go on behind the last flush of a part that is not finished.

        Raises:
            ValueError: it is finished or damaged.
        """
        if Part.open(path, width).finished:  # whose checks are needed too
            raise ValueError(f"RowStore: {path} is finished; append makes another part")
        return cls(path)

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

        Raises:
            ValueError: they have ids of another kind.
            OSError: they, or rows before, cannot be written; what was flushed stays.
        """
        header = self.header
        here = kind_of(ids), origin is not None
        if here != (header.ids, header.origin):
            raise ValueError(
                f"RowStore: {self.path} holds rows of (ids, origin) "
                f"{(header.ids, header.origin)}, and these have {here}"
            )
        # The thread gets bytes: what torch computes in it would get threads of its own.
        batch = _Batch(
            *self._pages.copied(packed),
            len(packed),
            len(packed) if num_examples is None else num_examples,
            (~valid).nonzero().flatten().tolist(),
            None if ids is None else encoded(ids),
            None if origin is None else origin.numpy().astype("<i8", copy=False).tobytes(),
            state,
        )
        self._give(partial(self._write, batch), batch.num_bytes)
        self._thread.wait(lambda: time.monotonic() - self._flushed_at < _FLUSH_SECONDS)
        self._thread.check()

    def _give(self, call: Callable[[], None], num_bytes: int = 0) -> None:
        """Have the thread call, which no signal interrupts."""

        def run() -> None:
            try:
                call()
            except OSError as error:
                with contextlib.suppress(OSError):
                    self._flush()  # what was written before
                raise OSError(error.errno, error.strerror, str(self.path)) from error

        self._thread.give(run, num_bytes)

    def _write(self, batch: _Batch) -> None:
        """An error leaves the rows before as they were."""
        extent, header, data = self.extent, self.header, batch.rows
        row_bytes = bytes_per_row(header)
        write_all(self._files["rows.bin"], data, extent.rows * row_bytes)
        if batch.ids is not None:
            write_all(self._files[IDS_FILES[header.ids]], batch.ids, extent.ids_bytes)
        if batch.origin is not None:
            write_all(self._files["origin.bin"], batch.origin, 16 * extent.rows)
        start = 0
        while start < batch.num_rows:
            filled = (extent.rows + start) % header.chunk_rows
            stop = min(batch.num_rows, start + header.chunk_rows - filled)
            crc = extent.chunks.pop() if filled else 0
            crc = zlib.crc32(data[start * row_bytes : stop * row_bytes], crc)
            extent.chunks.append(crc)
            start = stop
        extent.invalid += [extent.rows + i for i in batch.invalid]
        if batch.ids is not None:
            extent.ids_bytes += len(batch.ids)
            extent.ids_crc32 = zlib.crc32(batch.ids, extent.ids_crc32)
        if batch.origin is not None:
            extent.origin_crc32 = zlib.crc32(batch.origin, extent.origin_crc32)
        extent.rows += batch.num_rows
        extent.examples += batch.examples
        extent.batches += 1
        extent.state = extent.state if batch.state is None else batch.state
        self._unsynced_bytes += len(data)
        self._pages.give_back(batch.pages)
        if self._is_due or time.monotonic() - self._flushed_at >= _FLUSH_SECONDS / 2:
            self._flush()
        elif self._unsynced_bytes >= _SYNC_BYTES:
            self._unknown = True
            _sync_data(self._files["rows.bin"])
            self._unknown, self._unsynced_bytes = False, 0

    def flush(self) -> None:
        """Have all rows so far on the disk, and the journal say so.

        Raises:
            OSError: some of them cannot be written; those before are there.
        """
        if self._closed:  # by a `finish` that was interrupted in its last step
            return
        self._give(self._flush)
        self._thread.wait()
        self._thread.check()

    def _flush(self) -> None:
        # Of files whose sync failed, the next one may say that all is well.
        if self.extent.rows == self._flushed_rows or self._unknown:
            return
        self._unknown = True
        for descriptor in self._files.values():
            os.fsync(descriptor)
        self._journal.append(self.extent)
        self._unknown, self._unsynced_bytes, self._is_due = False, 0, False
        self._flushed_rows, self._flushed_at = self.extent.rows, time.monotonic()

    def finish(self, collected: tuple[int, int] | None = None) -> None:
        """No more rows come; so many examples and batches were collected, None for all of them.

        Raises:
            OSError: not all can be written; what was flushed is there.
        """
        self._give(partial(self._finish, collected))
        self._thread.wait()
        self._thread.check()
        self.close()

    def _finish(self, collected: tuple[int, int] | None) -> None:
        if collected is not None:
            self.extent.examples, self.extent.batches = collected
        self._unknown = True
        n = self.extent.rows
        sizes = {"rows.bin": n * bytes_per_row(self.header), "origin.bin": 16 * n}
        for name, descriptor in self._files.items():
            os.ftruncate(descriptor, sizes.get(name, self.extent.ids_bytes))
            os.fsync(descriptor)
        text = self._journal.finish(self.extent, anew=collected is not None)
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

    def close(self) -> None:
        """Write no more; what was not flushed is not there."""
        self._closed = True
        self._thread.end()
        self._pages.free()
        self._journal.close()
        while self._files:
            os.close(self._files.popitem()[1])


@dataclass
class _Batch:
    """What `append` was given, as bytes; `invalid` counts from its own first row."""

    rows: memoryview
    pages: mmap.mmap | None  # that they are in
    num_rows: int
    examples: int
    invalid: list[int]
    ids: bytes | None
    origin: bytes | None
    state: dict[str, Any] | None

    @property
    def num_bytes(self) -> int:
        return len(self.rows) + len(self.ids or b"") + len(self.origin or b"")


def file_names(header: Header) -> list[str]:
    """Of the files that grow with the rows."""
    names = ["rows.bin"]
    names += [IDS_FILES[header.ids]] if header.ids else []
    return names + (["origin.bin"] if header.origin else [])


def make_part(path: Path, header: Header) -> None:
    """Make the directory of a part without rows, which its maker syncs."""
    path.mkdir()
    Journal.begin(path / "journal.jsonl", header)
    for name in file_names(header):
        (path / name).touch()


def write_part(
    path: Path,
    packing: Packing,
    pieces: Iterable[tuple[Tensor, Tensor, Ids | None, Tensor | None]],
    proof: Proof | None = None,
    examples: int = 0,
    batches: int = 0,
    place: tuple[int, int] = (0, -1),
) -> None:
    """Write a finished part of pieces (packed, valid, ids, origin) into a new directory, which its
    maker syncs; so many examples and batches of them were collected. Its place is as of `Header`.
    """
    writer = None
    state = None if proof is None else {"proof": proof.saved()}
    try:
        for packed, valid, ids, origin in pieces:
            if writer is None:
                batch, rank = place
                make_part(path, new_header(packing, ids, origin, rank, batch))
                writer = PartWriter(path)
            writer.append(packed, valid, ids, origin, state=state)
        if writer is None:
            raise ValueError("RowStore.save: there is no row to write")
        writer.finish((examples, batches))
    finally:
        if writer is not None:
            writer.close()
