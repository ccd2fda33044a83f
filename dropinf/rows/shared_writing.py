"""One store that several processes write, each of them parts of its own."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dropinf.capturing import Proof
from dropinf.compression import Plan
from dropinf.rows import ids as id_lists
from dropinf.rows.about import part_name, part_paths, write_about
from dropinf.rows.ids import GivenIds, Ids
from dropinf.rows.journal import Header
from dropinf.rows.lock import Lock
from dropinf.rows.part import Part
from dropinf.rows.part_files import new_header, read_part
from dropinf.rows.part_writer import PartWriter, make_part
from dropinf.rows.resuming import Source
from dropinf.rows.shared_batches import SharedBatches
from dropinf.rows.store import RowStore
from dropinf.rows.writing import RowWriter
from dropinf.whole_files import appearing
from dropinf.world import World

_KIND = "dtype of rows", "kind of ids", "kind of rows"  # what all parts of a store have in common


def written_by_ranks(path: str | os.PathLike) -> bool:
    """Whether there is a store that several processes have begun and not finished."""
    with contextlib.suppress(OSError, ValueError):  # which are said later
        found = [read_part(one) for one in part_paths(Path(path))]
        return any(not finished and part.header.rank >= 0 for finished, part in found)
    return False


class SharedWriter(RowWriter):
    """A rank's writer: the parts that it makes, each of batches that follow each other.

    The first rank that has rows makes the store. All parts stay unfinished until all ranks have
    said that their rows are there, so that a store that lacks a rank's rows never looks finished.
    A part is locked by who writes it, the store by who made it or, where it is gone on with, by
    rank 0.
    """

    def __init__(
        self,
        plan: Plan,
        path: str | os.PathLike,
        *,
        world: World,
        resume: bool = False,
        dtype: torch.dtype | None = None,
        distinct: bool = True,
    ) -> None:
        """As of `RowWriter`; `distinct`: no example may be of two ranks, as it may in training."""
        super().__init__(plan, path, resume=resume, dtype=dtype)
        self._world, self._distinct = world, distinct
        self._writers: list[tuple[PartWriter, Lock]] = []
        self._there = False  # a store that is gone on with
        self._before: list[Part] = []
        self._own = SharedBatches(world, self.path, [], self.past)
        self._batches = 0

    @property
    def goes_on(self) -> bool:
        return self._there

    def __enter__(self) -> SharedWriter:
        try:
            there = self._resume and os.path.lexists(self.path)
            if there and self._world.rank == 0:
                self._lock = Lock(self.path)
                self._read(self._lock)
                self._refuse_writers()
            self._there = self._world.meet("store", there)[0]
            if self._there:
                self._before = self._read()
                self._own = SharedBatches(self._world, self.path, self._before, self.past)
        except BaseException:
            self.leave()
            raise
        return self

    def _refuse_writers(self) -> None:
        """Ranks of another launch may write, though that which locked the store is gone."""
        for path in part_paths(self.path):
            lock = Lock(path)
            try:
                lock.acquire("collect")
            finally:
                lock.release()

    def source(self, loader: Iterable, ids: GivenIds | None, per: str, sharded: bool) -> Source:
        """See `SharedBatches.source`."""
        return self._own.source(loader, ids, per, sharded)

    def next_start(self) -> int | None:
        """Examples of all batches before the next one, where rows say the number of their own."""
        own = self._own
        return own.starts[own.numbers[self._batches]] if own.starts else None

    def append(self, rows: Tensor, valid: Tensor, *rest: Any, **named: Any) -> None:
        numbers, at = self._own.numbers, self._batches
        if numbers is not None and at and numbers[at] != numbers[at - 1] + 1:
            self._part = None  # another one follows
        super().append(rows, valid, *rest, **named)
        self._batches += 1
        self._world.beat()

    def _begin(self, origin: Tensor | None, ids: Ids | None) -> None:
        numbers = self._own.numbers
        batch = -1 if numbers is None else numbers[self._batches]
        header = new_header(self._packing, ids, origin, self._world.rank, batch)
        about = replace(self.about, first=self._own.first)
        own = {"plan": self._plan.fingerprint, **asdict(about), **_kind(header)}
        if not self._there and not self._writers:
            if self._world.first("store"):
                self._make_store(about)
                self._world.say("about", own)
            else:
                self._compare(own, self._world.heard("about"))
        elif self._before:
            self._compare(own, own | _kind(self._before[0].header))
        path = self.path
        self._refuse_unseen(path / "store.json")
        number = len(part_paths(path))
        while True:
            # A name that another rank took meanwhile is passed over, so that none is missing.
            try:
                with appearing(path / part_name(number)) as new:
                    make_part(new, header)
                    lock = Lock(new)
                    lock.acquire("collect")
                break
            except OSError:
                if not os.path.lexists(path / part_name(number)):
                    raise
                number += 1
        lock.directory = path / part_name(number)
        self._part = PartWriter(lock.directory)
        self._writers.append((self._part, lock))

    def _make_store(self, about: Any) -> None:
        try:
            with appearing(self.path) as new:
                new.mkdir()
                write_about(new, self._plan, about)
                self._lock = Lock(new)
                self._lock.acquire("collect")
            self._lock.directory = self.path
        except OSError:
            self._lock = None
            if os.path.lexists(self.path):
                raise FileExistsError(
                    f"collect: {self.path} exists by now; give another path"
                ) from None
            raise

    def _compare(self, mine: dict[str, Any], made: dict[str, Any]) -> None:
        for what in ("plan", "weights", "passing", "options", *_KIND):
            if json.loads(json.dumps(mine[what])) != made[what]:
                raise ValueError(
                    f"collect: rank {self._world.rank} has other {what} than the rank that began "
                    f"{self.path} ({mine[what]!r}, not {made[what]!r}); give all ranks the same"
                )

    def _refuse_unseen(self, path: Path) -> None:
        if not os.path.lexists(path):
            raise ValueError(
                f"collect: rank {self._world.rank} does not see {path}, which another rank made; "
                "give a path in a file system that all of them share"
            )

    def unmet_by_all(self, unmet: set[str]) -> set[str]:
        """Of the parameters that no example of this rank had a gradient for, those of no rank."""
        found = self._world.meet("gradients", sorted(unmet))
        return set.intersection(*map(set, found)) if self._world.rank == 0 else set()

    def finish(self, proof: Proof | None = None) -> RowStore:
        """The store of all ranks' rows, once all are there."""
        for part, _ in self._writers:
            part.flush()
        made = [lock.directory.name for _, lock in self._writers]
        said = self._world.meet("rows", [self.num_rows, made])
        if not any(rows for rows, _ in said):
            raise ValueError("collect: the loaders of all ranks are empty; they gave no batch")
        names = [name for _, made in said for name in made]
        for name in ("store.json", *names):
            self._refuse_unseen(self.path / name)
        if len(set(names)) < len(names):
            raise ValueError(
                f"collect: two ranks wrote {self.path / id_lists.first_twice(names)}; give a path "
                "in a file system that all of them share"
            )
        if self._world.rank == 0:
            if self._distinct:
                self._check_distinct()
            for part in self._before:
                if not part.finished:
                    writer = PartWriter(part.path)
                    writer.finish()
        self._world.meet("distinct")
        for part, lock in self._writers:
            part.finish()
            lock.release()
        self._world.meet("finished")
        if self._lock is not None:
            self._lock.release()
        self._finished = True
        store = RowStore.load(self.path)
        self._world.leave()
        return store

    def _check_distinct(self) -> None:
        """No example may have been two ranks', as padding that nothing told of."""
        parts = [Part.open(path, self._plan.width) for path in part_paths(self.path)]
        own = [id_lists.distinct(part.ids) for part in parts if len(part)]
        found = None if not own else id_lists.joined(own)
        if found is None or len(id_lists.distinct(found)) == len(found):
            return
        raise ValueError(
            f"collect: example {id_lists.first_twice(found)!r} was given to two ranks; give "
            "dropinf.split(loader), or ids= that tell examples apart, and another path"
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._finished or os.getpid() != self._pid:
            return
        for part, _ in self._writers:
            if part is not self._part:
                with contextlib.suppress(OSError):
                    part.flush()
                part.close()
        try:
            super().__exit__(kind, error, trace)
        finally:
            for _, lock in self._writers:
                lock.release()

    def leave(self) -> None:
        super().leave()
        for part, lock in self._writers:
            part.close()
            lock.release()


def _kind(header: Header) -> dict[str, str]:
    """What `Parts.open` wants to be the same in all parts."""
    rows = "of parts of examples" if header.origin else "of examples"
    return dict(zip(_KIND, (header.dtype, header.ids or "none", rows), strict=True))
