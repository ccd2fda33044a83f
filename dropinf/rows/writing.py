"""RowWriter: makes a store, in memory or in a directory, of batches of rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dropinf.capturing import Proof
from dropinf.compression import Plan
from dropinf.rows import ids as id_lists
from dropinf.rows.about import (
    About,
    part_name,
    part_paths,
    read_about,
    write_about,
)
from dropinf.rows.ids import Ids
from dropinf.rows.lock import Lock
from dropinf.rows.packing import DTYPES, Packing
from dropinf.rows.part import Part
from dropinf.rows.part_files import new_header
from dropinf.rows.part_writer import PartWriter, make_part
from dropinf.rows.parts import Parts
from dropinf.rows.resuming import Past
from dropinf.rows.store import RowStore
from dropinf.user_warning import warn_user
from dropinf.whole_files import appearing


class RowWriter:
    """Appends rows, and makes the store of them.

    A directory is made with the first rows, and is a store from then on as far as it was flushed:
    leaving the context without `finish` flushes, and says how to go on.

    Attributes:
        about: what store.json will say, which is written with the first rows.
        num_rows: so far, those of a store that is gone on with among them.
        past: what that store has already.
        state: of the collection that is gone on with.
        unmet: parameters that no example of what is there had a gradient for, None if unknown.
    """

    def __init__(
        self,
        plan: Plan,
        path: str | os.PathLike | None,
        expected: int = 0,
        *,
        resume: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`expected` rows are allocated at once in memory; more may come, or fewer.

        Raises:
            FileExistsError: there is something at `path`, and `resume` is False.
            ValueError: `resume` without a path, or rows are not kept in that dtype.
        """
        if resume and path is None:
            raise ValueError("collect: resume=True goes on with a directory; give path=")
        self.about = About()
        self.past = Past()
        self.state: dict[str, Any] = {}
        self.unmet: set[str] | None = None
        self.num_rows = 0
        self._plan, self._expected, self._resume = plan, expected, resume
        self.path = None if path is None else Path(path)
        self._dtype = dtype
        self._packing = None if dtype is None else Packing.of(plan, dtype)
        self._packed: Tensor | None = None  # in memory, with room to grow
        self._valid: list[Tensor] = []
        self._ids: list[Ids | None] = []
        self._origin: list[Tensor] = []
        self._part: PartWriter | None = None
        self._lock: Lock | None = None
        self._finished = False
        self._pid = os.getpid()
        if self.path is not None and os.path.lexists(self.path) and not resume:
            raise FileExistsError(_there(self.path))

    @property
    def goes_on(self) -> bool:
        """Whether a store is gone on with."""
        return self._lock is not None

    def __enter__(self) -> RowWriter:
        if self._resume and os.path.lexists(self.path):
            self._reopen()
        return self

    def _reopen(self) -> None:
        lock = Lock(self.path)
        try:
            for part in self._read(lock):
                if not part.finished:
                    self._part = PartWriter.reopen(part.path, self._plan.width)
                    self.state = part.extent.state
            self._lock = lock
        finally:
            if self._lock is None:
                lock.release()

    def _read(self, lock: Lock | None = None) -> list[Part]:
        """The parts that are there, in order, and what they say of all of them, under a lock."""
        if not os.path.lexists(self.path / "store.json"):
            raise FileExistsError(f"collect: {self.path} holds no store; give another path")
        if lock is not None:
            lock.acquire("collect")
        width, fingerprint, self.about = read_about(self.path)
        if fingerprint != self._plan.fingerprint:
            raise ValueError(
                f"collect: the rows in {self.path} were made under plan {fingerprint}, not "
                f"{self._plan.fingerprint}; resume with Plan.load({str(self.path)!r})"
            )
        parts = [Part.open(path, width) for path in part_paths(self.path)]
        parts.sort(key=lambda part: part.header.place)
        collected = [part for part in parts if part.extent.batches]
        self.past = Past(
            sum(part.extent.examples for part in collected),
            sum(part.extent.batches for part in collected),
            id_lists.joined([of_examples(part) for part in collected]),
            self.about.first,
        )
        ids = self.past.ids
        if ids is not None and len(ids) < self.past.examples:
            raise ValueError(
                f"collect: {self.past.examples - len(ids)} of the examples done in {self.path} "
                "have no row, as of no segment, and nothing says which these are; collect "
                "again, under another path"
            )
        states = [part.extent.state for part in collected]
        told = [set(state["unmet"]) for state in states if "unmet" in state]
        self.unmet = set.intersection(*told) if told else None
        self.num_rows = sum(map(len, parts))
        for part in parts:
            if not part.finished:
                self._packing = Packing.of(self._plan, DTYPES[part.header.dtype])
        return parts

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._finished or os.getpid() != self._pid:  # a fork of the process that writes
            return
        try:
            if self._part is not None:
                self._close_part()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _close_part(self) -> None:
        """Keep what is there, and say so, also where a signal comes in between."""
        part, where, interrupts = self._part, self.path, []

        def firmly(step: Callable[[], Any]) -> Any:
            """Do it again where a signal ended it, such as torch's for a worker that died."""
            try:
                return step()
            except (OSError, ValueError):
                raise
            except BaseException as error:
                interrupts.append(error)
                return step()

        def rows() -> int:
            return sum(len(Part.open(path, self._plan.width)) for path in part_paths(where))

        try:
            firmly(part.flush)
        except OSError:
            pass  # of a full disk: what was flushed before is there
        finally:
            part.close()
        try:
            n = firmly(rows)
        except (ValueError, OSError):
            n = 0
        how = f"collect(..., path={str(where)!r}, resume=True) goes on behind them"
        if self.about.weights is None:
            how = "RowStore.load opens them"  # of a training, which is not gone on with here
        firmly(lambda: warn_user(f"collect: stopped; the first {n} rows are in {where}, and {how}"))
        if interrupts:
            raise interrupts[0]

    def append(
        self,
        rows: Tensor,
        valid: Tensor,
        origin: Tensor | None = None,
        ids: Ids | None = None,
        num_examples: int | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Add rows [B, R], which of them are valid [B] bool, their origin [B, 2] and ids."""
        packed, valid = self._pack(rows.detach()), valid.cpu()
        origin = None if origin is None else origin.cpu()
        if self.path is None:
            self._keep(packed.cpu(), valid, origin, ids)
        else:
            if self._part is None:
                self._begin(origin, ids)
            self._part.append(packed, valid, ids, origin, num_examples, state)
        self.num_rows += len(rows)

    def _pack(self, rows: Tensor) -> Tensor:
        if self._packing is None:
            self._packing = Packing.of(self._plan, rows.dtype)
        if self._dtype is None and rows.dtype != self._packing.dtype:
            raise ValueError(
                f"collect: these rows are {rows.dtype}, and those before {self._packing.dtype}; "
                "say in which dtype= all are to be kept"
            )
        return self._packing.pack(rows)

    def _keep(self, packed: Tensor, valid: Tensor, origin: Tensor | None, ids: Ids | None) -> None:
        first, last = self.num_rows, self.num_rows + len(packed)
        if self._packed is None:
            self._packed = packed.new_empty(max(self._expected, len(packed)), packed.shape[1])
        if last > len(self._packed):
            grown = self._packed.new_empty(max(last, 2 * len(self._packed)), packed.shape[1])
            grown[:first] = self._packed[:first]
            self._packed = grown
        self._packed[first:last] = packed
        self._valid.append(valid)
        self._ids.append(ids)
        if origin is not None:
            self._origin.append(origin)

    def _begin(self, origin: Tensor | None, ids: Ids | None) -> None:
        """Make the directory with its lock, or a part behind those that are finished."""
        header = new_header(self._packing, ids, origin)
        if self._lock is None:
            try:
                with appearing(self.path) as new:
                    new.mkdir()
                    write_about(new, self._plan, self.about)
                    make_part(new / part_name(0), header)
                    self._lock = Lock(new)
                    self._lock.acquire("collect")
                    self._lock.directory = self.path  # where it stands when this ends
            except OSError:
                self._lock = None
                if os.path.lexists(self.path):
                    raise FileExistsError(_there(self.path)) from None
                raise
            self._part = PartWriter(self.path / part_name(0))
        else:
            self._part = PartWriter.begin(self.path / part_name(len(part_paths(self.path))), header)

    def finish(self, proof: Proof | None = None) -> RowStore:
        """The store of all rows."""
        if self.path is None:
            valid = torch.cat(self._valid)
            origin = torch.cat(self._origin) if self._origin else None
            ids = id_lists.joined(self._ids)
            part = Part(self._packed[: self.num_rows], self._packing, valid, ids, origin)
            store = RowStore.of(self._plan, Parts([part]), self.about)
            store.proof = Proof() if proof is None else proof
            return store
        if self._part is not None:
            self._part.finish()
        self._lock.release()
        self._finished = True
        return RowStore.load(self.path)

    def leave(self) -> None:
        """Go on with nothing: what was there stays as it is."""
        if self._part is not None:
            self._part.close()
        if self._lock is not None:
            self._lock.release()
        self._finished = True


def of_examples(part: Part) -> Ids | None:
    """The ids of its examples, of which each may have many rows."""
    if part.ids is None or part.origin is None:
        return part.ids
    example = part.origin[:, 0]
    first = torch.ones(len(example), dtype=torch.bool)
    first[1:] = example[1:] != example[:-1]
    return id_lists.picked(part.ids, first.nonzero().flatten())


def _there(path: Path) -> str:
    """Why nothing is begun at `path`."""
    if not os.path.lexists(path / "store.json"):
        return f"collect: {path} exists; remove it, or give another path"
    holder = Lock(path).holder()
    by = "" if holder is None else f" (being written by {holder})"
    return (
        f"collect: {path} exists{by}; load it with RowStore.load, go on with it with resume=True, "
        "remove it, or give another path"
    )
