"""Norms, and what else has a scale and a shift for every feature or channel.

The scale multiplies an input that is normalised, so that coordinate j has o = i = j there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropinf import ops
from dropinf.capturing.rules.forms import (
    OUTER,
    Bias,
    Form,
    RefusedError,
    Scale,
    Shift,
    affine,
    outer,
    roles_of,
)

# Where one op reads x and dy in order, as they are, for all sums of a norm. On a CPU torch
# normalises, in float32, and what is not sampled is left out.
SUMMED_ON = {"cuda"}


def norm_sums(
    x: Tensor, dy: Tensor, o_idx: Tensor, i_idx: Tensor, *, eps: float, rms: bool, **options: Any
) -> Tensor:
    """Sampled entries of a norm's scale and shift, o = i numbers of its sums."""
    return ops.sampled_norm(x, dy, o_idx, eps=eps, rms=rms, **options)


def _channel_sums(x: Tensor, dy: Tensor, o_idx: Tensor, i_idx: Tensor, **options: Any) -> Tensor:
    """[N, C, T]: sums over T of x * dy in channel o (i = 0), or of dy alone (i = 1).

    As of a convolution with one weight and one bias for each channel.
    """
    one, none = (1,), (0,)
    return ops.sampled_conv(
        x,
        dy,
        o_idx,
        i_idx,
        kernel_size=one,
        stride=one,
        padding=none,
        dilation=one,
        groups=x.shape[1],
        bias=True,
        **options,
    )


def _sums_by_statistics(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    *,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weights: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`_channel_sums` of x normalised by statistics, without a normalised copy of x.

    There are so few channels that all their sums are formed, and then picked from. No weight is 0.
    """
    C = x.shape[1]
    every = torch.arange(2 * C, dtype=torch.int32, device=x.device)
    sums = _channel_sums(x, dy, every // 2, every % 2, backend=backend)
    product, total = sums[:, 0::2], sums[:, 1::2]
    # sum dy * (x - mean) / std
    product = (product - mean.to(total) * total) * (var.to(total) + eps).rsqrt()
    entries = torch.cat([product, total], 1).index_select(1, o_idx + C * i_idx)
    if weights is not None:
        entries.mul_(weights)
    return entries if out is None else out.copy_(entries)


def sum_of_dy(x: Tensor, dy: Tensor, o_idx: Tensor, i_idx: Tensor, **options: Any) -> Tensor:
    """Sums of dy in channel o: a bias whose layer's op does not know it."""
    dy = _wide(dy).flatten(2)
    return _channel_sums(dy, dy, o_idx, i_idx, **options)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterator[Form]:
    """The scale multiplies the normalised input: coordinate j is o = i = j, the shift's i = I."""
    width = torch.Size(normalized_shape).numel()

    def normalised(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return F.layer_norm(_wide(x), (width,), eps=eps), _wide(dy)

    if input.device.type in SUMMED_ON:
        yield _summed(input, len(normalized_shape), weight, bias, width, eps, rms=False)
        return
    native = "layer_norm", {"width": width, "eps": eps}
    yield _scaled(input, len(normalized_shape), normalised, weight, bias, width, native)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Iterator[Form]:
    width = torch.Size(normalized_shape).numel()

    def normalised(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return F.rms_norm(_wide(x), (width,), eps=eps), _wide(dy)

    if input.device.type in SUMMED_ON:
        wide = torch.promote_types(input.dtype, torch.float32)
        eps = torch.finfo(wide).eps if eps is None else eps
        yield _summed(input, len(normalized_shape), weight, None, width, eps, rms=True)
        return
    native = "rms_norm", {"width": width, "eps": eps}
    yield _scaled(input, len(normalized_shape), normalised, weight, None, width, native)


def _summed(
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    width: int,
    eps: float,
    rms: bool,
) -> Form:
    op = partial(norm_sums, eps=eps, rms=rms)
    roles = roles_of(op, (weight, Scale()), (bias, Shift(width)))
    native = "sampled_norm", {"eps": eps, "rms": rms}
    return Form(x, roles, features=(dims, dims), prepare=_of_one_dtype, native=native)


def _of_one_dtype(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, dy.dtype)
    return x.to(dtype), dy.to(dtype)


def mul(input: Any, other: Any, *, out: None = None) -> Iterator[Form]:
    """x * scale, the scale over x's last dimensions: the norms that models write themselves."""
    for x, scale in ((input, other), (other, input)):
        if not isinstance(x, Tensor) or not isinstance(scale, Tensor):
            return
        shape = scale.shape
        while shape and shape[0] == 1:
            shape = shape[1:]
        if shape and x.dim() > max(len(shape), scale.dim() - 1) and x.shape[-len(shape) :] == shape:
            yield _scaled(x, len(shape), affine, scale, None, shape.numel(), OUTER)


def _scaled(
    x: Tensor,
    dims: int,
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    weight: Tensor | None,
    bias: Tensor | None,
    width: int,
    native: tuple[str, dict[str, Any]],
) -> Form:
    roles = roles_of(outer, (weight, Scale()), (bias, Bias(width)))
    return Form(x, roles, features=(dims, dims), prepare=prepare, native=native)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterator[Form]:
    def normalised(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return F.group_norm(_wide(x), num_groups, eps=eps), _wide(dy)

    yield _channels(input, normalised, weight, bias)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterator[Form]:
    if not use_input_stats:
        yield from batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
        return

    def normalised(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return F.instance_norm(_wide(x), eps=eps), _wide(dy)

    yield _channels(input, normalised, weight, bias)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterator[Form]:
    """In eval mode a scale and shift of every channel by constants."""
    if training:
        raise RefusedError(
            "BatchNorm in train mode mixes the examples of a batch; call .eval() on it"
        )

    statistics = {"mean": running_mean, "var": running_var, "eps": eps}
    op, native = partial(_sums_by_statistics, **statistics), ("batch_norm", statistics)
    yield _channels(input, _both_wide, weight, bias, op, native)


def prelu(input: Tensor, weight: Tensor) -> Iterator[Form]:
    if weight.numel() == 1:  # one slope: a single channel of everything
        yield Form(
            input,
            roles_of(outer, (weight, Scale())),
            features=(0, 0),
            prepare=_negative,
        )
    else:
        yield _channels(input, _negative, weight, None)


def _negative(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _both_wide(x.clamp(max=0), dy)


def _both_wide(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _wide(x), _wide(dy)


def _channels(
    x: Tensor,
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    weight: Tensor | None,
    bias: Tensor | None,
    op: Callable[..., Tensor] = _channel_sums,
    native: tuple[str, dict[str, Any]] | None = None,
) -> Form:
    """A scale and a shift for every channel, dimension 1."""

    def with_positions(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, dy = prepare(x, dy)
        return x.flatten(2) if x.dim() > 2 else x[..., None], (
            dy.flatten(2) if dy.dim() > 2 else dy[..., None]
        )

    roles = roles_of(op, (weight, Bias(0)), (bias, Bias(1)))
    return Form(x, roles, features=None, prepare=with_positions, native=native)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
