"""Sampled entries of each example's gradients of a norm's scale and shift."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dropinf.ops.checks import (
    check_floating,
    check_same,
    checked_weights,
    describe,
    output_of,
    unit_stride,
)
from dropinf.ops.dispatch import add_op, kernel
from dropinf.ops.selftest import Case, Inputs


def sampled_norm(
    x: Tensor,
    dy: Tensor,
    index: Tensor,
    *,
    eps: float,
    rms: bool = False,
    weights: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled entries of each example's gradients of a norm's scale and shift.

    With n = F.layer_norm(x, [I], eps=eps), or F.rms_norm, in float32:

    sums[b] = cat(sum_t dy[b, t] * n[b, t], sum_t dy[b, t])
    out[b, k] = weights[k] * sums[b, index[k]]

    With a [r, s] index an entry is a sum of s of them, each with a weight of its own.

        rows = dropinf.ops.sampled_norm(x, dy, index, eps=1e-5)  # [B, r]

    Args:
        x: [B, T, I] input of the norm, float32, bfloat16 or float16 (float64 on `reference`).
        dy: [B, T, I] gradient of the summed loss at the norm's output, dtype of x.
        index: [r] int32, or [r, s]: i is the scale of feature i, I + i its shift.
        eps: of the norm.
        rms: whether x is divided by the root of its mean square, and not centred.
        weights: float32 of the shape of index, as in `sampled_outer`.
        out, backend: as in `sampled_outer`.

    Returns:
        [B, r] float32 (float64 for float64 inputs): `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an input requires grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "sampled_norm"
    if x.dim() != 3 or dy.shape != x.shape:
        raise ValueError(
            f"{op}: x and dy must both be [B, T, I], got {tuple(x.shape)} and {tuple(dy.shape)}"
        )
    check_floating(op, "x", x)
    check_same(op, "dy", dy, x.dtype, x.device)
    check_same(op, "index", index, torch.int32, x.device)
    if index.dim() not in (1, 2):
        raise ValueError(f"{op}: index must be [r] or [r, s], got {describe(index)}")
    weights = checked_weights(op, weights, index.shape, x.dtype, x.device)
    out = output_of(op, out, (x.shape[0], index.shape[0]), x.dtype, x.device)
    call = kernel(op, backend, x.device, (x.dtype,), out.dtype)
    call(unit_stride(x), unit_stride(dy), index.contiguous(), weights, rms, eps, out)
    return out


def _cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = Inputs(dtype, device)
    B, T, I, r, s = 2, 70, 40, 67, 3
    for rms in (False, True):
        x, dy = new.numbers(B, T, I), new.numbers(B, T, I)
        weights = new.weights(r)
        yield (x, dy, new.indices(2 * I, r), weights, rms, 1e-5), (new.out(B, r),)
    # Rows that are not aligned, fewer than a block takes at a time, and sums.
    x, dy = new.numbers(B, 5, I)[..., 1:], new.numbers(B, 5, I)[..., 1:]
    index, weights = new.indices(2 * I - 2, r, s), new.weights(r, s)
    yield (x, dy, index, weights, False, 1e-5), (new.out(B, r),)


# Roots and quotients are rounded.
add_op("sampled_norm", ["cuda", "triton"], _cases, tolerance=1e-5)
