"""What a torch function does with its parameters, as a linear form.

Activations mode catches a parameter where it meets data. FORMS maps each torch function that is
understood to a reader of its arguments, which returns the `Form` of that call: which input to save
for the backward pass, and how the parameters' gradients come out of that input and dy as

    dW[b, o, i] = sum_t dy[b, t, o] * x[b, t, i]

so that a sampled coordinate is one (o, i) and an op computes it. A reader has the signature of its
function, and returns None for a call that it cannot express.

To add a kind of layer, add an entry here and a model to tests/cases.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dropinf import ops

Coordinates = Callable[[Tensor], tuple[Tensor, Tensor]]  # flat positions -> (o, i)


@dataclass(frozen=True)
class Form:
    """One call of a torch function, as a linear form in its parameters.

    Attributes:
        x: the input to save for the backward pass.
        roles: each parameter of the call, with the (o, i) of its flattened positions.
        features: how many trailing dimensions of x, and of dy, are not positions.
        op: computes the entries from (x, dy, o_idx, i_idx).
        prepare: makes the op's x [B, T, I] and dy [B, T, O] of those two flattened to that shape.
        flat: x may come as [B * T, features], the positions of example 0 first.
    """

    x: Tensor
    roles: Sequence[tuple[Tensor | None, Coordinates]]
    features: tuple[int, int] = (1, 1)
    op: Callable[..., Tensor] = ops.sampled_outer
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, dy: (x, dy)
    flat: bool = True


def _affine(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return x.to(dy.dtype), dy  # autocast hands the function a wider x than it multiplies


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Form | None:
    I = weight.shape[1] if weight.dim() == 2 else 0
    if not I:
        return None
    return Form(
        x=input,
        roles=[
            (weight, lambda at: (at // I, at % I)),
            (bias, lambda at: (at, torch.full_like(at, I))),
        ],
        prepare=_affine,
    )


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Form | None:
    """Hugging Face's Conv1D: addmm(bias [O], x [B * T, I], weight [I, O])."""
    I, O = mat2.shape
    if beta != 1 or alpha != 1 or input.shape != (O,):
        return None
    return Form(
        x=mat1,
        roles=[
            (mat2, lambda at: (at % O, at // O)),
            (input, lambda at: (at, torch.full_like(at, I))),
        ],
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
) -> Form | None:
    # max_norm rewrites the table in the forward pass; scale_grad_by_freq counts over the batch.
    if max_norm is not None or scale_grad_by_freq:
        return None
    rows, width = weight.shape
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else rows + padding_idx

    def without_padding(ids: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        ids = ids[..., 0]
        return (ids if padding is None else ids.masked_fill(ids == padding, -1)), dy

    return Form(
        x=input,
        roles=[(weight, lambda at: (at % width, at // width))],
        features=(0, 1),
        op=ops.sampled_embedding,
        prepare=without_padding,
        # Ids of one dimension may be the positions of every example alike.
        flat=False,
    )


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Form:
    """The scale multiplies the normalised input: coordinate j is o = i = j, the shift's i = I."""
    dims = len(normalized_shape)
    width = torch.Size(normalized_shape).numel()

    def normalised(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), (width,), eps=eps), dy.to(wide)

    return Form(
        x=input,
        roles=[
            (weight, lambda at: (at, at)),
            (bias, lambda at: (at, torch.full_like(at, width))),
        ],
        features=(dims, dims),
        prepare=normalised,
    )


FORMS: dict[Callable, Callable[..., Form | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
}
