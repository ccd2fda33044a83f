"""Memory for rows that wait to be written, which is used again and again."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_MOST = 4  # that lie idle


class Pages:
    """Copies rows into pages of their own.

    What one thread allocates and another frees, malloc keeps: hundreds of MB for wide rows. Fresh
    pages cost a fault each, half of the time of writing them (2-core Xeon, 2026-11).
    """

    def __init__(self) -> None:
        self._idle: list[mmap.mmap] = []

    def copied(self, rows: Tensor) -> tuple[memoryview, mmap.mmap | None]:
        """The bytes of rows [c, ...] on any device, and the pages that they are in."""
        num_bytes = rows.numel() * rows.element_size()
        if not num_bytes:
            return memoryview(b""), None
        pages = self._idle.pop() if self._idle else None  # by one thread; others only add
        if pages is None or len(pages) < num_bytes:
            pages = mmap.mmap(-1, num_bytes)
        into = torch.frombuffer(pages, dtype=rows.dtype, count=rows.numel())
        into.view(rows.shape).copy_(rows.detach())
        return memoryview(pages)[:num_bytes], pages

    def give_back(self, pages: mmap.mmap | None) -> None:
        """Nobody reads what is in them any more."""
        if pages is not None and len(self._idle) < _MOST:
            self._idle.append(pages)

    def free(self) -> None:
        """Keep no pages: 64 MiB of wide rows, while the store is read that was written."""
        self._idle.clear()
