"""A loader's batches behind those whose rows are there, and whose rows they give."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from dropinf.rows.drawn import Drawn
from dropinf.rows.ids import GivenIds, Ids, as_ids, ids_of_batch, listed
from dropinf.rows.part_files import bytes_of
from dropinf.user_warning import warn_user

_OTHER_PATH = "give another path, or remove it"


@dataclass
class Past:
    """What a store has of a collection already.

    Attributes:
        examples, batches: how many became rows.
        ids: of the examples, None if they are known by their positions.
        first: of the first batch, how many examples it has, and a checksum of what is in it.
    """

    examples: int = 0
    batches: int = 0
    ids: Ids | None = None
    first: dict[str, int] | None = None


class Source:
    """Batches of a loader, and the ids of each.

    Args:
        loader: as of `collect`.
        ids: as of `collect`.
        past: what to leave out.
        where: the directory, for errors.
        shared: other ranks draw others, among them some of what is past.
        most: examples before what is padding, see `Drawn`.
    """

    def __init__(
        self,
        loader: Iterable,
        ids: GivenIds | None,
        past: Past,
        where: object = None,
        shared: bool = False,
        most: int | None = None,
    ) -> None:
        self._loader, self._given, self._past, self._where = loader, ids, past, where
        self._batch: Any = None
        self._first_crc32 = 0
        self._known: bool | None = None  # whether the ids of batches are, once one was asked for
        if past.batches:
            self._known = past.ids is not None
        map_style = Drawn(loader)
        map_style.close()
        self._cuts = map_style.known
        # One batch more is drawn where ids have to be read out of it.
        self._read_past = past.batches if not self._cuts else min(past.batches, 1 if ids else 0)
        if not self._cuts:
            self._drawn = Drawn(loader)
        elif shared:
            done = past.ids.tolist() if isinstance(past.ids, Tensor) else ()
            self._drawn = Drawn(loader, done=done, most=most, elsewhere=True)
        elif ids is not None or (past.batches and past.ids is None):
            self._drawn = Drawn(loader, cut=past.batches - self._read_past)
        else:
            done = past.ids.tolist() if isinstance(past.ids, Tensor) else ()
            self._drawn = Drawn(loader, done=done)
        _say_dropped(loader)

    def __iter__(self) -> Iterator[Any]:
        """The batches that are not done."""
        past = self._past
        if past.batches and self._cuts:
            self._compare_first(self._first_again())
        number = -1
        for number, batch in enumerate(self._loader):
            self._drawn.next()
            if not past.batches and number == 0:
                self._first_crc32 = checksum(batch)  # by now, since loss_fn may change it
            if number < self._read_past:
                if not self._cuts and number == 0:
                    self._compare_first(batch)
                if number + 1 == self._read_past:
                    self._compare_last(batch)
                continue
            self._batch = batch
            yield batch
        if number + 1 < self._read_past:
            raise ValueError(
                f"collect: the loader gave {number + 1} batches, fewer than the {past.batches} "
                f"whose rows are in {self._where}; {_OTHER_PATH}"
            )

    def ids(self, num_examples: int) -> Ids | None:
        """Of the examples of the last batch; None if only their order is known."""
        if self._given is not None:
            return ids_of_batch(self._given, self._batch, num_examples)
        found = self._drawn.positions(num_examples) if self._drawn.known else [-1]
        known = -1 not in found
        if self._known is None:
            self._known = known
            if not known:
                self._say_unknown()
        if self._known and not known:
            raise ValueError(
                f"collect: a batch gives {num_examples} losses where the sampler drew another "
                "number of examples, so that it is not known whose rows they are; give ids= (a key "
                "of the batch, or a function of it)"
            )
        return as_ids("collect", found) if self._known else None

    def first(self, num_examples: int) -> dict[str, int]:
        """What tells the first batch from others."""
        return {"examples": num_examples, "crc32": self._first_crc32}

    def close(self) -> None:
        """Leave the loader as it was."""
        self._drawn.close()

    def _first_again(self) -> Any:
        """The first batch, fetched anew by its ids; None if that cannot be."""
        past, loader = self._past, self._loader
        if self._given is not None or not isinstance(past.ids, Tensor) or past.first is None:
            return None
        if getattr(type(loader), "__iter__", None) is not DataLoader.__iter__:
            return None  # one that makes something else of its batches
        indices = list(dict.fromkeys(past.ids[: 1 << 20].tolist()))[: past.first["examples"]]
        if len(indices) != past.first["examples"]:
            return None
        with torch.random.fork_rng(devices=[]):
            try:
                fetch = getattr(loader.dataset, "__getitems__", None)
                found = fetch(indices) if fetch else [loader.dataset[i] for i in indices]
                return loader.collate_fn(found)
            except (IndexError, KeyError) as error:
                raise ValueError(
                    f"collect: the rows in {self._where} are of examples that this loader's data "
                    f"set does not have ({type(error).__name__}); {_OTHER_PATH}"
                ) from None

    def _compare_first(self, batch: Any) -> None:
        past = self._past
        if batch is None or past.first is None or checksum(batch) == past.first["crc32"]:
            return
        if self._cuts and checksum(self._first_again()) != checksum(batch):
            return  # drawn anew at each look, as by a collator that masks at random
        raise ValueError(
            f"collect: the first batch holds something else than when {self._where} was begun; "
            "give the data and batch size of then, or another path"
        )

    def _compare_last(self, batch: Any) -> None:
        """The last batch that is done must have the ids of the last rows."""
        if self._given is None or self._past.ids is None:
            return
        found = ids_of_batch(self._given, batch, -1)
        there = self._past.ids[-len(found) :]
        if listed(found) != listed(there):
            raise ValueError(
                f"collect: batch {self._past.batches - 1} has other ids than the rows in "
                f"{self._where}; give the loader the order and batch size of then (a seeded "
                "generator, if it shuffles), or another path"
            )

    def _say_unknown(self) -> None:
        loader = self._loader
        if isinstance(loader, list | tuple):
            return  # whose order is there to see
        what = type(loader).__name__
        if isinstance(getattr(loader, "dataset", None), IterableDataset):
            what = "a loader of an IterableDataset"
        warn_user(
            f"collect: {what} does not say which examples it draws, so that rows are known by the "
            "order in which they come; ids= (a key of the batch, or a function of it) names them"
        )


def checksum(batch: Any) -> int:
    """Of the tensors, numbers and strings in a batch."""
    crc = 0
    for leaf in pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
        if isinstance(leaf, Tensor):
            crc = zlib.crc32(f"{leaf.dtype} {tuple(leaf.shape)}".encode(), crc)
            plain = leaf.layout == torch.strided and not (leaf.is_meta or leaf.is_complex())
            if plain and leaf.numel():
                crc = zlib.crc32(bytes_of(leaf.detach().cpu()), crc)
        elif isinstance(leaf, str | int | float | bytes):
            crc = zlib.crc32(repr(leaf).encode(), crc)
    return crc


def _say_dropped(loader: Iterable) -> None:
    sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(sampler, "whole", sampler)  # which `split` shares out
    try:
        n, ranks = len(sampler.sampler), 1
        size = sampler.batch_size if getattr(sampler, "drop_last", False) else 1
        kept = n - n % size
        if isinstance(sampler.sampler, DistributedSampler):
            n, ranks = len(sampler.sampler.dataset), sampler.sampler.num_replicas
    except (TypeError, AttributeError):
        return
    left = n - kept * ranks
    if left > 0:
        warn_user(
            f"collect: drop_last=True leaves the last {left} of {n} examples without rows; "
            "drop_last=False keeps them"
        )
