"""How much memory a call may take beside what it is given and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from dropinf.compression import LayerPlan

_DEFAULT = 1 << 28  # of what goes over all rows of a store, for a solver without max_bytes


@dataclass(frozen=True)
class Room:
    """Bytes for one call; without `max_bytes` they size its pieces, and are no bound."""

    op: str  # for errors
    max_bytes: int | None  # as the solver was given it
    total: float
    part: float = 1.0  # of the total, for this one of the things that are in memory at once
    taken: float = 0.0  # bytes of that part

    @classmethod
    def of(cls, op: str, max_bytes: int | None, whole_store: bool = False) -> Room:
        """All of `max_bytes`; without, what a call takes for all queries at once, or a default for
        one that goes over the `whole_store`."""
        unbounded = _DEFAULT if whole_store else math.inf
        return cls(op, max_bytes, unbounded if max_bytes is None else max_bytes)

    @property
    def num_bytes(self) -> float:
        return max(0.0, self.total * self.part - self.taken)

    @property
    def part_bytes(self) -> int | None:
        """Of the rows that are read at once, see `valid_rows`; some parts and copies are alive."""
        return None if self.total == math.inf else max(1, min(1 << 26, int(self.num_bytes / 8)))

    def share(self, share: float) -> Room:
        """A part of it, for one of the things that are in memory at once."""
        return replace(self, part=self.part * share, taken=self.taken * share)

    def beside(self, num_bytes: int) -> Room:
        """What is left beside so many bytes."""
        return replace(self, taken=self.taken + num_bytes)

    def need(self, what: str, num_bytes: float) -> None:
        """Raise if so many bytes are more than there is room for."""
        if self.max_bytes is not None and num_bytes > self.num_bytes:
            least = math.ceil((num_bytes + self.taken) / self.part) + 1
            raise ValueError(
                f"{self.op}: {what} needs max_bytes={least} or more, got {self.max_bytes}; raise "
                "it, or keep fewer coordinates"
            )

    def count(self, num_bytes: float) -> int:
        """How many things of so many bytes have room, at least one."""
        return max(1, int(min(self.num_bytes / max(1, num_bytes), 1 << 40)))

    def pieces(
        self, blocks: Sequence[LayerPlan], m: int, query_bytes: Callable[[int], int]
    ) -> Iterator[tuple[slice, slice]]:
        """Layers and queries to solve at once: layers that follow each other with all m queries,
        as many as have room, or one layer with some.

        Args:
            blocks: the layers, in the order of their columns.
            m: number of queries.
            query_bytes: width of some layers -> what one query takes of them.

        Raises:
            ValueError: one query of one layer has no room.
        """
        first = 0
        while first < len(blocks):
            last = first + 1
            while last < len(blocks) and self.num_bytes >= m * query_bytes(
                width(span(blocks[first : last + 1]))
            ):
                last += 1
            layers = slice(first, last)
            each = query_bytes(width(span(blocks[layers])))
            self.need(f"layer {blocks[first].name!r} (r={blocks[first].r})", each)
            step = self.count(each)
            for start in range(0, m, step):
                yield layers, slice(start, min(start + step, m))
            first = last


def span(blocks: Sequence[LayerPlan]) -> slice:
    """The columns from the first layer to the last."""
    return slice(blocks[0].entries.start, blocks[-1].entries.stop)


def within(block: LayerPlan, columns: slice) -> slice:
    """Where a layer stands among the columns."""
    return slice(block.entries.start - columns.start, block.entries.stop - columns.start)


def width(columns: slice) -> int:
    return columns.stop - columns.start
