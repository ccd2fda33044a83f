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
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from dropinf.capturing import Proof
from dropinf.compression import Plan
from dropinf.rows import ids as id_lists
from dropinf.rows.about import part_name, part_paths, write_about
from dropinf.rows.ids import GivenIds, Ids
from dropinf.rows.lock import Lock
from dropinf.rows.part import Part
from dropinf.rows.part_files import new_header, read_part
from dropinf.rows.part_writer import PartWriter, make_part
from dropinf.rows.resuming import Past, Source
from dropinf.rows.shares import examples_before, left_of, share_of, split
from dropinf.rows.store import RowStore
from dropinf.rows.writing import RowWriter
from dropinf.whole_files import appearing
from dropinf.world import World


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
        self._numbers: list[int] | None = None  # of the batches to come, if they have some
        self._starts: dict[int, int] | None = {}
        self._batches = 0
        self._skipped = 0  # examples that were there

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
        """The batches of this rank that are not done; of a `sharded` model all ranks need as many.

        Raises:
            ValueError: nothing tells whose rows they are, or which of them are done.
        """
        found = self._source(loader, ids, per)
        counts = self._world.meet("batches", None if self._numbers is None else len(self._numbers))
        if sharded and (len(set(counts)) > 1 or counts[0] is None):
            raise ValueError(
                "collect: all ranks run each pass of a sharded model (fully_shard) together, and "
                f"their numbers of batches are {counts}; give dropinf.split a number of batches "
                "that the number of ranks divides"
            )
        return found

    def _source(self, loader: Iterable, ids: GivenIds | None, per: str) -> Source:
        if self._world.size == 1 and share_of(loader) is None:  # alone with what ranks began
            plain = isinstance(getattr(loader, "sampler", None), SequentialSampler)
            if isinstance(loader, list | tuple) or plain:
                loader = split(loader, rank=0, world_size=1)
        share = share_of(loader)
        if share is not None:
            return self._source_of_share(loader, ids, per)
        sampler = getattr(loader, "sampler", None)
        if ids is None and (
            not isinstance(loader, DataLoader)
            or type(sampler) in (SequentialSampler, RandomSampler)
        ):
            raise ValueError(
                "collect: several processes write one store, and this loader does not tell which "
                "of the examples are this one's; give dropinf.split(loader), one with a "
                "DistributedSampler, or ids="
            )
        if per != "example":
            raise ValueError(
                f"collect: rows of per={per!r} in several processes say the number of an example "
                "in the order of all batches; give dropinf.split(loader)"
            )
        if ids is not None and self.past.batches:
            raise ValueError(
                f"collect: which batches are done in {self.path} is not known by ids=; give "
                "dropinf.split(loader), or another path"
            )
        most = None
        if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
            most = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
        done = Past(ids=self.past.ids)
        return Source(loader, ids, done, self.path, shared=True, most=most)

    def _source_of_share(self, loader: Any, ids: GivenIds | None, per: str) -> Source:
        done, number = set(), 0
        for part in self._before:
            if part.header.batch < 0 and part.extent.batches:
                raise ValueError(
                    f"collect: the rows in {self.path} are not of dropinf.split; go on with a "
                    "DistributedSampler as before, or give another path"
                )
            # Of one process, parts that it made one after the other.
            first = part.header.batch if part.header.rank >= 0 else number
            number = first + part.extent.batches
            done.update(range(first, number))
        if ids is None and isinstance(loader, DataLoader) and isinstance(self.past.ids, Tensor):
            self._check_done(loader, done)
        loader = left_of(loader, done)
        self._numbers = list(share_of(loader).numbers)
        if per != "example":
            self._starts = examples_before(loader)
            if self._starts is None:
                raise ValueError(
                    f"collect: rows of per={per!r} in several processes need the number of the "
                    "examples before a batch; give dropinf.split a DataLoader"
                )
        return Source(loader, ids, Past(), self.path)

    def _check_done(self, loader: DataLoader, done: set[int]) -> None:
        """The batches that count as done must be those whose rows are there."""
        mine, there = done.intersection(share_of(loader).numbers), set(self.past.ids.tolist())
        for number, indices in enumerate(loader.batch_sampler.whole):
            if number in mine and not there.issuperset(indices):
                raise ValueError(
                    f"collect: batch {number} counts as done in {self.path}, and holds other "
                    "examples; give the data, order and batch size of then, or another path"
                )

    def next_start(self) -> int | None:
        """Examples of all batches before the next one, where rows say the number of their own."""
        return self._starts[self._numbers[self._batches]] if self._starts else None

    def append(self, rows: Tensor, valid: Tensor, *rest: Any, **named: Any) -> None:
        numbers, at = self._numbers, self._batches
        if numbers is not None and at and numbers[at] != numbers[at - 1] + 1:
            self._part = None  # another one follows
        super().append(rows, valid, *rest, **named)
        self._batches += 1
        self._world.beat()

    def _begin(self, origin: Tensor | None, ids: Ids | None) -> None:
        batch = -1 if self._numbers is None else self._numbers[self._batches]
        header = new_header(self._packing, ids, origin, self._world.rank, batch)
        about = replace(self.about, first=None)
        if not self._there and not self._writers:
            if self._world.first("store"):
                self._make_store(about)
                self._world.say("about", asdict(about))
            else:
                self._compare(asdict(about), self._world.heard("about"))
        path = self.path
        if not os.path.lexists(path / "store.json"):
            raise ValueError(
                f"collect: rank {self._world.rank} does not see {path}, which another rank made; "
                "give a path in a file system that all of them share"
            )
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
        for what in ("weights", "passing", "options"):
            if json.loads(json.dumps(mine[what])) != made[what]:
                raise ValueError(
                    f"collect: rank {self._world.rank} has other {what} than the rank that began "
                    f"{self.path} ({mine[what]!r}, not {made[what]!r}); give all ranks the same"
                )

    def unmet_by_all(self, unmet: set[str]) -> set[str]:
        """Of the parameters that no example of this rank had a gradient for, those of no rank."""
        found = self._world.meet("gradients", sorted(unmet))
        return set.intersection(*map(set, found)) if self._world.rank == 0 else set()

    def finish(self, proof: Proof | None = None) -> RowStore:
        """The store of all ranks' rows, once all are there."""
        for part, _ in self._writers:
            part.flush()
        counts = self._world.meet("rows", [self.num_rows, self._batches])
        if not any(rows for rows, _ in counts):
            raise ValueError("collect: the loaders of all ranks are empty; they gave no batch")
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
