"""The order in which the columns kernel of `sampled_outer` sums many coordinates.

A pass of the kernel stages columns of x and outputs of dy in shared memory, in cells of 16 bytes:
a column at eight positions. A lane has pieces of steps. It reads the cell of one column of x for a
piece, and in each of its steps multiplies that with the cell of another output; the sums of all its
steps stay in registers. `csrc/column_order.cpp` gives coordinates to lanes and steps, so that lanes
that read at a time read different banks. At r=65536 of 4096 x 4096 that is three passes, 11 % of
whose steps remain empty, and reads wait 7 % longer than they would without a conflict; at r=16384,
or where coordinates crowd in few rows and columns, as draws by energy do, 20 %.

Which lane sums an entry changes no sum: the order is not part of what a plan or a row means.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

try:
    _C = importlib.import_module("dropinf._C")
except ImportError:
    _C = None

# Of a pass, in csrc/cuda/sampled_outer.cuh and csrc/column_order.h.
OUTPUTS, INPUTS = 4096, 2048
STEPS, LANES = 48, 512
MAX_PASSES = 64
SHARED_BYTES = 2 * 16 * (OUTPUTS + INPUTS + 1)  # of a block
_CELL_BYTES = 16  # a column at eight positions
_STAGED_AT_ONCE = 4  # columns; windows begin at multiples


class ColumnOrder(NamedTuple):
    """Coordinates by the lanes and steps of the kernel.

    Attributes:
        passes: [num_passes, 5] int64 on the CPU. Each is i0, i1: its columns of x, I for the bias;
            o0, o1: its outputs; a bit for each piece that some lane has.
        packed: [num_passes, 24, 512] int32: where the cells of dy of two steps are, in bytes of a
            buffer, as two unsigned halves, the first step's below.
        columns: [num_passes, 8, 512] int32: where the cell of x of a piece is.
        target: [num_passes, 48, 512] int32: the coordinate that a step sums, k * s + j for
            coordinate j of entry k; -1 if it only repeats what another lane reads.
        num_entries, s: of the coordinates [r, s]; s is 1 where they are [r].
    """

    passes: Tensor
    packed: Tensor
    columns: Tensor
    target: Tensor
    num_entries: int
    s: int

    @property
    def element_size(self) -> int:
        """Bytes of an element of x and dy."""
        return 2

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the op takes."""
        return self[:4]


def column_order(
    o_idx: Tensor,
    i_idx: Tensor,
    I: int,
    O: int,
    *,
    bias: bool = False,
    device: torch.device | str | None = None,
) -> ColumnOrder | None:
    """The order of a layer's coordinates for elements of two bytes, cut into passes.

    Args:
        o_idx, i_idx: [r] int32; or [r, s], whose r * s coordinates are summed as if each were an
            entry.
        I, O: widths of x and dy.
        bias: i_idx = I names a virtual input.
        device: of the order; None is that of o_idx.

    Returns:
        The order; None where it would take more passes than one launch has.

    Raises:
        ValueError: indices are out of range, or shapes disagree.
        RuntimeError: the C++ extension is missing.
    """
    if _C is None:
        raise RuntimeError("column_order: needs the C++ extension dropinf._C, which is not here")
    good = o_idx.dtype == i_idx.dtype == torch.int32 and o_idx.shape == i_idx.shape
    if not good or o_idx.dim() not in (1, 2):
        raise ValueError(
            "column_order: o_idx and i_idx must be int32, both [r] or both [r, s], got "
            f"{o_idx.dtype} {tuple(o_idx.shape)} and {i_idx.dtype} {tuple(i_idx.shape)}"
        )
    device = o_idx.device if device is None else device
    o, i = (index.cpu().flatten().numpy() for index in (o_idx, i_idx))
    for name, index, size in (("o_idx", o, O), ("i_idx", i, I + bias)):
        if index.size and not 0 <= index.min() <= index.max() < size:
            raise ValueError(
                f"column_order: {name} must be in [0, {size}), got {index.min()} to {index.max()}"
            )
    passes, packed, columns, target = [], [], [], []
    for o0, o1 in _even(O, -(-O // OUTPUTS)):
        at = np.flatnonzero((o0 <= o) & (o < o1))
        made = _passes(at, o[at] - o0, i[at], I, bias)
        if made is None or len(passes) + len(made) > MAX_PASSES:
            return None
        for i0, i1, pieces, coordinate, cells, entries in made:
            first = np.where(coordinate < 0, ~coordinate, coordinate)
            halves = _CELL_BYTES * _cell(o[entries] - o0, OUTPUTS)[first].astype(np.uint32)
            passes.append((i0, i1, o0, o1, pieces))
            packed.append((halves[1::2] << 16 | halves[::2]).view(np.int32))
            columns.append((_CELL_BYTES * (OUTPUTS + cells)).astype(np.int32))
            target.append(np.where(coordinate < 0, -1, entries[first]).astype(np.int32))
    return ColumnOrder(
        torch.tensor(passes, dtype=torch.int64).reshape(-1, 5),
        *(
            torch.from_numpy(np.array(parts, np.int32).reshape(-1, rows, LANES)).to(device)
            for parts, rows in ((packed, STEPS // 2), (columns, 8), (target, STEPS))
        ),
        len(o_idx),
        o_idx.shape[1] if o_idx.dim() == 2 else 1,
    )


def _passes(at: np.ndarray, o: np.ndarray, i: np.ndarray, I: int, bias: bool) -> list | None:
    """The fewest ranges of columns, with about as many coordinates each, that fit; each is i0, i1,
    the pieces in use, the order, and which entries it has."""
    if not len(at):
        return []
    before = np.searchsorted(np.sort(i), np.arange(0, I + _STAGED_AT_ONCE, _STAGED_AT_ONCE))
    for count in range(max(-(-I // INPUTS), -(-len(at) // (STEPS * LANES))), MAX_PASSES + 1):
        nth = np.arange(1, count)
        cuts = _STAGED_AT_ONCE * np.searchsorted(before, nth * len(at) / count)
        cuts = np.clip(cuts, I - (count - nth) * INPUTS, np.minimum(nth * INPUTS, I))
        made = []
        for i0, i1 in zip([0, *cuts], [*cuts, I + bias], strict=True):
            here = np.flatnonzero((i0 <= i) & (i < i1))
            if not len(here):
                continue
            if min(i1, I) - i0 > INPUTS:
                break
            # The cell of the bias is behind those of x.
            x_cell = np.where(i[here] == I, INPUTS, _cell(i[here] - i0, INPUTS))
            order = _C.order_columns(x_cell.astype(np.int32), _cell(o[here], OUTPUTS))
            if order is None:
                break
            coordinate, cells, pieces = order
            made.append((int(i0), int(i1), pieces, coordinate, cells, at[here]))
        else:
            return made
    return None


def _even(size: int, count: int) -> list[tuple[int, int]]:
    """A range cut into about equal ones, at multiples of what is staged at once."""
    step = -(-size // count)
    step = -(-step // _STAGED_AT_ONCE) * _STAGED_AT_ONCE
    return [(begin, min(begin + step, size)) for begin in range(0, size, step)]


def _cell(column: np.ndarray, columns: int) -> np.ndarray:
    """Where the kernel stages a column of so many."""
    return (column % 4 * (columns // 4) + column // 4).astype(np.int32)
