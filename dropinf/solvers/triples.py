"""The parts that several masks or checkpoints are given as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dropinf.rows import RowStore
from dropinf.solvers.base import Solver
from dropinf.text_table import printable


def triples(op: str, parts: Any) -> Iterator[tuple[RowStore, RowStore, Solver]]:
    """The parts, each looked at.

    Raises:
        TypeError: they are something else.
    """
    kinds = (RowStore, RowStore, Solver)
    for part in parts if isinstance(parts, Iterable) else [parts]:
        whole = isinstance(part, tuple | list) and len(part) == len(kinds)
        if not whole or not all(map(isinstance, part, kinds)):
            raise TypeError(
                f"{op}: parts must be a list of (queries, store, solver), two stores and a fitted "
                f"solver of each mask; got {printable(repr(part))[:200]}"
            )
        yield tuple(part)
