"""Which examples of its data set the batches of a loader are made of."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from numbers import Integral
from typing import Any

from torch.utils.data import IterableDataset, Sampler


class Drawn:
    """Watches what the batch sampler of a loader draws, while it stays as it is otherwise.

    Batches are fetched ahead of their use, by workers too, but they come out in the order in which
    they were drawn. So the sampler is watched, and `next` is told of each batch that comes out.
    The loader's own sampler is changed in place, since loaders hold it in several places; and its
    class is, since iter() looks for __iter__ there and never at the object.

    Attributes:
        known: whether the loader has a batch sampler to watch.
    """

    def __init__(
        self,
        loader: Any,
        skipped: int = 0,
        done: Iterable[int] = (),
        cut: int = 0,
        most: int | None = None,
        elsewhere: bool = False,
    ) -> None:
        """Watch `loader`.

        Args:
            loader: a DataLoader, or anything else, of which nothing is known.
            skipped: so many batches of its first epoch will not come out, though they are drawn.
            done: examples to leave out of what is drawn, each as often as it is here; that all of
                them are drawn is looked at first.
            cut: so many batches to leave out of what is drawn first.
            most: examples; what is drawn behind them is padding, and left out. None: all are.
            elsewhere: some of those that are done may be drawn by other ranks.
        """
        self._drawn: deque[Any] = deque()
        self._indices: Any = None
        sampler = getattr(loader, "batch_sampler", None)
        self._sampler, self._kind = sampler, type(sampler)
        streamed = isinstance(getattr(loader, "dataset", None), IterableDataset)
        self.known = (
            isinstance(sampler, Sampler) and not streamed and getattr(loader, "in_order", True)
        )
        if not self.known:
            self._sampler = None
            return
        drawn, left, kind = self._drawn, Counter(done), self._kind

        class Watched(kind):
            def __iter__(self) -> Iterator[Any]:
                nonlocal skipped, cut
                first, skipped = skipped, 0
                start, cut = cut, 0
                drawn.clear()  # of an epoch that was not gone through to its end
                batches = islice(super().__iter__(), start, None)
                if most is not None:
                    batches = _first(batches, most)
                if left:
                    batches = _without(batches, left, elsewhere)
                for number, indices in enumerate(batches):
                    if number >= first:
                        drawn.append(indices)
                    yield indices

        sampler.__class__ = Watched

    def next(self) -> None:
        """The next batch comes out."""
        self._indices = self._drawn.popleft() if self._drawn else None

    def positions(self, num_examples: int) -> list[int]:
        """[B] the positions in the data set of the examples of the batch that came out last.

        They are -1 where the loader has none: of an `IterableDataset`, of a loader without a batch
        sampler, or if the batch has not as many examples as were drawn.
        """
        found = self._indices
        known = isinstance(found, list | tuple) and len(found) == num_examples
        if not known or not all(isinstance(index, Integral) for index in found):
            return [-1] * num_examples
        return [int(index) for index in found]

    def close(self) -> None:
        """Watch no longer."""
        if self._sampler is not None:
            self._sampler.__class__ = self._kind
            self._sampler = None


def _first(batches: Iterable[Sequence[int]], most: int) -> Iterator[Sequence[int]]:
    """What is drawn, as far as so many examples go."""
    for indices in batches:
        if most > 0:
            yield indices[:most]
        most -= len(indices)


def _without(
    batches: Iterable[Sequence[int]], left: Counter[int], elsewhere: bool
) -> list[list[int]]:
    """What is drawn, without the examples that are to be left out."""
    kept = []
    for indices in batches:
        batch = []
        for index in indices:
            if left[index]:
                left[index] -= 1
            else:
                batch.append(index)
        if batch:
            kept.append(batch)
    missing = [index for index, count in left.items() if count and not elsewhere]
    if missing:
        raise ValueError(
            f"collect: {len(missing)} of the examples whose rows are there, such as {missing[0]}, "
            "are not drawn by this loader; give the data set and sampler of then, or another path"
        )
    return kept
