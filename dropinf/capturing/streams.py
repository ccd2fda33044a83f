"""Streams of a device on which rows are written, and the one on which they were asked for."""

from __future__ import annotations

import torch
from torch import Tensor


class Streams:
    """A node works on the stream of its forward pass, which may not be that of `rows`.

    It then waits for what made the rows' memory, and whoever asked for what it writes. The twin of
    csrc/capture/streams.h.
    """

    def __init__(self, rows: Tensor) -> None:
        """Rows are asked for on the current stream."""
        self._asking = torch.cuda.current_stream(rows.device) if rows.is_cuda else None
        self._others: list[torch.cuda.Stream] = []

    def enter(self) -> None:
        """Something will be written on the current stream."""
        if self._asking is None:
            return
        here = torch.cuda.current_stream(self._asking.device)
        if here != self._asking and here not in self._others:
            here.wait_stream(self._asking)
            self._others.append(here)

    def end(self) -> None:
        """All is written."""
        for other in self._others:
            self._asking.wait_stream(other)
        self._others.clear()
