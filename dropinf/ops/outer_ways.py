"""Which way `sampled_outer` takes on CUDA: a rule of r, of the layer's shape and of the chip.

Every number that the choice turns on stands here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dropinf.ops import column_schedule
from dropinf.ops.bank_schedule import StagedOrder, padded, staged_order
from dropinf.ops.column_schedule import ColumnOrder

Order = StagedOrder | ColumnOrder

_KB = 1024
# What a chip has: bytes of shared memory for a block (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"). An SM has 1 KB more, and keeps 1 KB of each block.
BLOCK_BYTES = {
    "sm_80": 163 * _KB,
    "sm_86": 99 * _KB,
    "sm_89": 99 * _KB,
    "sm_90": 227 * _KB,
    "sm_100": 227 * _KB,
}
_DEFAULT_CHIP = "sm_90"  # of tensors that are not on CUDA: the chip of the measurements
_KEPT_BYTES = _KB

SECTOR_BYTES = 32  # direct is as fast as one read of x and dy where each coordinate costs this much
# Columns take as long as three passes of the staged kernel: on an H200, with B=8, T=2048, I=O=4096,
# 156 us in 2 passes at r=16384, where columns take more than 233, and 535 in 8 at 65536, where they
# take 303. So they need more coordinates than one pass has, and so many of each column of x, in
# each window of outputs: 28672 there.
MANY, COLUMN_COORDINATES = 9600, 7
# Not measured: of a staged order no more than half may be padding.
MOST_SLOTS = 2  # for a coordinate

# What the staged kernel does (run_staged in csrc/cuda/sampled_outer.cu): two buffers of 2 to 16
# positions, more than 2 only if both take no more than 80 KB.
_LEAST_POSITIONS, _MOST_POSITIONS, _BUFFER_BYTES = 2, 16, 80 * _KB

# Predicted: the share of the memory's bandwidth that staged blocks reach, by how many an SM holds.
# A block alone copies 82 KB in 2.6 us, at 32 bytes a ns for an SM, and then some 0.8 us of latency
# are not hidden; of two blocks one copies while the other waits.
_SHARE_OF_BANDWIDTH = {1: 0.75, 2: 0.95}


def order_if_faster(
    o_idx: Tensor, i_idx: Tensor, I: int, O: int, element_size: int, *, bias: bool = False
) -> Order | None:
    """The order of the kernel that should be fastest, or None for the direct one, which needs none.

    Direct: for few coordinates. Both others read x and dy whole, in every pass, so most of the
    sectors that they read must hold a coordinate.
    Columns: for many in elements of two bytes, where the staged kernel takes more than three
    passes of some 70 us: of 4096 x 4096 it takes 230 us for 8192 coordinates and 300 for 65536.
    Staged: else. Its sums take a time in proportion to the slots, so few of them may be padding:
    coordinates in many words of few banks (of every 64th column) have a warp for each.

    Measured on an H200 at r = 64, 1024, 8192, 16384 and 65536 (docs/gpu.md), B=8, T=2048.

        order = order_if_faster(o_idx, i_idx, 4096, 4096, 2)

    Args:
        o_idx, i_idx: [r] or [r, s] int32, as for `staged_order`; on the device of the call.
        I, O: widths of x and dy.
        element_size: 2 or 4, bytes of an element of x and dy.
        bias: i_idx = I names a virtual input.

    Returns:
        The order, on that device; None for the direct way.

    Raises:
        ValueError: indices are out of range, or shapes disagree.
        RuntimeError: the C++ extension is missing.
    """
    r = o_idx.numel()
    if r * SECTOR_BYTES < (I + O) * element_size:
        return None
    room = block_bytes(o_idx.device)
    windows = -(-O // column_schedule.OUTPUTS)
    many = r >= max(MANY, COLUMN_COORDINATES * I * windows)
    if many and element_size == 2 and room >= column_schedule.SHARED_BYTES:
        columns = column_schedule.column_order(o_idx, i_idx, I, O, bias=bias)
        if columns is not None:
            return columns
    staged = _staged(o_idx, i_idx, I, O, element_size, bias, room)
    if staged is None or len(staged.packed) > MOST_SLOTS * r:
        return None
    return None if r * SECTOR_BYTES < sum(_pass_bytes(staged, I + bias)) else staged


def block_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on a device.

    Those of sm_90 for a device that is not CUDA; 0 where torch does not say, as of ROCm, so that
    calls there are direct.

        outer_ways.block_bytes(torch.device("cpu"))  # 232448
    """
    if device.type != "cuda":
        return BLOCK_BYTES[_DEFAULT_CHIP]
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0)


def _staged(
    o_idx: Tensor, i_idx: Tensor, I: int, O: int, element_size: int, bias: bool, room: int
) -> StagedOrder | None:
    """The staged order that should be fastest on a chip whose blocks have that room.

    A block holds four positions or more, so a position may have a fourth of what the block has: 56
    KB on sm_90, in which x and dy of 4096 x 16384 fit, in one pass. But above 28 KB an SM there has
    one block instead of two, which waits for its copies where two overlap. So the fewest passes are
    taken only where they save bytes enough: a bias aside, two passes of I=4096, O=16384 read 1.2
    times what one reads, x twice, and two blocks make up for that; if x is the wide side, I=16384,
    O=4096, no window of dy fits beside it in 28 KB, and one pass is taken.
    """
    width = I + bias
    whole = padded(width * element_size) + padded(O * element_size)
    limits = [room // (2 * _LEAST_POSITIONS)]
    of_two_blocks = ((room + _KEPT_BYTES) // 2 - _KEPT_BYTES) // (2 * _LEAST_POSITIONS)
    if whole > of_two_blocks:
        limits.append(of_two_blocks)
    made = [
        staged_order(o_idx, i_idx, I, O, element_size, bias=bias, max_bytes=limit)
        for limit in limits
    ]
    here = [order for order in made if order is not None]
    return min(here, key=lambda order: _cost(order, width, room), default=None)


def _cost(order: StagedOrder, width: int, room: int) -> float:
    """What an order takes, as bytes of a position at full bandwidth. Predicted."""
    passes = _pass_bytes(order, width)
    positions, most = _LEAST_POSITIONS, max(passes, default=0)
    while 2 * positions <= _MOST_POSITIONS and 4 * positions * most <= _BUFFER_BYTES:
        positions *= 2
    taken = 2 * positions * most + _KEPT_BYTES
    return sum(passes) / _SHARE_OF_BANDWIDTH[2 if 2 * taken <= room + _KEPT_BYTES else 1]


def _pass_bytes(order: StagedOrder, width: int) -> list[int]:
    """Of a position, what each pass stages: x, and its window of dy."""
    size = order.element_size
    return [
        padded(width * size) + padded((o1 - o0) * size)
        for _, _, o0, o1, *_ in order.passes.tolist()
    ]
