"""The order in which the CUDA kernel of `sampled_outer` sums its coordinates.

The kernel stages positions x[b, t, :] and dy[b, t, o0:o1] in shared memory. Every lane keeps some
coordinates and their float32 sums in registers, and for each position reads x[i] and dy[o]. Shared
memory has 32 banks of 4 bytes, and a warp of 32 lanes waits for a bank as often as its lanes ask it
for different words. The coordinates stay the same for a whole run, so they are ordered once:

Each coordinate goes to the first warp that can take it: one with a lane left, in whose banks its
two words are, or none yet. So no warp reads two words of a bank, of x or of dy, and lanes that read
one word share it. That leaves 4 % of slots over at r=4096 of 768 x 768 in 2 bytes, and 1 to 3 % of
coordinates that crowd in few rows and columns, as draws by energy do; without sharing no order
would leave less than 23 % and 56 to 406 %, the coordinates of the fullest bank. A lane that is left
over repeats a coordinate of its warp, so that it reads a word that is read anyway.

Which lane sums an entry changes no sum: the order is not part of what a plan or a row means.
"""

from __future__ import annotations

import importlib
import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

try:
    _C = importlib.import_module("dropinf._C")
except ImportError:
    _C = None

AVAILABLE = _C is not None
WARP = 32  # lanes; and banks of shared memory
_BANK_BYTES = 4
_COPY_BYTES = 16  # what the kernel stages at once; windows of dy are aligned to it
_MAX_BYTES = 1 << 16  # of x or of a window: the kernel has 16 bits for an offset in bytes
# More passes than one sorted range of outputs needs; a layer's weight and bias are two ranges.
_MAX_RANGES = 4


