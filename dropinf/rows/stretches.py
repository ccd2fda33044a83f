"""A stretch of a store's rows as a store of its own, and what tells a store from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dropinf.rows.ids import Ids, digest_of_ids, picked
from dropinf.rows.part import Part
from dropinf.rows.parts import Parts
from dropinf.rows.store import RowStore

_PROBED = 32  # rows of a store in memory that stand for all


class _Piece(Part):
    """Rows of a part that follow each other."""

    def __init__(self, whole: Part, start: int, stop: int) -> None:
        self.path = None
        self._whole, self._start, self._stop = whole, start, stop
        self.packed, self.packing = whole.packed[start:stop], whole.packing
        self.header, self.extent, self.finished = whole.header, whole.extent, whole.finished
        self.valid = whole.valid[start:stop]

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def ids(self) -> Ids | None:
        own = self._whole.ids
        return None if own is None else picked(own, torch.arange(self._start, self._stop))

    @property
    def origin(self) -> Tensor | None:
        own = self._whole.origin
        return None if own is None else own[self._start : self._stop]

    def chunks(self, count: int = 1) -> Iterator[tuple[int, Tensor]]:
        """What the part's chunks have of it."""
        if not len(self):
            return
        step = self._whole.chunk_rows
        for number in range(self._start // step, -(-self._stop // step), count):
            first = number * step
            rows = self._whole.chunk(number, count)
            at = slice(max(0, self._start - first), self._stop - first)
            yield max(first, self._start) - self._start, rows[at]
            del rows

    def at(self, positions: Tensor) -> Tensor:
        return self._whole.at(positions + self._start)


def stretch_of(store: RowStore, start: int, stop: int) -> RowStore:
    """Rows `start` to `stop` - 1 of a store, which are read where they are.

    Only the chunks that they are in are read, and compared with their checksums.
    """
    pieces, first = [], 0
    for part in store.parts:
        own = max(start, first) - first, min(stop, first + len(part)) - first
        if own[0] < own[1]:
            pieces.append(_Piece(part, *own))
        first += len(part)
    made = RowStore.of(store.plan, Parts(pieces or [_Piece(store.parts[0], 0, 0)]), store.about)
    made.valid, made.begins = store.valid[start:stop], start
    return made


def identity_of(store: RowStore) -> dict[str, Any]:
    """What stores of the same rows have in common, as JSON has it.

    Of rows on the disk their checksums; in memory, where two processes may have made them with
    other rounding, the lengths of some.
    """
    digest = hashlib.sha256(digest_of_ids(store.ids) + store.valid.numpy().tobytes())
    found = {
        "plan": store.plan.fingerprint,
        "weights": store.weights,
        "number of rows": len(store),
        "dtype": str(store.dtype),
        "ids": digest.hexdigest()[:16],
    }
    if all(part.path is not None for part in store.parts):
        marks = repr([part.marks for part in store.parts]).encode()
        return {**found, "checksums": hashlib.sha256(marks).hexdigest()[:16]}
    at = torch.arange(0, len(store), max(1, len(store) // _PROBED))
    lengths = store.at(at).nan_to_num(0, 0, 0).norm(dim=1, dtype=torch.float64)
    return {**found, "rows": lengths.tolist()}
