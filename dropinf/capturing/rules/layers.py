"""What a torch function does with its parameters.

Two tables say what is understood where a parameter meets data:

FORMS       closed forms. A reader of the function's arguments gives the `Form` of that call: which
            input to save for the backward pass, and where the coordinates of its parameters are.
ELEMENTWISE functions whose arguments broadcast against each other: a parameter is expanded over the
            batch, and its gradient comes back example by example.

`composites` has functions that hide others inside; what is in none of them is left to autograd. To
add a kind of layer, add an entry here and a model to tests/layer_cases.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropinf import ops
from dropinf.capturing.rules import norms
from dropinf.capturing.rules.forms import (
    OUTER,
    Bias,
    ExpertWeight,
    Form,
    RefusedError,
    Role,
    Weight,
    affine,
    outer,
    roles_of,
)
from dropinf.capturing.rules.norms import sum_of_dy


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Form]:
    if weight.dim() != 2:
        return
    I = weight.shape[1]
    yield Form(
        input,
        roles_of(outer, (weight, Weight(I)), (bias, Bias(I))),
        prepare=affine,
        native=OUTER,
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
        roles_of(outer, (mat2, Weight(O, i_first=True)), (input, Bias(I))),
        prepare=affine,
        native=OUTER,
    )


def _matmul(input: Tensor, other: Tensor, *, out: None = None) -> Iterator[Form]:
    if other.dim() == 1 and input.dim() > 1:  # x [..., I] @ w [I]
        yield Form(
            input,
            roles_of(outer, (other, Weight(len(other)))),
            features=(1, 0),
            prepare=affine,
            native=OUTER,
        )
    if other.dim() == 2 and input.dim() > 1:  # x [..., I] @ W [I, O]
        O = other.shape[1]
        role = roles_of(outer, (other, Weight(O, i_first=True)))
        yield Form(input, role, prepare=affine, native=OUTER)
    if other.dim() == 3 and input.dim() > 2:
        yield from _experts(input, other)
    if input.dim() == 2 and other.dim() == 3:  # W [O, I] @ x [B, I, T]
        I, one, none = input.shape[1], (1,), (0,)
        op = partial(ops.sampled_conv, kernel_size=one, stride=one, padding=none, dilation=one)
        yield Form(
            other,
            roles_of(op, (input, Weight(I))),
            features=None,
            prepare=affine,
        )


def _experts(input: Tensor, mat2: Tensor, bias: Tensor | None = None) -> Iterator[Form]:
    """x [..., E, n, I] @ W [E, I, O], and a bias [E, 1, O]: experts or groups come first."""
    E, I, O = mat2.shape
    if input.shape[-3] != E or (bias is not None and bias.shape != (E, 1, O)):
        return
    roles = roles_of(outer, (mat2, ExpertWeight(I, O)), (bias, Bias(E * I)))
    yield Form(input, roles, features=(2, 2), prepare=affine, experts=True)


def _baddbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Iterator[Form]:
    if beta == 1 and alpha == 1:
        yield from _experts(batch1, batch2, input)


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
        roles_of(ops.sampled_embedding, (weight, Weight(width, i_first=True))),
        features=(0, 1),
        prepare=without_padding,
        # Ids of one dimension may be the positions of every example alike.
        flat=False,
        native=("embedding", {"padding_id": -1 if padding is None else padding}),
    )


def _getitem(table: Tensor, index: Any) -> Iterator[Form]:
    """table[ids]: one slice of a packed weight for every routed token."""
    ids = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        return
    rows, width = len(table), table[0].numel()
    yield Form(
        ids,
        roles_of(ops.sampled_embedding, (table, Weight(width, i_first=True))),
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
    stride, padding = _each(stride, spatial), _each(padding, spatial)
    op = partial(
        ops.sampled_conv,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=True,
    )
    window = [kernel_size, stride, padding, dilation]
    yield Form(
        input,
        roles_of(op, (weight, Weight(I)), (bias, Bias(I))),
        features=None,
        prepare=affine,
        native=("conv", {"window": window, "groups": groups}),
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

    roles = roles_of(op, (weight, Weight(size)))
    if bias is not None:
        roles.append(Role(bias, Bias(1), sum_of_dy))
    yield Form(input, roles, features=None, prepare=affine)


def _each(value: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * spatial if len(value) == 1 else value


FORMS: dict[Callable, Callable[..., Iterator[Form]]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.bmm: _experts,
    Tensor.bmm: _experts,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
    torch.mv: _matmul,
    Tensor.mv: _matmul,
    torch.mul: norms.mul,
    Tensor.mul: norms.mul,
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
    F.layer_norm: norms.layer_norm,
    F.rms_norm: norms.rms_norm,
    torch.rms_norm: norms.rms_norm,
    F.group_norm: norms.group_norm,
    F.instance_norm: norms.instance_norm,
    F.batch_norm: norms.batch_norm,
    F.prelu: norms.prelu,
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
