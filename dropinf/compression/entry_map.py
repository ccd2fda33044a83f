"""Linear maps from the values of a parameter's kept coordinates to its entries of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dropinf.compression.projections import Projection


class EntryMap(ABC):
    """A linear map [n values] -> [r entries].

    Attributes:
        r: entries.
    """

    r: int

    @abstractmethod
    def __call__(self, values: Tensor, which: Tensor | None = None) -> Tensor:
        """[n, r] of values [n, k] at the coordinates numbered `which` [k], None for all."""

    @abstractmethod
    def digest(self) -> bytes:
        """What tells it from others, for a plan's fingerprint."""


class SignedSums(EntryMap):
    """Signed sums: coordinate c is a summand of one entry.

    Attributes:
        entry: [n] int64, the entry of each coordinate.
        sign: [n] int8, +1 or -1.
        first: number of the first coordinate among those of the layer.
        shares_first, shares_last: whether the layer's parameters before and behind it have a part
            in its first and last entry.
    """

    def __init__(
        self,
        entry: np.ndarray,
        sign: np.ndarray,
        first: int,
        shares_first: bool,
        shares_last: bool,
    ) -> None:
        self.first = first
        self.entry, self.sign = torch.from_numpy(entry), torch.from_numpy(sign)
        self.shares_first, self.shares_last = shares_first, shares_last
        self.r = int(entry.max()) + 1 if len(entry) else 0
        self._groups_on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict:
        # Devices may be others in another process.
        return {**self.__dict__, "_groups_on": {}}

    def __call__(self, values: Tensor, which: Tensor | None = None) -> Tensor:
        """[n, r] of values [n, k] at the coordinates numbered `which` [k], None for all."""
        device = values.device
        if which is None:
            # Copied to a device once, as a step is not to wait for the host.
            if device not in self._groups_on:
                self._groups_on[device] = self.groups[0].to(device), self.groups[1].to(device)
            index, sign = self._groups_on[device]
        else:
            found = by_entry(self.entry[which], self.sign[which], self.r)
            index, sign = (t.to(device) for t in found)
        # Not index_add, whose float atomics on a GPU add in any order.
        return (values[:, index] * sign).sum(2)  # of [n, r, s]

    def digest(self) -> bytes:
        """The entries and signs."""
        return self.entry.numpy().astype("<i8").tobytes() + self.sign.numpy().tobytes()

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor]:
        """[r, s] int64 numbers of the coordinates of each entry, and [r, s] int8 signs."""
        return by_entry(self.entry, self.sign, self.r)


class DenseProjection(EntryMap):
    """A projection of a whole layer's gradient, of which this is the part of one parameter."""

    def __init__(self, projection: Projection, first: int, size: int) -> None:
        """Of a parameter whose `size` numbers stand at `first` in the layer's."""
        self.projection, self.r = projection, projection.r
        self._first, self._size = first, size

    def __call__(self, values: Tensor, which: Tensor | None = None) -> Tensor:
        """[n, r] of values [n, k] at the coordinates numbered `which` [k], None for all."""
        if which is None:
            return self.projection.project(values, slice(self._first, self._first + self._size))
        which = which.to(values.device)
        order = which.argsort()
        return self.projection.project(values[:, order], which[order] + self._first)

    def digest(self) -> bytes:
        """The projection's kind and arguments."""
        return f"{self.projection!r} {self._first}".encode()


def by_entry(entry: Tensor, sign: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Coordinates entry by entry: [r, s] int64 their numbers, and [r, s] their signs.

    An entry of fewer than s, the largest number, is filled up with number 0 and sign 0. Signs may
    be floats of any size.
    """
    counts = torch.bincount(entry, minlength=r)
    s = max(1, int(counts.max())) if r else 1
    order = torch.argsort(entry, stable=True)
    at = (counts.cumsum(0) - counts)[:, None] + torch.arange(s)  # [r, s]
    real = torch.arange(s) < counts[:, None]
    if not len(order):
        order, sign = torch.zeros(1, dtype=torch.int64), sign.new_zeros(1)
    index = order[at.clamp(max=len(order) - 1)].where(real, 0)
    return index, sign[index] * real.to(torch.int8)
