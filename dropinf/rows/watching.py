"""Who watches passes over the rows of stores: a bar of the command line, and else nobody."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Step = Callable[[int], object]  # so many rows are done
Watch = Callable[[int], AbstractContextManager[Step]]  # a pass over so many rows begins

_watch: Watch | None = None


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
def a_pass(num_rows: int) -> Iterator[Step]:
    """A pass over so many rows, which tells how far it is."""
    global _watch
    watch = _watch
    if watch is None:
        yield lambda num_rows: None
        return
    _watch = None
    try:
        with watch(num_rows) as step:
            yield step
    finally:
        _watch = watch
