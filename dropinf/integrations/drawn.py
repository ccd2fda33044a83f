"""Which examples of its data set the batches of a training loader are made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from numbers import Integral
from typing import Any

from torch.utils.data import IterableDataset, Sampler


class Drawn:
    """Watches what the batch sampler of a loader draws, while it stays as it is otherwise.

    Batches are fetched ahead of training, by workers too, but they come out in the order in which
    they were drawn. So the sampler is watched, and `next` is told of each batch that comes out.
    The loader's own sampler is changed in place, since loaders hold it in several places; and its
    class is, since iter() looks for __iter__ there and never at the object.
    """

    def __init__(self, loader: Any, skipped: int = 0) -> None:
        """Watch `loader`, of whose first epoch the first `skipped` batches will not come out."""
        self._drawn: deque[Any] = deque()
        self._indices: Any = None
        self._sampler = sampler = getattr(loader, "batch_sampler", None)
        self._kind = kind = type(sampler)
        streamed = isinstance(loader.dataset, IterableDataset)
        if streamed or not isinstance(sampler, Sampler) or not getattr(loader, "in_order", True):
            self._sampler = None
            return
        drawn = self._drawn

        class Watched(kind):
            def __iter__(self) -> Iterator[Any]:
                nonlocal skipped
                first, skipped = skipped, 0
                drawn.clear()  # of an epoch that was not trained to its end
                for number, indices in enumerate(super().__iter__()):
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
