"""losses.jsonl: what each retrained model gave, a sealed line each, on the disk once it is there.

The first line says of how many examples the subsets are. Each further one has the number of a
subset, the digest of its members, the seed and the losses. A torn last line is that of a process
that died, and counts for nothing.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropinf.manifest import field, read_regular, sealed, unsealed
from dropinf.rows import Lock
from dropinf.whole_files import appearing

_MOST_BYTES = 1 << 32
_NAME = "losses.jsonl"


class ResultsFile:
    """A context in which one process writes; `done` are the losses so far, by (subset, seed)."""

    def __init__(self, directory: Path, members: Tensor, seeds: list[int]) -> None:
        self.directory, self._path = directory, directory / _NAME
        self._digests = [digest(row) for row in members]
        self._n, self._seeds = members.shape[1], set(seeds)
        self.done: dict[tuple[int, int], Tensor] = {}

    def __enter__(self) -> ResultsFile:
        """Read what is there.

        Raises:
            ValueError: it is something else, damaged, or of other subsets or seeds.
            LockedError: another process writes there.
        """
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"retrain: {self.directory} is no directory; give another path")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.directory)
        try:
            self._lock.acquire("retrain")
            if not self._path.exists():
                self._begin()
            length = self._read(read_regular(self._path, _MOST_BYTES))
            self._file = self._path.open("r+b", buffering=0)
            self._file.truncate(length)
            self._file.seek(length)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._lock.release()

    def add(self, subset: int, seed: int, losses: Tensor) -> None:
        """One more line, which is on the disk when this returns."""
        line: dict[str, Any] = {"subset": subset, "members": self._digests[subset], "seed": seed}
        text = sealed({**line, "losses": losses.tolist()}) + b"\n"
        start = self._file.tell()
        try:
            for_disk = memoryview(text)
            while for_disk:  # a full disk takes some of it, and then none
                for_disk = for_disk[self._file.write(for_disk) :]
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(start)
            self._file.seek(start)
            raise
        self.done[subset, seed] = losses

    def _begin(self) -> None:
        others = [
            e.name for e in os.scandir(self.directory) if not e.name.startswith(("lock", "."))
        ]
        if others:
            raise ValueError(
                f"retrain: {self.directory} holds something else, such as {others[0]!r}; give the "
                "path of a directory that is empty or not there"
            )
        with appearing(self._path) as new:
            new.write_bytes(sealed({"n": self._n}) + b"\n")

    def _read(self, text: bytes) -> int:
        """Take in all lines; how many bytes are whole ones."""
        *lines, _ = text.split(b"\n")
        length = 0
        for number, line in enumerate(lines):
            try:
                content = unsealed(line)
                if number == 0:
                    n = field(content, "n", int)
                else:
                    subset, seed = field(content, "subset", int, 0), field(content, "seed", int)
                    members = field(content, "members", str)
                    losses = torch.tensor(field(content, "losses", list), dtype=torch.float64)
                    first = next(iter(self.done.values()), losses)
                    if losses.dim() != 1 or len(losses) != len(first):
                        raise ValueError("'losses' are of another number of queries")
            except (ValueError, TypeError) as error:
                if number and number + 1 == len(lines):
                    break  # torn, though its end got to the disk
                raise ValueError(
                    f"retrain: {self._path} is damaged: line {number + 1}: {error}; remove it, or "
                    "give another path"
                ) from None
            length += len(line) + 1
            if number == 0:
                if n != self._n:
                    self._refuse(f"subsets of {n} examples, not of {self._n}")
                continue
            if subset >= len(self._digests) or members != self._digests[subset]:
                self._refuse(f"another subset {subset}")
            if seed not in self._seeds:
                self._refuse(f"a model of seed {seed}, which is not asked for")
            self.done[subset, seed] = losses
        if not length:
            raise ValueError(
                f"retrain: {self._path} is damaged: it has no whole line; remove it, or give "
                "another path"
            )
        return length

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"retrain: {self._path} holds {what}; give the members and seeds that it was made "
            "with, to which more may be added behind, or another path"
        )


def digest(members: Tensor) -> str:
    """Of [n] bool."""
    return hashlib.sha256(np.packbits(members.numpy()).tobytes()).hexdigest()[:32]
