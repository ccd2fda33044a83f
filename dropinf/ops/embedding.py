"""Sampled entries of each example's embedding gradient, from the ids and the output gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dropinf.ops.checks import (
    check_coordinates,
    check_floating,
    check_same,
    checked_weights,
    describe,
    output_of,
    unit_stride,
)
from dropinf.ops.dispatch import add_op, kernel
from dropinf.ops.selftest import Case, Inputs


def sampled_embedding(
    ids: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    *,
    weights: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled entries of each example's embedding gradient.

    out[b, k] = weights[k] * sum over t with ids[b, t] == i_idx[k] of dy[b, t, o_idx[k]]

    Equal to sampled_outer(one_hot(ids), dy, o_idx, i_idx, weights=weights), without the one-hot
    tensor: a lookup is a linear layer without a bias whose input is one-hot.

        rows = dropinf.ops.sampled_embedding(ids, dy, o_idx, i_idx)  # [B, r]

    Args:
        ids: [B, T] int64 or int32 looked-up indices; a negative one contributes nothing.
        dy: [B, T, O] gradient of the summed loss at the lookup's output, O the embedding's width.
        o_idx: [r] int32 columns.
        i_idx: [r] int32 sorted rows of the embedding table, from 0; how many it has is not known
            here, so a row that no id names is 0 and no error.
        weights, out, backend: as in `sampled_outer`.

    Returns:
        [B, r] float32 (float64 for float64 inputs): `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, i_idx is not sorted, or an input requires
            grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "sampled_embedding"
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: ids must be [B, T] int64 or int32, got {describe(ids)}")
    B, T = ids.shape
    if dy.dim() != 3 or dy.shape[:2] != ids.shape:
        raise ValueError(f"{op}: dy must be [B={B}, T={T}, O], got {tuple(dy.shape)}")
    check_floating(op, "dy", dy)
    check_same(op, "ids", ids, ids.dtype, dy.device)
    check_coordinates(op, o_idx, i_idx, dy.device)
    weights = checked_weights(op, weights, o_idx.shape, dy.dtype, dy.device)
    out = output_of(op, out, (B, o_idx.shape[0]), dy.dtype, dy.device)
    call = kernel(op, backend, dy.device, (dy.dtype,), out.dtype)
    call(
        ids.long().contiguous(),
        unit_stride(dy),
        o_idx.contiguous(),
        i_idx.contiguous(),
        weights,
        out,
    )
    return out


def _cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = Inputs(dtype, device)
    B, T, vocabulary, O, r = 2, 37, 11, 19, 67
    ids = new.indices(vocabulary, B, T, dtype=torch.int64)
    o_idx, i_idx = new.indices(O, r), new.indices(vocabulary, r).sort().values
    yield (ids, new.numbers(B, T, O), o_idx, i_idx, new.weights(r)), (new.out(B, r),)


add_op("sampled_embedding", ["cuda", "triton", "cpu"], _cases)
