"""A rank's share of the batches that one process would go through."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
)

from dropinf.rows.loaders import refuse_dataset

T = TypeVar("T", DataLoader, list)


@dataclass(frozen=True)
class Share:
    """The batches of these numbers, out of `total`; they follow each other where none is done."""

    numbers: tuple[int, ...]
    total: int

    @classmethod
    def of(cls, num_batches: int, rank: int, world_size: int) -> Share:
        """Those of a rank: as many as others have, or one more or fewer."""
        first, last = (-(-num_batches * r // world_size) for r in (rank, rank + 1))
        return cls(tuple(range(first, last)), num_batches)

    def without(self, done: Collection[int]) -> Share:
        """What is left of it."""
        left = tuple(number for number in self.numbers if number not in done)
        return Share(left, self.total)


def split(batches: T, *, rank: int | None = None, world_size: int | None = None) -> T:
    """A rank's share of the batches: whole ones that follow each other.

    Of the rank r of W it is batches ceil(N r / W) to ceil(N (r + 1) / W) - 1 of N, so that rank
    after rank has them in the order in which one process would. With fewer batches than ranks the
    last ranks have none.

        train = dropinf.split(loader, rank=0, world_size=2)  # batches of the first of two

    Args:
        batches: a DataLoader that draws the same batches on every rank, so no shuffling one; or a
            list of batches.
        rank, world_size: None are those of torch.distributed, or 0 of 1 where it is not
            initialised.

    Returns:
        What was given, with fewer batches: a DataLoader that draws from the same data set, so that
        ids of rows are positions in it; or a list.

    Raises:
        TypeError: it is neither, or its batches cannot be counted.
        ValueError: each rank would draw other batches, or there is no such rank.
    """
    refuse_dataset("split", batches)
    here = distributed.is_available() and distributed.is_initialized()
    if rank is None:
        rank = distributed.get_rank() if here else 0
    if world_size is None:
        world_size = distributed.get_world_size() if here else 1
    if not 0 <= rank < world_size:
        raise ValueError(f"split: rank must be 0 to {world_size - 1}, got {rank}")
    if isinstance(batches, list | tuple):
        return _List(batches, Share.of(len(batches), rank, world_size))
    if not isinstance(batches, DataLoader):
        raise TypeError(
            f"split: needs a DataLoader or a list of batches, got {type(batches).__name__}"
        )
    _refuse_unlike(batches)
    sampler = batches.batch_sampler
    try:
        num_batches = len(sampler)
    except TypeError:
        raise TypeError(
            f"split: {type(sampler).__name__} does not say how many batches it draws; give it a "
            "__len__"
        ) from None
    return _drawing(batches, _Batches(sampler, Share.of(num_batches, rank, world_size)))


def share_of(batches: Any) -> Share | None:
    """Of what `split` gave; None of anything else."""
    given = batches if isinstance(batches, _List) else getattr(batches, "batch_sampler", None)
    return given.share if isinstance(given, _List | _Batches) else None


def all_of(batches: Any) -> list[Any] | None:
    """The list that `split` was given; None of a DataLoader."""
    return batches.whole if isinstance(batches, _List) else None


def batch_of(batches: Any, number: int) -> Any:
    """One of all batches, of what `split` gave."""
    if isinstance(batches, _List):
        return batches.whole[number]
    sampler = batches.batch_sampler
    one = _Batches(sampler.whole, Share((number,), sampler.share.total))
    with torch.random.fork_rng(devices=[]):
        return next(iter(_drawing(batches, one)))


def left_of(batches: T, done: Collection[int]) -> T:
    """What `split` gave, without the batches of some numbers."""
    if isinstance(batches, _List):
        return _List(batches.whole, batches.share.without(done))
    sampler = batches.batch_sampler
    return _drawing(batches, _Batches(sampler.whole, sampler.share.without(done)))


def num_examples(batches: Any) -> int:
    """Of what `split` gave of a DataLoader; 0 if that is not known."""
    sampler = getattr(batches, "batch_sampler", None)
    if not isinstance(sampler, _Batches) or type(sampler.whole) is not BatchSampler:
        return 0
    n, size = len(sampler.whole.sampler), sampler.whole.batch_size
    return sum(min(size, n - size * number) for number in sampler.share.numbers)


def examples_before(batches: Any) -> dict[int, int] | None:
    """Number of a batch -> examples of all batches before it; None of a list, where that is not
    known."""
    sampler = getattr(batches, "batch_sampler", None)
    if not isinstance(sampler, _Batches):
        return None
    before, wanted, starts = 0, set(sampler.share.numbers), {}
    for number, indices in enumerate(sampler.whole):
        if number in wanted:
            starts[number] = before
        before += len(indices)
    return starts


class _List(list):
    def __init__(self, whole: Iterable[Any], share: Share) -> None:
        self.whole, self.share = list(whole), share
        super().__init__(self.whole[number] for number in share.numbers)


class _Batches(Sampler):
    """Draws what a batch sampler does, as far as it is of the share."""

    def __init__(self, whole: Any, share: Share) -> None:
        self.whole, self.share = whole, share

    def __len__(self) -> int:
        return len(self.share.numbers)

    def __iter__(self) -> Iterator[Any]:
        left = iter(self.share.numbers)
        wanted = next(left, None)
        if wanted is None:
            return
        for number, indices in enumerate(self.whole):
            if number == wanted:
                yield indices
                wanted = next(left, None)
                if wanted is None:
                    return


def _drawing(loader: DataLoader, sampler: Sampler) -> DataLoader:
    """A copy of a loader, of its class and with its options, that draws something else."""
    made = copy.copy(loader)
    # Beside its __setattr__, which refuses it; workers that persist are the first one's.
    made.__dict__.update(batch_sampler=sampler, _iterator=None)
    return made


def _refuse_unlike(loader: DataLoader) -> None:
    """Refuse a loader whose batches are not the same on all ranks."""
    if hasattr(loader, "base_dataloader"):  # what accelerate makes, which draws of a loader inside
        raise ValueError(
            "split: this loader is of Accelerator.prepare, which draws a rank's share already and "
            "fills up its last batch; give the loader as it was before"
        )
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        raise TypeError(
            "split: the batches of an IterableDataset, or of a loader without batch_size, cannot "
            "be counted; share the data out yourself, and give ids= to collect"
        )
    if share_of(loader) is not None or isinstance(loader.sampler, DistributedSampler):
        raise ValueError(
            "split: this loader has a rank's share already; give one of the whole data set"
        )
    if isinstance(loader.sampler, RandomSampler):
        raise ValueError(
            "split: a loader that shuffles draws other batches on every rank; give shuffle=False, "
            "as a row does not depend on the order"
        )
