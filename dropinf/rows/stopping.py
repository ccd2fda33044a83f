"""SIGTERM while rows are collected: it ends the process with what is there put on the disk."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Sigterm:
    """A context in which SIGTERM raises SystemExit, so that what is open is closed.

    It does so at once where the process waits for a batch, and behind the batch inside of `held`,
    since torch's backward pass is no place to stop in. A handler of the user's stays in place.
    """

    def __init__(self) -> None:
        self._holding = self._due = self._set = False

    def __enter__(self) -> Sigterm:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_signal)
            self._set = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._set:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Ends only behind the block."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._due:
            raise _ended()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._due = True
        if not self._holding:
            raise _ended()


def _ended() -> SystemExit:
    return SystemExit(128 + signal.SIGTERM)  # as shells report it
