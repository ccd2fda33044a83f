"""Sampled entries of each example's convolution-weight gradient, from input and output gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dropinf.ops.checks import (
    check_coordinates,
    check_floating,
    check_same,
    checked_weights,
    output_of,
)
from dropinf.ops.dispatch import add_op, kernel
from dropinf.ops.selftest import Case, Inputs


def sampled_conv(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    weights: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled entries of each example's convolution-weight gradient.

    out[b, k] = weights[k] * sum_p dy[b, o, p] * x[b, g * C / groups + c, p * stride + q * dilation
    - padding], where o = o_idx[k], g = o // (O / groups) is its group, (c, q) = unravel(i_idx[k])
    in (C / groups, *kernel_size), and x counts as zeros outside its sizes: times a dy that is not
    finite they are NaN.

    So o_idx * I + i_idx, with I = C / groups * prod(kernel_size), is the position in the flattened
    weight [O, C / groups, *kernel_size]. For a transposed convolution, whose weight is
    [C, O / groups, *kernel_size], exchange the two: its dy is `x` here and its x is `dy`.

        one, none = (1, 1), (0, 0)
        at = {"kernel_size": (3, 3), "stride": one, "padding": none, "dilation": one}
        rows = dropinf.ops.sampled_conv(images, dy, o_idx, i_idx, **at)  # [B, r]

    Args:
        x: [B, C, *S] layer input, 1 to 3 spatial dimensions, float32, bfloat16 or float16 (float64
            on `reference`).
        dy: [B, O, *S'] gradient of the summed loss at the layer's output, dtype of x.
        o_idx, i_idx: [r] int32, fastest when sorted by (o, i).
        kernel_size, stride, padding, dilation: one int for each spatial dimension. Padding is that
            of the low side; S' implies the high side's, and may be anything.
        groups: of the channels, as in torch.
        bias: let i_idx = I name the layer's bias, a virtual input of ones.
        weights, out, backend: as in `sampled_outer`.

    Returns:
        [B, r] float32 (float64 for float64 inputs): `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an input requires grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "sampled_conv"
    n = x.dim() - 2
    if not 1 <= n <= 3:
        raise ValueError(
            f"{op}: x must be [B, C, *S] with 1 to 3 spatial dimensions, got {tuple(x.shape)}"
        )
    B, C = x.shape[:2]
    if dy.dim() != x.dim() or dy.shape[0] != B:
        raise ValueError(
            f"{op}: dy must be [B={B}, O, *S'] with {n} spatial dimensions as x has, "
            f"got {tuple(dy.shape)}"
        )
    check_floating(op, "x", x)
    check_same(op, "dy", dy, x.dtype, x.device)
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        ints = isinstance(values, Sequence) and all(isinstance(v, int) for v in values)
        if not ints or len(values) != n or min(values) < least:
            raise ValueError(
                f"{op}: {name} must be {n} ints of at least {least}, one for each spatial "
                f"dimension, got {values}"
            )
    O = dy.shape[1]
    if groups < 1 or C % groups or O % groups:
        raise ValueError(f"{op}: groups must divide C={C} and O={O}, got {groups}")
    check_coordinates(op, o_idx, i_idx, x.device)
    weights = checked_weights(op, weights, o_idx.shape, x.dtype, x.device)
    out = output_of(op, out, (B, o_idx.shape[0]), x.dtype, x.device)
    call = kernel(op, backend, x.device, (x.dtype,), out.dtype)
    call(
        x,
        dy,
        o_idx.contiguous(),
        i_idx.contiguous(),
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        bias,
        weights,
        out,
    )
    return out


def _cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = Inputs(dtype, device)
    B, C, O, r = 2, 4, 6, 35
    x, dy = new.numbers(B, C, 9, 7), new.numbers(B, O, 5, 4)
    o_idx, i_idx = new.indices(O, r), new.indices(C // 2 * 6 + 1, r)
    options = ((3, 2), (2, 2), (1, 1), (1, 1), 2, True)
    yield (x, dy, o_idx, i_idx, *options, new.weights(r)), (new.out(B, r),)


add_op("sampled_conv", ["cuda", "triton", "cpu"], _cases)
