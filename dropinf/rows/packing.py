"""How rows are kept: as they are, or in fewer bytes, from which they are read as float32 again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dropinf.compression import Plan

_PLAIN = (torch.float32, torch.float64, torch.bfloat16)
_SCALED = (torch.float16, torch.int8)  # whose range is too small without a scale
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*_PLAIN, *_SCALED)}

_LEAST_SCALE = 2.0**-126  # the smallest that float32 divides by with all its digits
_LARGEST = 0.99 * torch.finfo(torch.float32).max  # which rounding to fewer digits leaves finite
_PIECE = 64  # rows whose temporaries stay in a cache


class Kept(NamedTuple):
    """Rows as they are kept: rows[:, k] = numbers[:, k] * scales[:, layer of k]."""

    numbers: Tensor  # [c, R] of the dtype that they are kept in, stride 1 in R
    scales: Tensor | None  # [c, L] float32, stride 1 in L; None is one each


@dataclass(frozen=True)
class Packing:
    """The dtype of kept rows, and where their layers stand.

    float32, float64 and bfloat16 are kept as they are. float16 and int8 have a float32 scale for
    each row and layer: a power of two for float16, so that a layer's largest entry is between 2^14
    and 2^15 and none is beyond its range; for int8 a 127th of the largest entry, so that an
    entry is off by half a scale at most. A row's scales stand before its numbers.

    Attributes:
        dtype: one of `DTYPES`.
        bounds: column bounds of the layers, L + 1 of them.
    """

    dtype: torch.dtype
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, dtype: torch.dtype) -> Packing:
        """Of rows under a plan.

        Raises:
            ValueError: rows are not kept in that dtype.
        """
        if dtype not in DTYPES.values():
            raise ValueError(
                f"RowStore: rows are kept in one of {', '.join(DTYPES)}, not {dtype!r}"
            )
        return cls(dtype, (*(block.offset for block in plan.blocks), plan.width))

    @property
    def width(self) -> int:
        """R."""
        return self.bounds[-1]

    @property
    def num_scales(self) -> int:
        """Scales of a row."""
        return len(self.bounds) - 1 if self.dtype in _SCALED else 0

    @property
    def read_dtype(self) -> torch.dtype:
        """The dtype in which rows are read."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def pack(self, rows: Tensor) -> Tensor:
        """Rows [c, R] as they are kept: [c, R], or with scales [c, bytes of a row] uint8.

        Rows in `dtype` without scales are not copied; all others must be finite.

        Raises:
            ValueError: a row is beyond the range of `dtype`.
        """
        if rows.dtype == self.dtype and not self.num_scales:
            return rows
        rows = rows.to(torch.float32 if self.num_scales else self.dtype)
        self._check_range(finite_rows(rows), 0, len(rows))
        if not self.num_scales:
            return rows
        layers = self._layers(rows.device)
        packed = rows.new_zeros(
            len(rows), row_bytes(self.dtype, self.width, self.num_scales), dtype=torch.uint8
        )
        numbers, scales = self.views(packed)
        for at in _pieces(len(rows)):
            piece = rows[at]
            index = layers.expand(len(piece), -1)
            most = piece.new_zeros(len(piece), self.num_scales)
            most.scatter_reduce_(1, index, piece.abs(), "amax")
            self._check_range((most <= _LARGEST).all(1), at.start, len(rows))
            if self.dtype == torch.float16:
                exponent = (torch.frexp(most).exponent - 15).clamp(min=-126)
                # By its bits, since not every device's power of two is exact.
                scales[at] = ((exponent + 127) << 23).view(torch.float32)
            else:
                # By a tensor: on a GPU torch multiplies by the inverse of a number.
                scales[at] = (most / most.new_full((), 127.0)).clamp(min=_LEAST_SCALE)
            scaled = piece / scales[at].gather(1, index)
            numbers[at] = scaled if self.dtype == torch.float16 else scaled.round_()
        return packed

    def _check_range(self, within: Tensor, first: int, n: int) -> None:
        if not within.all():
            at = first + int((~within).nonzero()[0])
            raise ValueError(
                f"RowStore: row {at} of {n} is beyond the range of {self.dtype}, in which it is to "
                "be kept; scale the loss, or keep rows as they are"
            )

    def views(self, packed: Tensor) -> Kept:
        """The numbers and scales in packed rows; views."""
        if not self.num_scales:
            return Kept(packed, None)
        first = 4 * self.num_scales
        numbers = packed[:, first : first + self.width * self.dtype.itemsize].view(self.dtype)
        return Kept(numbers, packed[:, :first].view(torch.float32))

    def unpack(self, packed: Tensor, columns: Sequence[slice] = (slice(None),)) -> Tensor:
        """The columns of packed rows side by side, as they are read: a view where that can be."""
        if not self.num_scales:
            return take(packed, columns).to(self.read_dtype)
        numbers, scales = self.views(packed)
        layers = take(self._layers(packed.device)[None], columns)
        numbers = take(numbers, columns)
        rows = scales.new_empty(numbers.shape)
        for at in _pieces(len(rows)):
            torch.gather(scales[at], 1, layers.expand(len(scales[at]), -1), out=rows[at])
            rows[at].mul_(numbers[at])
        return rows

    def _layers(self, device: torch.device) -> Tensor:
        """[R] int64: the layer of each entry."""
        widths = torch.tensor(self.bounds).diff()
        return torch.arange(len(widths)).repeat_interleave(widths).to(device)


def finite_rows(rows: Tensor) -> Tensor:
    """[n] whether all entries of a row are finite.

    The terms of a finite sum are, and a sum is one read of the rows where isfinite makes copies.
    """
    sums = rows.sum(1).isfinite()
    return sums if sums.all() else rows.isfinite().all(1)


def row_bytes(dtype: torch.dtype, width: int, num_scales: int) -> int:
    """Bytes of a row as it is kept, a multiple of 4 where there are scales."""
    num_bytes = width * dtype.itemsize
    return num_bytes if not num_scales else 4 * num_scales + -(-num_bytes // 4) * 4


def take(rows: Tensor, columns: Sequence[slice]) -> Tensor:
    """The columns side by side: a view of the rows if they are one slice."""
    if len(columns) == 1:
        return rows[:, columns[0]]
    return torch.cat([rows[:, part] for part in columns], 1)


def _pieces(n: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, n, _PIECE))
