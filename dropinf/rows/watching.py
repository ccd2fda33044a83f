"""Who watches passes over the rows of stores: a bar of the command line, and ranks that wait."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Step = Callable[[int], object]  # so many rows are done
Watch = Callable[[int], AbstractContextManager[Step]]  # a pass over so many rows begins

_watch: Watch | None = None
_sign: Callable[[], None] | None = None


@contextlib.contextmanager
def passes_watched(watch: Watch) -> Iterator[None]:
    """Inside, `watch` is told of each pass; of one inside of another it is not."""
    global _watch
    before, _watch = _watch, watch
    try:
        yield
    finally:
        _watch = before


@contextlib.contextmanager
def signs_of_life(sign: Callable[[], None]) -> Iterator[None]:
    """Inside, `sign` is called with every chunk of any pass."""
    global _sign
    before, _sign = _sign, sign
    try:
        yield
    finally:
        _sign = before


@contextlib.contextmanager
def a_pass(num_rows: int) -> Iterator[Step]:
    """A pass over so many rows, which tells how far it is."""
    global _watch
    watch, sign = _watch, _sign
    if watch is None and sign is None:
        yield lambda num_rows: None
        return
    _watch = None

    def done(num_rows: int) -> None:
        step(num_rows)
        if sign is not None:
            sign()

    try:
        with contextlib.nullcontext(_nobody) if watch is None else watch(num_rows) as step:
            yield done
    finally:
        _watch = watch


def _nobody(num_rows: int) -> None:
    pass
