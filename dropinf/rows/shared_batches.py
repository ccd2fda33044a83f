"""Which batches a rank goes through, of those that all ranks share out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from dropinf.rows.drawn import Drawn
from dropinf.rows.ids import GivenIds, ids_of_batch, listed
from dropinf.rows.part import Part
from dropinf.rows.resuming import Past, Source, checksum
from dropinf.rows.shares import all_of, batch_of, examples_before, left_of, share_of, split
from dropinf.rows.writing import of_examples
from dropinf.world import World

_AS_THEN = "give the data, order and batch size of then, or another path"


class SharedBatches:
    """The batches of one rank, and which of all they are.

    Attributes:
        numbers: of those to come, None if they have none.
        starts: number -> examples of all batches before it, where rows say the number of their own.
        first: of a list, what tells its first batch from others.
    """

    def __init__(self, world: World, path: Path, before: Sequence[Part], past: Past) -> None:
        """Behind the parts that are there, and what they have."""
        self.numbers: list[int] | None = None
        self.starts: dict[int, int] | None = {}
        self.first: dict[str, int] | None = None
        self._world, self._path, self._before, self._past = world, path, before, past

    def source(self, loader: Iterable, ids: GivenIds | None, per: str, sharded: bool) -> Source:
        """The batches of this rank that are not done; of a `sharded` model all ranks need as many.

        Raises:
            ValueError: nothing tells whose rows they are, or which of them are done.
        """
        found = self._source(loader, ids, per)
        own = None if self.numbers is None else len(self.numbers)
        said = self._world.meet("batches", [own, _what_is_split(loader)])
        counts = [count for count, _ in said]
        for rank, (_, what) in enumerate(said):
            if what != said[0][1]:
                raise ValueError(
                    f"collect: rank {rank} shares out other batches than rank 0; give all ranks "
                    "dropinf.split of the same batches, in the same order"
                )
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
            or not _known(loader)
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
        if ids is not None and self._past.batches:
            raise ValueError(
                f"collect: which batches are done in {self._path} is not known by ids=; give "
                "dropinf.split(loader), or another path"
            )
        most = None
        if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
            most = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
        done = Past(ids=self._past.ids)
        return Source(loader, ids, done, self._path, shared=True, most=most)

    def _source_of_share(self, loader: Any, ids: GivenIds | None, per: str) -> Source:
        done, number = set(), 0
        for part in self._before:
            if part.header.batch < 0 and part.extent.batches:
                raise ValueError(
                    f"collect: the rows in {self._path} are not of dropinf.split; go on with a "
                    "DistributedSampler as before, or give another path"
                )
            # Of one process, parts that it made one after the other.
            first = part.header.batch if part.header.rank >= 0 else number
            number = first + part.extent.batches
            done.update(range(first, number))
            if number > share_of(loader).total:
                raise ValueError(
                    f"collect: batch {number - 1} counts as done in {self._path}, and the loader "
                    f"has {share_of(loader).total}; {_AS_THEN}"
                )
            if ids is not None and number - 1 in share_of(loader).numbers and len(part):
                self._check_last(part, ids, batch_of(loader, number - 1), number - 1)
        whole = all_of(loader)
        if whole:
            self._check_first(checksum(whole[0]))
        if ids is None and isinstance(loader, DataLoader) and isinstance(self._past.ids, Tensor):
            self._check_done(loader, done)
        loader = left_of(loader, done)
        self.numbers = list(share_of(loader).numbers)
        if per != "example":
            self.starts = examples_before(loader)
            if self.starts is None:
                raise ValueError(
                    f"collect: rows of per={per!r} in several processes need the number of the "
                    "examples before a batch; give dropinf.split a DataLoader"
                )
        return Source(loader, ids, Past(), self._path)

    def _check_done(self, loader: DataLoader, done: set[int]) -> None:
        """The batches that count as done must be those whose rows are there."""
        mine, there = done.intersection(share_of(loader).numbers), set(self._past.ids.tolist())
        for number, indices in enumerate(loader.batch_sampler.whole):
            if number in mine and not there.issuperset(indices):
                raise ValueError(
                    f"collect: batch {number} counts as done in {self._path}, and holds other "
                    f"examples; {_AS_THEN}"
                )

    def _check_last(self, part: Part, ids: GivenIds, batch: Any, number: int) -> None:
        """The last batch of a part, as it is drawn now, must have the ids of its last rows."""
        found, there = ids_of_batch(ids, batch, -1), of_examples(part)
        if listed(there[len(there) - len(found) :]) != listed(found):
            raise ValueError(
                f"collect: batch {number} counts as done in {self._path}, and has other ids; "
                f"{_AS_THEN}"
            )

    def _check_first(self, crc32: int) -> None:
        """The first batch of a list must be that of then."""
        self.first = {"examples": 0, "crc32": crc32}
        if self._past.first is not None and self._past.first["crc32"] != crc32:
            raise ValueError(
                "collect: the first batch holds something else than when "
                f"{self._path} was begun; {_AS_THEN}"
            )


def _what_is_split(loader: Iterable) -> list[int] | None:
    """What tells the batches that are shared out from others: their number, of a list two."""
    share, whole = share_of(loader), all_of(loader)
    if share is None:
        return None
    return [share.total, *(checksum(batch) for batch in (whole or [])[:: max(1, share.total - 1)])]


def _known(loader: Any) -> bool:
    """Whether the examples of its batches are known."""
    watched = Drawn(loader)
    watched.close()
    return watched.known