class StagedOrder(NamedTuple):
    """Coordinates in the order of the kernel's lanes; lane l of warp w has slot 32 w + l.

    Attributes:
        passes: [num_passes, 6] int64 on the CPU. Each is k0, k1: its entries; o0, o1: the outputs
            that it stages; first, num_slots: its slots, a multiple of 32.
        packed: [num_slots] int32: (o - o0) << 16 | i, two unsigned halves.
        target: [num_slots] int32: the place of this slot's sum among those of the pass,
            (k - k0) * s + j for coordinate j of entry k; -1 if the lane only repeats another.
        element_size: bytes of an element of x and dy, which says what shares a bank.
        s: of the coordinates [r, s]; 1 where they are [r].
    """

    passes: Tensor
    packed: Tensor
    target: Tensor
    element_size: int
    s: int

    @property
    def num_entries(self) -> int:
        """r of the coordinates."""
        return int(self.passes[-1, 1]) if len(self.passes) else 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the op takes."""
        return self[:3]


def staged_order(
    o_idx: Tensor,
    i_idx: Tensor,
    I: int,
    O: int,
    element_size: int,
    *,
    bias: bool = False,
    max_slots: int = 9600,
    max_bytes: int = 40 * 1024,
    device: torch.device | str | None = None,
) -> StagedOrder | None:
    """The order of a layer's coordinates without bank conflicts, cut into passes.

    A pass is a range of entries, whose window of outputs, first to last, is staged with all of x.
    Each takes what fits, and they are about equally full.
    Shared memory must hold x and the window from the start of a word on, for this to hold.

    Args:
        o_idx, i_idx: [r] int32, sorted by (o, i) where O is too wide for one pass; or [r, s].
        I, O: widths of x and dy.
        element_size: 2 or 4, bytes of an element of x and dy.
        bias: i_idx = I names a virtual input, which is staged behind x.
        max_slots: of a pass, those that only fill up a warp included; the kernel takes no more than
            the default, kMaxStagedSlots.
        max_bytes: of the shared memory for one position; x and the window of dy are each padded to
            a multiple of 16. The kernel holds four positions or more, so with the default 160 KB,
            of the 163 that a block can have on sm_80; an order that a device has no room for is
            not taken, and the call is direct.
        device: of the order; None is that of o_idx.

    Returns:
        The order; None where x is too wide, or the coordinates are too far apart to be cut into
        windows that fit.

    Raises:
        ValueError: indices are out of range, or shapes disagree.
        RuntimeError: the C++ extension is missing.
    """
    if _C is None:
        raise RuntimeError("staged_order: needs the C++ extension dropinf._C, which is not here")
    if element_size not in (2, 4):
        raise ValueError(f"staged_order: element_size must be 2 or 4, got {element_size}")
    o, i = (_as_entries(name, t) for name, t in (("o_idx", o_idx), ("i_idx", i_idx)))
    if o.shape != i.shape:
        raise ValueError(
            f"staged_order: o_idx and i_idx must have one shape, got {tuple(o_idx.shape)} and "
            f"{tuple(i_idx.shape)}"
        )
    width = I + bias
    for name, index, size in (("o_idx", o, O), ("i_idx", i, width)):
        if index.size and not 0 <= index.min() <= index.max() < size:
            raise ValueError(
                f"staged_order: {name} must be in [0, {size}), got {index.min()} to {index.max()}"
            )
    device = o_idx.device if device is None else device
    align = _COPY_BYTES // element_size
    room = (max_bytes - padded(width * element_size)) // _COPY_BYTES * align  # elements of dy
    max_outputs = min(room, _MAX_BYTES // element_size)
    if width * element_size > _MAX_BYTES or max_outputs <= 0:
        return None
    # Cuts help coordinates that rise with o, but for a few places where another range of outputs
    # begins: those of a layer's weight, and then of its bias.
    ranges = 1 + np.count_nonzero(o.ravel()[1:] < o.ravel()[:-1])
    if ranges > _MAX_RANGES and _window(o, align, O)[2] > max_outputs:
        return None
    max_warps = max_slots // WARP
    bounds = _C.cut_passes(o, i, element_size, align, max_outputs, max_warps) if o.size else []
    if o.size and not len(bounds):
        return None
    passes, packed, target, first = [], [np.empty(0, np.int32)], [np.empty(0, np.int32)], 0
    for k0, k1 in itertools.pairwise(bounds):
        o_here, i_here = o[k0:k1].ravel(), i[k0:k1].ravel()
        o0, o1, _ = _window(o_here, align, O)
        of_slot, real = _slots(_word(i_here, element_size), _word(o_here - o0, element_size))
        both = (o_here - o0).astype(np.uint32) << 16 | i_here.astype(np.uint32)
        packed.append(both.view(np.int32)[of_slot])
        target.append(np.where(real, of_slot, -1).astype(np.int32))
        passes.append((k0, k1, o0, o1, first, len(of_slot)))
        first += len(of_slot)
    if not o.size and len(o):  # entries without a coordinate: zeros
        passes.append((0, len(o), 0, 0, 0, 0))
    return StagedOrder(
        torch.tensor(passes, dtype=torch.int64).reshape(-1, 6),
        torch.from_numpy(np.concatenate(packed)).to(device),
        torch.from_numpy(np.concatenate(target)).to(device),
        element_size,
        o.shape[1],
    )


def _slots(x_word: np.ndarray, dy_word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[num_slots] the coordinate that each slot has, and whether it is the first to have it."""
    warp, num_warps = _C.pack_warps(x_word, dy_word)
    by_warp = np.argsort(warp, kind="stable")
    sizes = np.bincount(warp, minlength=num_warps)
    begins = np.cumsum(sizes) - sizes
    lane = np.arange(WARP)
    real = lane < sizes[:, None]
    return by_warp[begins[:, None] + np.where(real, lane, 0)].ravel(), real.ravel()


def _window(o: np.ndarray, align: int, O: int) -> tuple[int, int, int]:
    """The outputs o0 to o1 to stage for these, and what room they take."""
    o0 = int(o.min()) // align * align
    room = int(o.max()) // align * align + align - o0
    return o0, min(O, o0 + room), room


def _word(index: np.ndarray, element_size: int) -> np.ndarray:
    return index * element_size // _BANK_BYTES


def padded(num_bytes: int) -> int:
    """What a row of that many bytes takes in shared memory."""
    return -(-num_bytes // _COPY_BYTES) * _COPY_BYTES


def _as_entries(name: str, index: Tensor) -> np.ndarray:
    """[r, s] int32 of [r] or [r, s]."""
    if index.dtype != torch.int32 or index.dim() not in (1, 2):
        raise ValueError(
            f"staged_order: {name} must be int32 [r] or [r, s], got {index.dtype} "
            f"{tuple(index.shape)}"
        )
    index = index.cpu().contiguous()
    return (index[:, None] if index.dim() == 1 else index).numpy()
