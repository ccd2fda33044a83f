"""The merge of score_topk in Triton: scores into each query's running largest k, k up to 1024.

One program a query reads its scores once. A score that enters is rare after the first thousands
of rows, so a wide tile is only compared with the smallest score that is kept; where one enters,
the tile is sorted and merged block by block.

Scores and their order of ties are packed into one int64, a score's float32 bits in the upper half:
then sorting needs no second tensor, and no result depends on how the rows were cut.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not tuned on a GPU; docs/gpu.md has what an H200 took.
MAX_K = 1024
MIN_BLOCK = 128  # a key for each thread
WIDE = 2048  # scores compared at a time


def options(block: int) -> dict[str, int]:
    # Without a limit ptxas spills some of 64 registers, for an occupancy that 128 are enough for.
    return {"num_warps": 4 if block <= 512 else 8, "maxnreg": 128, "enable_fp_fusion": True}


_NOTHING = tl.constexpr(-(2**63))  # the key of no score at all, and of -inf
_LARGEST = tl.constexpr(2**63 - 1)


@triton.jit
def _keys(scores, ties):
    """int64 keys, larger for larger scores and, of equal ones, for lower `ties` < 2^32."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # -0 equals 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(scores != scores, 0x7FFFFFFF, ordered)
    keys = (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - ties.to(tl.int64))
    return tl.where(scores == float("-inf"), _NOTHING, keys)


@triton.jit
def _load_keys(scores_ptr, start, num_scores, FIRST_TIE: tl.constexpr, SIZE: tl.constexpr):
    at = start + tl.arange(0, SIZE)
    scores = tl.load(scores_ptr + at, mask=at < num_scores, other=float("-inf"))
    return _keys(scores, at.to(tl.int64) + FIRST_TIE)


@triton.jit
def _exchange(keys, LOG_N: tl.constexpr, LOG_SIZE: tl.constexpr, LOG_STRIDE: tl.constexpr):
    """One step of a bitonic sort of 2^LOG_N keys: order pairs that are 2^LOG_STRIDE apart.

    Falling in the runs of 2^LOG_SIZE keys of even number, rising in the others.
    """
    SHAPE: tl.constexpr = [1 << (LOG_N - 1 - LOG_STRIDE), 2, 1 << LOG_STRIDE]
    pairs = tl.reshape(keys, SHAPE)
    at = tl.reshape(tl.arange(0, 1 << LOG_N), SHAPE)
    partner = tl.sum(pairs, 1)[:, None, :] - pairs  # exact, because int64 wraps around
    falling = ((at >> LOG_SIZE) & 1) == 0
    is_first = ((at >> LOG_STRIDE) & 1) == 0
    larger, smaller = tl.maximum(pairs, partner), tl.minimum(pairs, partner)
    return tl.reshape(tl.where(falling == is_first, larger, smaller), [1 << LOG_N])


@triton.jit
def _merge(best, new, LOG_K: tl.constexpr):
    """The 2^LOG_K largest of both, falling; `best` is falling, `new` in any order."""
    # Falling runs get as long as the whole, but for the last step, which makes it rise.
    for log_size in tl.static_range(1, LOG_K):
        for step in tl.static_range(0, log_size):
            new = _exchange(new, LOG_K, log_size, log_size - 1 - step)
    for step in tl.static_range(0, LOG_K):  # -1 - key turns the order round
        new = -1 - _exchange(-1 - new, LOG_K, LOG_K, LOG_K - 1 - step)
    # One falls, one rises: the larger of each pair are the largest, and fall, then rise.
    best = tl.maximum(best, new)
    for step in tl.static_range(0, LOG_K):
        best = _exchange(best, LOG_K, LOG_K, LOG_K - 1 - step)
    return best


@triton.jit(
    do_not_specialize=[
        "first",
        "num_scores",
        "k",
        "scores_stride_m",
    ]
)
def score_topk_kernel(
    scores_ptr,  # [m, num_scores] float32
    values_ptr,  # [m, k] float32
    indices_ptr,  # [m, k] int64
    first,
    num_scores,
    k,
    scores_stride_m,
    LOG_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    BLOCK_K: tl.constexpr = 1 << LOG_K
    query = tl.program_id(0).to(tl.int64)
    scores_ptr += query * scores_stride_m
    values_ptr += query * k
    indices_ptr += query * k
    slot = tl.arange(0, BLOCK_K)
    in_k = slot < k

    # Ties: what is kept with a lower row number, the new scores, what is kept with a higher one.
    kept = tl.load(values_ptr + slot, mask=in_k, other=float("-inf"))
    kept_at = tl.load(indices_ptr + slot, mask=in_k, other=-1)
    end_new = tl.cast(num_scores, tl.int64) + BLOCK_K
    best = _keys(kept, tl.where(kept_at < first, slot, end_new + slot))
    smallest = tl.min(tl.where(in_k, best, _LARGEST), 0)

    for start in range(0, num_scores, WIDE):
        if tl.max(_load_keys(scores_ptr, start, num_scores, BLOCK_K, WIDE), 0) > smallest:
            for block in range(start, tl.minimum(start + WIDE, num_scores), BLOCK_K):
                new = _load_keys(scores_ptr, block, num_scores, BLOCK_K, BLOCK_K)
                if tl.max(new, 0) > smallest:
                    best = _merge(best, new, LOG_K)
                    smallest = tl.min(tl.where(in_k, best, _LARGEST), 0)

    there = best != _NOTHING
    ties = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    is_new = (ties >= BLOCK_K) & (ties < end_new)
    was = tl.where(ties < BLOCK_K, ties, ties - end_new)
    kept_at = tl.load(indices_ptr + was, mask=in_k & there & (is_new == 0), other=-1)
    row = tl.where(is_new, first + ties - BLOCK_K, kept_at)
    ordered = (best >> 32).to(tl.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    tl.debug_barrier()  # the indices were read by other threads than those that now overwrite them
    values = tl.where(there, values, float("-inf"))
    tl.store(values_ptr + slot, values, mask=in_k)
    tl.store(indices_ptr + slot, tl.where(there, row, -1), mask=in_k)


def score_topk(scores: Tensor, first: int, values: Tensor, indices: Tensor) -> None:
    """Merge scores [m, c] of rows first .. first + c - 1 into values and indices [m, k], in place.

    scores float32 with stride 1 in c; values and indices contiguous, as this op left them or, for
    nothing yet, -inf and -1.
    """
    (m, num_scores), k = scores.shape, values.shape[1]
    if k > MAX_K:
        raise ValueError(
            f"score_topk: backend 'triton' takes k up to {MAX_K}, got {k}; "
            "backend='reference' takes any"
        )
    if m * k * num_scores == 0:
        return
    block = max(MIN_BLOCK, triton.next_power_of_2(k))
    with torch.cuda.device_of(values):
        score_topk_kernel[(m,)](
            scores,
            values,
            indices,
            first,
            num_scores,
            k,
            scores.stride(0),
            LOG_K=block.bit_length() - 1,
            WIDE=WIDE,
            **options(block),
        )
