"""What a torch function does with its parameters.

Activations mode catches a parameter where it meets data. Three tables say what is understood:

FORMS       closed forms. A reader of the function's arguments gives the `Form` of that call: which
            input to save for the backward pass, and how the parameters' gradients come out of that
            input x and dy as `dW[b, o, i] = sum_t dy[b, t, o] * x[b, t, i]`, so that a sampled
            coordinate is one (o, i) and an op computes it.
ELEMENTWISE functions whose arguments broadcast against each other: a parameter is expanded over the
            batch, and its gradient comes back example by example.
COMPOSITES  functions that hide others inside, written in terms of those.

What is in none of them goes through `general`. To add a kind of layer, add an entry here and a
model to tests/cases.py.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropinf import ops

Coordinates = Callable[[Tensor], tuple[Tensor, Tensor]]  # flat positions -> (o, i)


class RefusedError(Exception):
    """A call that cannot give exact rows; the message says why."""


@dataclass(frozen=True)
class Role:
    """One parameter of a call.

    Attributes:
        tensor: the parameter.
        coordinates: (o, i) of its flattened positions.
        op: computes the entries: op(x, dy, o_idx, i_idx, scale=, out=, backend=).
    """

    tensor: Tensor
    coordinates: Coordinates
    op: Callable[..., Tensor]


@dataclass(frozen=True)
class Form:
    """One call of a torch function, as a linear form in its parameters.

    Attributes:
        x: the input to save for the backward pass.
        roles: its parameters.
        features: how many trailing dimensions of x, and of dy, are not positions; the op then takes
            [b, T, features]. None: the op takes x and dy as they are, the example first.
        prepare: makes of x and dy what the op takes.
        flat: x may come as [B * T, features], the positions of example 0 first.
    """

    x: Tensor
    roles: Sequence[Role]
    features: tuple[int, int] | None = (1, 1)
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, dy: (x, dy)
    flat: bool = True

    @property
    def num_lead(self) -> int:
        """Leading dimensions of x that are positions."""
        return 1 if self.features is None else self.x.dim() - self.features[0]


def _outer(x: Tensor, dy: Tensor, o_idx: Tensor, i_idx: Tensor, **options: Any) -> Tensor:
    return ops.sampled_outer(x, dy, o_idx, i_idx, bias=True, **options)


def _channel_sums(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    backend: str | None = None,
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """[N, C, T]: sums over T of x * dy in channel o (i = 0), or of dy alone (i = 1).

    There are so few channels that all their sums are formed, and then picked from.
    """
    total, product = dy.sum(2), (x * dy).sum(2)
    if rescale is not None:
        product = rescale(product, total)
    C = total.shape[1]
    entries = torch.cat([product, total], 1).index_select(1, o_idx + C * i_idx) * scale
    return entries if out is None else out.copy_(entries)


def _roles(op: Callable[..., Tensor], *roles: tuple[Tensor | None, Coordinates]) -> list[Role]:
    return [Role(tensor, at, op) for tensor, at in roles if tensor is not None]


def _affine(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return x.to(dy.dtype), dy  # autocast hands the function a wider x than it multiplies


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Form]:
    if weight.dim() != 2:
        return
    I = weight.shape[1]
    yield Form(
        input,
        _roles(
            _outer,
            (weight, lambda at: (at // I, at % I)),
            (bias, lambda at: (at, torch.full_like(at, I))),
        ),
        prepare=_affine,
    )


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Iterator[Form]:
    """Hugging Face's Conv1D: addmm(bias [O], x [B * T, I], weight [I, O])."""
    I, O = mat2.shape
    if beta != 1 or alpha != 1 or input.shape != (O,):
        return
    yield Form(
        mat1,
        _roles(
            _outer,
            (mat2, lambda at: (at % O, at // O)),
            (input, lambda at: (at, torch.full_like(at, I))),
        ),
        prepare=_affine,
    )


def _matmul(input: Tensor, other: Tensor, *, out: None = None) -> Iterator[Form]:
    if other.dim() == 1 and input.dim() > 1:  # x [..., I] @ w [I]
        yield Form(
            input,
            _roles(_outer, (other, lambda at: (torch.zeros_like(at), at))),
            features=(1, 0),
            prepare=_affine,
        )
    if other.dim() == 2 and input.dim() > 1:  # x [..., I] @ W [I, O]
        O = other.shape[1]
        yield Form(input, _roles(_outer, (other, lambda at: (at % O, at // O))), prepare=_affine)
    if input.dim() == 2 and other.dim() == 3:  # W [O, I] @ x [B, I, T]
        I, one, none = input.shape[1], (1,), (0,)
        op = partial(ops.sampled_conv, kernel_size=one, stride=one, padding=none, dilation=one)
        yield Form(
            other,
            _roles(op, (input, lambda at: (at // I, at % I))),
            features=None,
            prepare=_affine,
        )


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Iterator[Form]:
    if max_norm is not None:
        raise RefusedError("max_norm rewrites the table in the forward pass")
    if scale_grad_by_freq:
        raise RefusedError("scale_grad_by_freq counts ids over the whole batch")
    rows, width = weight.shape
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else rows + padding_idx

    def without_padding(ids: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        ids = ids[..., 0]
        return (ids if padding is None else ids.masked_fill(ids == padding, -1)), dy

    yield Form(
        input,
        _roles(ops.sampled_embedding, (weight, lambda at: (at % width, at // width))),
        features=(0, 1),
        prepare=without_padding,
        # Ids of one dimension may be the positions of every example alike.
        flat=False,
    )


def _getitem(table: Tensor, index: Any) -> Iterator[Form]:
    """table[ids]: one slice of a packed weight for every routed token."""
    ids = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        return
    rows, width = len(table), table[0].numel()
    yield Form(
        ids,
        _roles(ops.sampled_embedding, (table, lambda at: (at % width, at // width))),
        features=(0, table.dim() - 1),
        prepare=lambda ids, dy: (ids[..., 0] % rows, dy),
    )


def _index_select(input: Tensor, dim: int, index: Tensor) -> Iterator[Form]:
    if dim == 0:
        yield from _getitem(input, index)


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Iterator[Form]:
    kernel_size = tuple(weight.shape[2:])
    spatial = len(kernel_size)
    I = weight[0].numel()
    dilation = _each(dilation, spatial)
    if padding == "same":  # the low side; the high side follows from the output's size
        padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel_size, strict=True))
    elif padding == "valid":
        padding = 0
    if input.dim() != spatial + 2:
        return
    op = partial(
        ops.sampled_conv,
        kernel_size=kernel_size,
        stride=_each(stride, spatial),
        padding=_each(padding, spatial),
        dilation=dilation,
        groups=groups,
        bias=True,
    )
    yield Form(
        input,
        _roles(
            op,
            (weight, lambda at: (at // I, at % I)),
            (bias, lambda at: (at, torch.full_like(at, I))),
        ),
        features=None,
        prepare=_affine,
    )


def _conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Iterator[Form]:
    """The gradient of a convolution with x and dy exchanged; weight [I, O / groups, *kernel]."""
    kernel_size = tuple(weight.shape[2:])
    spatial = len(kernel_size)
    size = weight[0].numel()
    if input.dim() != spatial + 2:
        return

    def op(x: Tensor, dy: Tensor, o_idx: Tensor, i_idx: Tensor, **options: Any) -> Tensor:
        return ops.sampled_conv(
            dy,
            x,
            o_idx,
            i_idx,
            kernel_size=kernel_size,
            stride=_each(stride, spatial),
            padding=_each(padding, spatial),
            dilation=_each(dilation, spatial),
            groups=groups,
            **options,
        )

    roles = _roles(op, (weight, lambda at: (at // size, at % size)))
    if bias is not None:
        roles.append(Role(bias, lambda at: (at, torch.ones_like(at)), _sum_of_dy))
    yield Form(input, roles, features=None, prepare=_affine)


def _sum_of_dy(x: Tensor, dy: Tensor, o_idx: Tensor, i_idx: Tensor, **options: Any) -> Tensor:
    dy = _wide(dy).flatten(2)
    return _channel_sums(dy, dy, o_idx, i_idx, **options)


def _each(value: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * spatial if len(value) == 1 else value


def _layer_norm(
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

    yield _scaled(input, len(normalized_shape), normalised, weight, bias, width)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Iterator[Form]:
    width = torch.Size(normalized_shape).numel()

    def normalised(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        limits = torch.finfo(x.dtype) if eps is None else None  # of the dtype that it ran in
        return F.rms_norm(_wide(x), (width,), eps=limits.eps if limits else eps), _wide(dy)

    yield _scaled(input, len(normalized_shape), normalised, weight, None, width)


def _mul(input: Any, other: Any, *, out: None = None) -> Iterator[Form]:
    """x * scale, the scale over x's last dimensions: the norms that models write themselves."""
    for x, scale in ((input, other), (other, input)):
        if not isinstance(x, Tensor) or not isinstance(scale, Tensor):
            return
        shape = scale.shape
        while shape and shape[0] == 1:
            shape = shape[1:]
        if shape and x.dim() > max(len(shape), scale.dim() - 1) and x.shape[-len(shape) :] == shape:
            yield _scaled(x, len(shape), _affine, scale, None, shape.numel())


def _scaled(
    x: Tensor,
    dims: int,
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    weight: Tensor | None,
    bias: Tensor | None,
    width: int,
) -> Form:
    roles = _roles(
        _outer,
        (weight, lambda at: (at, at)),
        (bias, lambda at: (at, torch.full_like(at, width))),
    )
    return Form(x, roles, features=(dims, dims), prepare=prepare)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterator[Form]:
    def normalised(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return F.group_norm(_wide(x), num_groups, eps=eps), _wide(dy)

    yield _channels(input, normalised, weight, bias)


def _instance_norm(
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
        yield from _batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
        return

    def normalised(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return F.instance_norm(_wide(x), eps=eps), _wide(dy)

    yield _channels(input, normalised, weight, bias)


def _batch_norm(
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

    def rescale(product: Tensor, total: Tensor) -> Tensor:
        # sum dy * (x - mean) / std, without the normalised copy of x.
        mean, var = running_mean.to(total), running_var.to(total)
        return (product - mean * total) * (var + eps).rsqrt()

    yield _channels(input, _both_wide, weight, bias, partial(_channel_sums, rescale=rescale))


def _prelu(input: Tensor, weight: Tensor) -> Iterator[Form]:
    if weight.numel() == 1:  # one slope: a single channel of everything
        yield Form(
            input,
            _roles(_outer, (weight, lambda at: (at, at))),
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
) -> Form:
    """A scale and a shift for every channel, dimension 1."""

    def with_positions(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, dy = prepare(x, dy)
        return x.flatten(2) if x.dim() > 2 else x[..., None], (
            dy.flatten(2) if dy.dim() > 2 else dy[..., None]
        )

    roles = _roles(
        op,
        (weight, lambda at: (at, torch.zeros_like(at))),
        (bias, lambda at: (at, torch.ones_like(at))),
    )
    return Form(x, roles, features=None, prepare=with_positions)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


FORMS: dict[Callable, Callable[..., Iterator[Form]]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.mv: _matmul,
    Tensor.mv: _matmul,
    torch.mul: _mul,
    Tensor.mul: _mul,
    F.embedding: _embedding,
    Tensor.__getitem__: _getitem,
    torch.index_select: _index_select,
    Tensor.index_select: _index_select,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.conv_transpose1d: _conv_transpose,
    F.conv_transpose2d: _conv_transpose,
    F.conv_transpose3d: _conv_transpose,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    F.prelu: _prelu,
}


def _functions(*names: str) -> set[Callable]:
    """Functions and methods of these names, in place and as operators too."""
    found = set()
    for name in names:
        forms = (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__")
        found |= {getattr(where, n, None) for where in (torch, Tensor) for n in forms}
    return found - {None}


ELEMENTWISE = _functions(
    "add",
    "sub",
    "rsub",
    "subtract",
    "mul",
    "multiply",
    "div",
    "divide",
    "true_divide",
    "truediv",
    "div",
    "pow",
    "where",
    "maximum",
    "minimum",
    "max",
    "min",
    "fmax",
    "fmin",
    "lerp",
    "addcmul",
    "addcdiv",
    "atan2",
    "hypot",
    "logaddexp",
    "masked_fill",
    "clamp",
    "copysign",
    "float_power",
    "remainder",
    "fmod",
    "xlogy",
)


def opened(func: Any) -> Callable:
    """A Python function of torch, with its question for overrides answered no.

    Called under a TorchFunctionMode, the mode then sees the functions inside of it.
    """
    return types.FunctionType(
        func.__code__,
        {**func.__globals__, "has_torch_function": lambda tensors: False},
        argdefs=func.__defaults__,
    )


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Bags as rows of ids [B, n], looked up one by one and then reduced."""
    real = torch.ones_like(input, dtype=torch.bool)
    if input.dim() == 1:
        ends = offsets[1:] if include_last_offset else F.pad(offsets[1:], (0, 1), value=len(input))
        starts = offsets[:-1] if include_last_offset else offsets
        step = torch.arange(int((ends - starts).max()) if len(starts) else 0, device=input.device)
        real = step < (ends - starts)[:, None]
        at = (starts[:, None] + step).where(real, 0)
        input = input[at]
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights[at]
    if padding_idx is not None:
        real = real & (input != padding_idx % len(weight))
    entries = F.embedding(
        input, weight, max_norm=max_norm, scale_grad_by_freq=scale_grad_by_freq
    )  # [B, n, width]
    real = real[..., None]
    if mode == "max":
        largest = entries.masked_fill(~real, -torch.inf).max(1).values
        return largest.where(real.any(1), 0)
    if per_sample_weights is not None:
        entries = entries * per_sample_weights[..., None]
    total = entries.where(real, 0).sum(1)
    return total if mode == "sum" else total / real.sum(1).clamp(min=1)


def _grouped_mm(
    input: Tensor,
    weight: Tensor,
    offs: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """input [n, I], rows sorted by expert, and weight [E, I, O]: a product for each expert."""
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    parts = [
        torch.mm(input[start:end], weight[e])
        for e, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    rest = input.new_zeros(len(input) - ends[-1], weight.shape[2])
    return torch.cat([*parts, rest]).to(out_dtype or input.dtype)


# The dimension of the batch inside of a composite, where it is not the caller's.
COMPOSITES: dict[Callable, tuple[Callable, int | None]] = {
    F.multi_head_attention_forward: (opened(F.multi_head_attention_forward), 1),
    F.embedding_bag: (_embedding_bag, None),
    torch._grouped_mm: (_grouped_mm, None),
}
