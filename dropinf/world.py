"""The ranks of torch.distributed's process group: what each of them says, and whether it is there.

They talk through the key-value store by which the group was made, so that it works beside any
backend and takes no device. Who waits for others looks whether they are alive meanwhile.
"""

from __future__ import annotations

import json
import math
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

from torch import distributed
from typing_extensions import Self

from dropinf import processes

_PAUSES = 0.001, 0.02  # seconds until it is asked again whether others are here: first, longest
_LOOK_SECONDS = 0.2  # between two looks whether they are alive
_BEAT_SECONDS = 1.0  # between two signs of life
_LINGERING = 2.0  # seconds that rank 0 gives others to hear of an error

_calls = count()  # of this process; all ranks make the same ones
_last_who: tuple[Any, list[list[Any]]] = None, []  # the group's store, and who met there last


class RankError(RuntimeError):
    """Another rank is gone, or failed."""


class World:
    """The ranks in one call, which all of them make: a context, whose error ends the others.

    Attributes:
        rank, size: 0 and 1 where torch.distributed is not initialised.
    """

    def __init__(self, op: str, timeout: float) -> None:
        """Wait for the others to make the same call; `timeout` seconds without a sign of life end
        it, here and later.

        Raises:
            ValueError: timeout is not a positive number.
            RankError: one does not come, or is gone.
        """
        refuse_timeout(op, timeout)
        self.op, self._timeout = op, timeout
        self.rank, self.size = 0, 1
        self._met, self._beats, self._beaten = 0, 0, time.monotonic()
        self._who: list[list[Any]] = []  # host, pid and start of each
        if in_group():
            self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
            store = distributed.distributed_c10d._get_default_store()
            self._store = distributed.PrefixStore(f"dropinf/{next(_calls)}", store)
            global _last_who
            pid = os.getpid()
            if _last_who[0] is not None and _last_who[0]() is store:
                self._who = _last_who[1]
            self._who = self.meet("begin", [processes.host(), pid, processes.started(pid)])
            _last_who = weakref.ref(store), self._who  # or the store would outlive the group

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._fail(error)

    def meet(self, what: str, value: Any = None) -> list[Any]:
        """Wait until all ranks are here, and take what each of them says, as JSON has it.

        Raises:
            RankError: one is gone, failed, or is elsewhere.
        """
        if self.size == 1:
            return [value]
        keys = [f"{self._met}/{rank}" for rank in range(self.size)]
        self._met += 1
        with self._reaching():
            self._store.set(keys[self.rank], json.dumps([self.op, what, value]))
            self._wait(keys)
            found = [json.loads(self._store.get(key)) for key in keys]
        for rank, (op, at, _) in enumerate(found):
            if (op, at) != (self.op, what):
                raise RankError(
                    f"{self.op}: rank {rank} is at {at!r} of {op}, rank {self.rank} at {what!r}; "
                    "all ranks must make the same calls in the same order"
                )
        return [value for _, _, value in found]

    def first(self, name: str) -> bool:
        """Whether this is the first rank to ask for that."""
        if self.size == 1:
            return True
        with self._reaching():
            own = str(self.rank)
            return self._store.compare_set(f"first/{name}", "", own).decode() == own

    def say(self, name: str, value: Any) -> None:
        """What others may wait for."""
        if self.size > 1:
            with self._reaching():
                self._store.set(f"said/{name}", json.dumps(value))

    def heard(self, name: str) -> Any:
        """What another rank says, waiting for it."""
        with self._reaching():
            self._wait([f"said/{name}"])
            return json.loads(self._store.get(f"said/{name}"))

    def beat(self) -> None:
        """A sign of life, and a look at the others, once a second.

        Raises:
            RankError: one is gone, or failed.
        """
        if self.size == 1 or time.monotonic() - self._beaten < _BEAT_SECONDS:
            return
        self._beats += 1
        self._beaten = time.monotonic()
        with self._reaching():
            self._store.set(f"beat/{self.rank}", str(self._beats))
            self._look(range(self.size))

    def _fail(self, error: BaseException) -> None:
        """Have the others end, and say the same of who is at fault."""
        if self.size == 1:
            return
        why = f"{self.op}: rank {self.rank} failed: {type(error).__name__}: {error}"
        if isinstance(error, RankError):
            why = str(error)
        with suppress(distributed.DistError):
            if not self._store.check(["failed"]):
                self._store.set("failed", json.dumps(why))
            self._store.set(f"left/{self.rank}", "")
            # By its end the others would lose what they talk through, and take it for the cause.
            until = time.monotonic() + _LINGERING
            left = [f"left/{rank}" for rank in range(self.size)]
            while self.rank == 0 and time.monotonic() < until and not self._store.check(left):
                time.sleep(_PAUSES[1])

    def leave(self) -> None:
        """The last thing: rank 0, which may hold what they talk through, goes last."""
        if self.size == 1:
            return
        with suppress(distributed.DistError, RankError):
            self._store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                self._wait([f"left/{rank}" for rank in range(self.size)])

    def _wait(self, keys: list[str]) -> None:
        """Until all are there."""
        pause, longest = _PAUSES
        since = time.monotonic()
        signs = dict.fromkeys(range(self.size), (b"", since))
        looked = since
        while not self._store.check(keys):
            time.sleep(pause)
            pause = min(2 * pause, longest)
            now = time.monotonic()
            if now - looked < _LOOK_SECONDS:
                continue
            looked = now
            ranks = range(self.size)
            if len(keys) == self.size:
                ranks = [rank for rank in ranks if not self._store.check([keys[rank]])]
            self._look(ranks)
            for rank in ranks:
                self._listen(rank, signs, now)

    def _listen(self, rank: int, signs: dict[int, tuple[bytes, float]], now: float) -> None:
        key = f"beat/{rank}"
        beat = self._store.get(key) if self._store.check([key]) else b""
        if beat != signs[rank][0]:
            signs[rank] = beat, now
        elif rank != self.rank and now - signs[rank][1] > self._timeout:
            raise RankError(
                f"{self.op}: rank {rank} gave no sign of life for {self._timeout:g} seconds; see "
                "what it does, or give a longer timeout="
            )

    def _look(self, ranks: Any) -> None:
        """Raise if one of these is gone, or any has failed."""
        if self._store.check(["failed"]):
            raise RankError(json.loads(self._store.get("failed")))
        self._look_at_processes(ranks)

    def _look_at_processes(self, ranks: Any) -> None:
        """Of this host; of others only a time without a sign tells."""
        for rank, (host, pid, start) in enumerate(self._who):
            if rank in ranks and host == processes.host() and processes.started(pid) != start:
                raise RankError(f"{self.op}: rank {rank} (process {pid}) is gone")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """What the store's end means."""
        try:
            yield
        except distributed.DistError as error:
            time.sleep(_LOOK_SECONDS)  # of a process that is being ended
            self._look_at_processes(range(self.size))
            raise RankError(
                f"{self.op}: the ranks do not reach each other any more; that which holds the "
                f"store of the process group, often rank 0, is gone ({type(error).__name__})"
            ) from None


def refuse_timeout(op: str, timeout: object) -> None:
    """Refuse what is no time to wait for another rank."""
    if not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise ValueError(f"{op}: timeout must be a positive number, got {timeout!r}")


def in_group() -> bool:
    """Whether there are other ranks."""
    there = distributed.is_available() and distributed.is_initialized()
    return there and distributed.get_world_size() > 1
