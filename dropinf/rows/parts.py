"""Parts that follow each other: the rows of a store, as they are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dropinf.compression import Plan
from dropinf.rows import ids as id_lists
from dropinf.rows.about import part_name, part_paths
from dropinf.rows.ids import Ids
from dropinf.rows.lock import Lock
from dropinf.rows.packing import Packing
from dropinf.rows.part import Marks, Part
from dropinf.rows.part_writer import write_part
from dropinf.rows.watching import a_pass
from dropinf.whole_files import appearing


class Parts:
    """Parts of one kind: of one packing, and with ids of one kind and origins, or without.

    Attributes:
        parts: one or more.
        packing: how rows are kept.
        kind: of their ids, see `ids.kind_of`.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.packing: Packing = parts[0].packing
        self.kind = parts[0].header.ids

    @classmethod
    def open(cls, path: Path, width: int, marks: Sequence[Marks] | None = None) -> Parts:
        """Of a directory, not laid out yet; the first parts as far as `marks` go, None for all.

        Raises:
            ValueError: they are damaged, of different kinds, or not those of the marks.
        """
        paths = part_paths(path)
        wanted = [None] * len(paths) if marks is None else marks
        if len(paths) < len(wanted):
            raise ValueError(
                f"RowStore: {path} has fewer parts than when the store was pickled; pickle it again"
            )
        parts = [Part.open(one, width, own) for one, own in zip(paths, wanted, strict=False)]
        if not sum(map(len, parts)):
            raise ValueError(
                f"RowStore.load: {path} holds no rows yet; collect(..., path=, resume=True) goes on"
            )
        parts.sort(key=lambda part: part.header.place)
        if len({(p.header.dtype, p.header.ids, p.header.origin) for p in parts}) > 1:
            raise ValueError(f"RowStore.load: the parts of {path} are of different kinds")
        return cls(parts)

    def lay_out(self, plan: Plan) -> Parts:
        """Know where the layers are."""
        bounds = Packing.of(plan, torch.float32).bounds
        for part in self.parts:
            part.lay_out(bounds)
        self.packing = self.parts[0].packing
        return self

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def finished(self) -> bool:
        """Whether all that was to be collected is there."""
        return all(part.finished for part in self.parts)

    @property
    def valid(self) -> Tensor:
        """[n] bool; of one part its own."""
        if len(self.parts) == 1:
            return self.parts[0].valid
        return torch.cat([part.valid for part in self.parts])

    @property
    def ids(self) -> Ids | None:
        """Of each row, None if their positions are all that is known."""
        return id_lists.joined([part.ids for part in self.parts])

    @property
    def has_origin(self) -> bool:
        """Whether `origin` is not None."""
        return self.parts[0].header.origin

    @property
    def origin(self) -> Tensor | None:
        """[n, 2] int64, or None."""
        return torch.cat([part.origin for part in self.parts]) if self.has_origin else None

    @property
    def device(self) -> torch.device:
        """Where the rows are; of a directory the CPU."""
        return self.parts[0].packed.device

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows."""
        packed = self.parts[0].packed
        return len(self) * packed.shape[1] * packed.element_size()

    def chunks(self, count: int = 1) -> Iterator[tuple[int, Tensor]]:
        """The rows in order as they are kept, as (position of the first, [c, ...]), verified.

        Each is `count` chunks of a part.
        """
        first = 0
        with a_pass(len(self)) as done:
            for part in self.parts:
                for start, chunk in part.chunks(count):
                    num_rows = len(chunk)
                    yield first + start, chunk
                    del chunk  # or its map would stay until the next one is made
                    done(num_rows)
                first += len(part)

    def at(self, positions: Tensor | Sequence[int]) -> Tensor:
        """[k, ...] the rows at these positions as they are kept, verified; a copy."""
        positions = torch.as_tensor(positions).to("cpu", torch.int64)
        outside = (positions < 0) | (positions >= len(self))
        if outside.any():
            raise IndexError(
                f"RowStore.at: positions are 0 to {len(self) - 1}, got {int(positions[outside][0])}"
            )
        packed = self.parts[0].packed
        found = packed.new_empty(len(positions), packed.shape[1])
        first = 0
        for part in self.parts:
            here = ((positions >= first) & (positions < first + len(part))).nonzero().flatten()
            if len(here):
                found[here] = part.at(positions[here] - first)
            first += len(part)
        return found

    def moved(self, device: torch.device) -> Tensor:
        """[n, ...] all rows as they are kept, verified; a copy on a device."""
        packed = self.parts[0].packed
        found = packed.new_empty((len(self), packed.shape[1]), device=device)
        for start, chunk in self.chunks():
            found[start : start + len(chunk)] = chunk
            del chunk
        return found

    def check_new(self, part: Part, dtype: torch.dtype) -> None:
        """Raise unless a part whose rows came in `dtype` may follow."""
        read = self.packing.dtype if dtype == self.packing.dtype else self.packing.read_dtype
        mine = str(read), self.kind, self.has_origin
        theirs = str(dtype), part.header.ids, part.header.origin
        if mine != theirs:
            raise ValueError(
                f"RowStore.append: rows must be of (dtype, ids, origin) {mine}, got {theirs}"
            )
        if self.kind:
            fresh = id_lists.distinct(part.ids) if self.has_origin else part.ids
            twice = id_lists.first_twice(id_lists.joined([id_lists.distinct(self.ids), fresh]))
            if twice is not None:
                raise ValueError(f"RowStore.append: the store has rows of id {twice!r} already")

    def written(self, part: Part, path: Path) -> Part:
        """The part, written into the directory behind the others.

        Raises:
            LockedError: another process writes there.
            ValueError: another one has.
        """
        lock = Lock(path)
        try:
            lock.acquire("RowStore.append")
            found = part_paths(path)
            if len(found) != len(self.parts):
                raise ValueError(
                    f"RowStore.append: {path} has other parts than when it was opened; load it "
                    "again"
                )
            made = path / part_name(len(found))
            with appearing(made) as new:
                pieces = [(part.packed, part.valid, part.ids, part.origin)]
                last = self.parts[-1].header.place  # and behind it by its name
                write_part(new, self.packing, pieces, place=last)
            return Part.open(made, self.packing.width).lay_out(self.packing.bounds)
        finally:
            lock.release()

    def verify(self) -> None:
        """Read everything that is on the disk, and compare its checksums anew."""
        with a_pass(len(self)) as done:
            for part in self.parts:
                if part.path is not None:
                    again = Part.open(part.path, self.packing.width)
                    for _, chunk in again.chunks():
                        done(len(chunk))
                    _ = again.ids, again.origin
