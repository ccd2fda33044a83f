"""The files of a part, and how far they go.

A directory `part-000000` has rows.bin (row-major, so that [n, R] is one memory map), ids.bin or
ids.jsonl, origin.bin, journal.jsonl, which says how far they go, and part.json once it is finished.
What lies in the files behind the journal's last line is not there for a reader, and the next writer
writes over it.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

from dropinf.manifest import field, read_manifest
from dropinf.rows.ids import Ids, kind_of
from dropinf.rows.journal import Found, Header, read_journal
from dropinf.rows.packing import DTYPES, Packing, row_bytes

PART_FORMAT = "dropinf part 2"
CHUNK_BYTES = 1 << 24  # of one checksum, and of one step over the store
GPU_CHUNK_BYTES = 1 << 26  # of one step over rows that are there, each of which waits for it
REMEDY = "collect it again"
IDS_FILES = {"integers": "ids.bin", "strings": "ids.jsonl"}


def new_header(
    packing: Packing, ids: Ids | None, origin: Tensor | None, rank: int = -1, batch: int = 0
) -> Header:
    """Of a part of such rows."""
    name = str(packing.dtype).removeprefix("torch.")
    step = rows_per_chunk(packing.width, packing.dtype)
    scales = packing.num_scales
    return Header(name, packing.width, step, kind_of(ids), origin is not None, scales, rank, batch)


def bytes_per_row(header: Header) -> int:
    """In rows.bin."""
    return row_bytes(DTYPES[header.dtype], header.width, header.scales)


def read_part(path: Path) -> tuple[bool, Found]:
    """Whether the part is finished, and its journal."""
    # First, since the journal of a part that is finished changes no more.
    finished = os.path.lexists(path / "part.json")
    manifest = read_manifest("RowStore", path / "part.json", REMEDY) if finished else {}
    file = path / "journal.jsonl"
    try:
        found = read_journal(file)
        header = found.header
        if header.dtype not in DTYPES:
            raise ValueError(f"'dtype' is none of {', '.join(DTYPES)}")
        if header.scales > header.width:
            raise ValueError("'scales' is out of range")
        if header.chunk_rows > 1 and header.chunk_rows * bytes_per_row(header) > 1 << 26:
            raise ValueError("'chunk_rows' is out of range")
        if finished:
            told = field(manifest, "format", str), field(manifest, "rows", int)
            told += field(manifest, "journal_bytes", int), field(manifest, "journal_crc32", int)
            text = found.text
            if told != (PART_FORMAT, found.extent.rows, len(text), zlib.crc32(text)):
                raise ValueError("it does not belong to part.json")
    except FileNotFoundError:
        raise ValueError(f"RowStore: {file} is missing; {REMEDY}") from None
    except ValueError as error:
        raise ValueError(f"RowStore: {file} is damaged: {error}; {REMEDY}") from None
    return finished, found


def bytes_of(rows: Tensor) -> memoryview:
    """The rows, or any numbers, as bytes, little-endian as all machines are that torch runs on."""
    rows = rows.resolve_neg().contiguous()
    # Of a single row or number, contiguous ones have any stride.
    flat = rows.as_strided((rows.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())


def rows_per_chunk(width: int, dtype: torch.dtype, on_gpu: bool = False) -> int:
    """So many that they take CHUNK_BYTES as they are read, float32 or wider; more on a GPU."""
    num_bytes = GPU_CHUNK_BYTES if on_gpu else CHUNK_BYTES
    return max(1, num_bytes // (width * max(4, dtype.itemsize)))
